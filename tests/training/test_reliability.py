"""Kills at random moments, memory over many steps, full disks, damaged files, NaN in the data.

`benchmarks/reliability.py` makes the full figures of the first two: 50 kills, 10⁴ steps.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from benchmarks import reliability, report
from forged_checkpoint import forge, forge_manifest
from full_disk import FullDisk, no_file_larger_than
from gfnode_fast.cli.main import main
from gfnode_fast.data import Trajectory, TrajectoryError, WriteError
from gfnode_fast.training import CheckpointError, ConfigError, TrainConfig, load_model, train
from gfnode_fast.training.extxyz import write_extxyz
from run_comparison import assert_same_run
from small_run import mixed_config, mixed_files, small_config, small_trajectory


@pytest.mark.slow
def test_kills_at_random_moments_and_memory_over_many_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills anywhere: between steps, in a validation, while a checkpoint is written."""
    path = tmp_path / "result.json"
    assert reliability.main(["--kills", "5", "--steps", "1000", "--json", str(path)]) == 0
    result = report.load(path)
    assert len(result["kills"]["seconds_alive"]) == 5
    assert result["memory"]["steps"] == 1000
    said = report.readme_section([result])
    assert "at 5 random moments" in said
    assert said.splitlines()[-1] in capsys.readouterr().out


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def short_config(trajectory: Path, output: Path) -> TrainConfig:
    """Two steps, a validation, and every kind of file."""
    return small_config(
        trajectory, output, optim={"epochs": 1, "validate_every": 1}, checkpoint_every=1
    )


def go_on(config: TrainConfig) -> None:
    train(config, resume=(Path(config.output) / "last.json").exists())


def test_a_disk_full_in_the_middle_of_any_file_is_named_and_the_run_goes_on(
    trajectory_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        calls = FullDisk(patch).calls
        train(short_config(trajectory_file, whole))
    writes = [at for at, name in enumerate(calls) if name == "write"]
    named = set()
    for at in writes:
        config = short_config(trajectory_file, tmp_path / f"full-{at}")
        with monkeypatch.context() as patch:
            FullDisk(patch, at)
            with pytest.raises(WriteError, match="No space left .*; free space") as caught:
                train(config)
        file = Path(str(caught.value).split("`")[1]).name
        named.add(re.sub(r"-\w+\.", ".", file))  # without the hash
        assert not list(Path(config.output).glob(".*"))
        go_on(config)
        assert_same_run(whole, Path(config.output))
    assert named == {
        "metrics.jsonl", "metrics.csv", "config.json", "windows.json", "last.json", "best.json",
        "last.model.safetensors", "last.state.safetensors",
        "best.model.safetensors", "best.state.safetensors",
    }  # fmt: skip


def test_a_full_disk_on_resume_leaves_the_run_and_is_one_line(
    trajectory_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own refusal, at the command line."""
    run = tmp_path / "run"
    config = small_config(trajectory_file, run)
    train(replace(config, max_steps=3))
    before = contents(run)
    room = max(len(data) for name, data in before.items() if name.endswith("json")) + 1
    assert room < max(map(len, before.values()))
    with no_file_larger_than(room):
        assert main(["train", "--resume", str(run), "--max_steps", "null"]) == 2
    error = capsys.readouterr().err
    assert "must be a file that can be written, got File too large" in error
    assert error.count("\n") == 1
    after = contents(run)
    changing = ("config.json", "metrics.jsonl", "metrics.csv")  # max_steps, and rows since
    for name in set(before) | set(after):
        assert name in changing or before[name] == after[name], name
    train(config, resume=True)
    train(small_config(trajectory_file, tmp_path / "whole"))
    assert_same_run(tmp_path / "whole", run)


def test_rows_reach_the_disk_before_the_checkpoint_that_counts_them(
    trajectory_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    train(short_config(trajectory_file, tmp_path / "run"))
    calls = "".join(
        {"mkstemp": "m", "write": "w", "fsync": "s", "replace": "r"}[c] for c in disk.calls
    )
    file = "mwsrs"
    # Metrics, config, windows; "last"; two rows; "best"; "last" twice, of which the second time
    # only the time it took is new.
    assert calls == file * 4 + "s" + file * 3 + "wwww" + ("s" + file * 3) * 2 + "s" + file


@pytest.mark.parametrize("damage", ["last.json", "last-*.model.*", "last-*.state.*", "metrics.*"])
def test_a_damaged_run_is_refused_and_left_as_it_is(
    trajectory_file: Path, tmp_path: Path, damage: str
) -> None:
    config = small_config(trajectory_file, tmp_path / "run")
    train(replace(config, max_steps=4))
    file = sorted((tmp_path / "run").glob(damage))[-1]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = contents(tmp_path / "run")
    with pytest.raises(CheckpointError, match=rf"`.*{file.name}` must .*; restore"):
        train(config, resume=True)
    assert contents(tmp_path / "run") == before
    load_model(tmp_path / "run", device="cpu")  # the best


def test_a_log_that_is_gone_is_warned_of(
    trajectory_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(trajectory_file, tmp_path / "run")
    train(replace(config, max_steps=4))
    (tmp_path / "run" / "metrics.jsonl").unlink()
    train(config, resume=True)
    assert "metrics.jsonl is missing; its 3 rows" in caplog.text


def test_another_model_s_checkpoint_is_refused(
    finished_run: Path, trajectory_file: Path, tmp_path: Path
) -> None:
    config = small_config(trajectory_file, tmp_path / "run", model={"hidden_nf": 12})
    train(replace(config, max_steps=2))
    foreign = next(finished_run.glob("last-*.model.*")).read_bytes()
    next((tmp_path / "run").glob("last-*.model.*")).write_bytes(foreign)
    with pytest.raises(CheckpointError, match=r"must be of SHA-256"):
        train(config, resume=True)
    forge(tmp_path / "run" / "last.json", "model", foreign)
    other = r"`.*run/last-.*model.* with '.*' as float32 of shape .*12.*, got float32 of .*8"
    for use in (lambda: train(config, resume=True), lambda: load_model(tmp_path / "run")):
        with pytest.raises(CheckpointError, match=other):
            use()
    for file in finished_run.glob("last*"):
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match=r"model\.hidden_nf: 8 -> 12"):
        train(config, resume=True)


def test_another_model_s_optimiser_is_refused(
    finished_run: Path, trajectory_file: Path, tmp_path: Path
) -> None:
    config = small_config(trajectory_file, tmp_path / "run", model={"hidden_nf": 12})
    train(replace(config, max_steps=2))
    foreign = next(finished_run.glob("last-*.state.*")).read_bytes()
    forge(tmp_path / "run" / "last.json", "state", foreign)
    other = r"`.*run/last-.*state.* with 'optimizer.*' as float32 of .*12.*, got float32 of .*8"
    with pytest.raises(CheckpointError, match=other):
        train(config, resume=True)


OPTIONAL = ("config.", "torch", "threads", "molecules.0.name", "molecules.1.name")


def forgeries(values: Any, *above: str) -> Iterator[tuple[str, Any]]:
    """Every entry by its name, and the values without it."""
    for key in range(len(values)) if isinstance(values, list) else values:
        name = ".".join((*above, str(key)))
        if isinstance(values, dict):
            yield name, {k: v for k, v in values.items() if k != key}
        if isinstance(values[key], dict | list):
            for inner, forged in forgeries(values[key], *above, str(key)):
                changed = copy.copy(values)
                changed[key] = forged
                yield inner, changed


@pytest.mark.parametrize("mixed", [False, True])
def test_a_manifest_without_an_entry_is_refused_by_its_name(
    trajectory_file: Path, tmp_path: Path, mixed: bool
) -> None:
    run = tmp_path / "run"
    config = small_config(trajectory_file, run)
    if mixed:
        config = mixed_config(mixed_files(tmp_path), run)
    train(replace(config, max_steps=1))
    whole = json.loads((run / "last.json").read_bytes())
    del whole["sha256"]
    found = 0
    for name, forged in forgeries(whole):
        if name.startswith(OPTIONAL):
            continue
        forge_manifest(run / "last.json", forged)
        expected = {"format": "another kind of file", "version": "version None"}
        said = expected.get(name, rf"manifest with '{name}.*', got one without it")
        with pytest.raises(CheckpointError, match=rf"last\.json` must be .*{said}; restore"):
            train(config, resume=True)
        found += 1
    assert found > 20
    forge_manifest(run / "last.json", whole | {"position": whole["position"] | {"step": None}})
    with pytest.raises(CheckpointError, match=r"'position\.step' of type int, got None; restore"):
        train(config, resume=True)


def test_a_state_without_a_tensor_is_refused_by_its_name(
    trajectory_file: Path, tmp_path: Path
) -> None:
    config = small_config(trajectory_file, tmp_path / "run")
    train(replace(config, max_steps=1))
    (file,) = (tmp_path / "run").glob("last-*.state.*")
    whole = safetensors.torch.load(file.read_bytes())
    for name in ("graph.eigvecs", "optimizer.0.step", "optimizer.0.exp_avg", "random.cpu"):
        left = {key: tensor for key, tensor in whole.items() if key != name}
        forge(tmp_path / "run" / "last.json", "state", safetensors.torch.save(left))
        with pytest.raises(CheckpointError, match=f"state.* with '{name}'.*, got none of that"):
            train(config, resume=True)


def test_another_thread_count_is_warned_of(
    trajectory_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = small_config(trajectory_file, tmp_path / "run")
    train(replace(config, max_steps=2))
    train(replace(config, max_steps=3), resume=True)
    assert "threads" not in caplog.text
    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    train(replace(config, max_steps=4), resume=True)
    assert "threads was 1 when the run stopped and is 7 now" in caplog.text
    assert "not bit for bit" in caplog.text
    monkeypatch.setattr("gfnode_fast.training.loop._decides_bits", lambda: {"cores": 2})
    train(replace(config, max_steps=5), resume=True)
    assert "cores was not recorded when the run stopped and is 2 now" in caplog.text


def _save_native(path: Path, molecule: Trajectory) -> None:
    molecule.save(path)


def _save_md17(path: Path, molecule: Trajectory) -> None:
    np.savez(path, R=molecule.positions, z=molecule.numbers)


def _save_extxyz(path: Path, molecule: Trajectory) -> None:
    infos = [{"dt_fs": molecule.dt_fs}] * molecule.num_frames
    write_extxyz(path, molecule.positions, molecule.numbers, infos=infos)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    ("name", "save"),
    [("x.npz", _save_native), ("x.npz", _save_md17), ("x.extxyz", _save_extxyz)],
)
def test_frames_that_are_not_finite_are_named_and_runs_stay(
    finished_run: Path, tmp_path: Path, name: str, save: Any, value: float
) -> None:
    molecule = small_trajectory()
    molecule.positions[37, 1, 2] = value
    path = tmp_path / name
    save(path, molecule)
    before = contents(finished_run)
    where = rf"{name}.* must be finite, got NaN or infinity, first in row 37"
    with pytest.raises(TrajectoryError, match=where):
        train(small_config(path, tmp_path / "run", data={"dt_fs": 0.5}))
    assert not (tmp_path / "run").exists()
    output = tmp_path / "p.extxyz"
    predict = ["predict", str(finished_run), "--trajectory", str(path), "--dt_fs", "0.5"]
    assert main([*predict, "--output", str(output)]) == 2
    assert not output.exists()
    assert contents(finished_run) == before


def test_data_spoiled_since_is_refused_on_resume(tmp_path: Path) -> None:
    molecule = small_trajectory()
    molecule.save(tmp_path / "x.npz")
    config = small_config(tmp_path / "x.npz", tmp_path / "run")
    train(replace(config, max_steps=2))
    before = contents(tmp_path / "run")
    good = molecule.positions[5].copy()
    molecule.positions[5] = np.nan
    molecule.save(tmp_path / "x.npz")
    with pytest.raises(TrajectoryError, match=r"x\.npz.* row 5"):
        train(config, resume=True)
    assert contents(tmp_path / "run") == before
    molecule.positions[5] = good
    molecule.save(tmp_path / "x.npz")
    train(config, resume=True)
