"""One model for several molecules: training, resume, ranks, evaluation, prediction."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gfnode_fast.data import Trajectory
from gfnode_fast.training import (
    CheckpointError,
    ConfigError,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    read_metrics,
    train,
)
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.molecules import stored_molecules
from run_comparison import assert_same_run
from small_run import small_config, small_trajectory

MODEL = {"solver_mode": "exact"}


def chain_trajectory(num_frames: int = 300, *, dt_fs: float = 0.5) -> Trajectory:
    """C-C-N-C-C, another molecule than `small_trajectory`'s."""
    rng = np.random.default_rng(1)
    rest = np.array([[1.25 * k, 0.8 * (k % 2), 0.1 * k * k] for k in range(5)])
    time = np.arange(num_frames)[:, None, None]
    rate, phase = rng.uniform(0.07, 0.15, (1, 5, 3)), rng.uniform(0.0, 6.0, (1, 5, 3))
    positions = rest + 0.05 * np.sin(rate * time + phase)
    return Trajectory(
        positions=positions.astype(np.float32), numbers=np.array([6, 6, 7, 6, 6]), dt_fs=dt_fs
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("trajectories")
    paths = [directory / "ethanol.npz", directory / "chain.npz"]
    for path, trajectory in zip(paths, (small_trajectory(), chain_trajectory()), strict=True):
        trajectory.save(path)
    return [str(path) for path in paths]


def mixed_config(
    files: list[str], output: Path, *, data: Any = None, model: Any = None, **changes: Any
) -> TrainConfig:
    """11 windows an epoch, 8 of ethanol and 3 of the chain, in 3 steps."""
    molecules = [files[0], {"trajectory": files[1], "train_size": 3, "val_size": 2}]
    return small_config(
        Path("sample:aspirin"),
        output,
        data={"molecules": molecules, **(data or {})},
        model={**MODEL, **(model or {})},
        **changes,
    )


@pytest.fixture(scope="module")
def finished(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run; tests must not write into it."""
    output = tmp_path_factory.mktemp("mixed") / "run"
    config = mixed_config(files, output, data={"sampling_temperature": 2.0})
    result = train(config)
    assert (result.status, result.step) == ("completed", 18)
    return output


def test_the_loss_falls_and_every_molecule_has_its_error(finished):
    rows = read_metrics(finished)
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    for row in rows:
        if row["kind"] == "validation":
            parts = 4 * row["val_mse/ethanol"] + 2 * row["val_mse/chain"]
            assert row["val_mse"] == pytest.approx(parts / 6, rel=1e-12)
    header = (finished / "metrics.csv").read_text().splitlines()[0]
    assert header.endswith("val_mse,val_mse_last,val_mse/ethanol,val_mse/chain")
    assert {p.name for p in finished.glob("windows*")} == {
        "windows-ethanol.json", "windows-chain.json",
    }  # fmt: skip


def test_the_checkpoint_has_every_molecules_graph_and_hashes(finished):
    stored = stored_molecules(read_checkpoint(finished / "best.json"))
    assert {name: m.num_atoms for name, m in stored.items()} == {"ethanol": 3, "chain": 5}
    assert stored["chain"].graph.numbers.tolist() == [6, 6, 7, 6, 6]
    assert {m.largest_number for m in stored.values()} == {8}
    hashes = [digest for m in stored.values() for digest in m.data_hashes.values()]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("stop", [1, 7])
def test_resumed_equals_uninterrupted(finished, files, tmp_path, stop):
    config = mixed_config(files, tmp_path / "run", data={"sampling_temperature": 2.0})
    assert train(replace(config, max_steps=stop)).status == "max_steps"
    train(config, resume=True)
    assert_same_run(finished, tmp_path / "run")


def test_parts_of_a_batch_make_the_same_update(files, tmp_path):
    whole, parts = (
        mixed_config(
            files,
            tmp_path / f"{n}",
            optim={"accumulate": n, "dtype": "float64", "ema_decay": 0.9},
            max_steps=4,
        )
        for n in (1, 2)
    )
    train(whole), train(parts)
    one, two = (read_checkpoint(tmp_path / f"{n}" / "last.json").model for n in (1, 2))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-9, atol=1e-12)


def test_resume_refuses_changed_data_of_one_molecule(tmp_path):
    paths = [tmp_path / "ethanol.npz", tmp_path / "chain.npz"]
    small_trajectory().save(paths[0])
    chain_trajectory().save(paths[1])
    config = mixed_config([str(path) for path in paths], tmp_path / "run", max_steps=1)
    train(config)
    changed = chain_trajectory()
    changed.positions[0] += 1e-3
    changed.save(paths[1])
    with pytest.raises(CheckpointError, match="got another trajectory of chain"):
        train(replace(config, max_steps=None), resume=True)


def test_one_time_step_for_all(tmp_path):
    small_trajectory().save(tmp_path / "a.npz")
    chain_trajectory(dt_fs=1.0).save(tmp_path / "b.npz")
    config = mixed_config([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], tmp_path / "run")
    with pytest.raises(ConfigError, match=r"one time between frames, got a 0\.5, b 1 fs"):
        train(config)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"molecules": [{"dt_fs": 1.0}]}, r"`data.molecules\[0\]` must be a trajectory.*add"),
        ({"molecules": ["a", {"trajectory": "b", "delta_frame": 3}]}, "remove delta_frame"),
        ({"molecules": ["a", {"trajectory": "b", "wrong": 3}]}, "remove wrong"),
        ({"molecules": ["x/a.npz", "y/a.npz"]}, r"`data.molecules\[1\].name` must be"),
        ({"molecules": [{"trajectory": "a", "name": "1"}]}, "not a number"),
        ({"molecules": [{"trajectory": "a", "dt_fs": -1.0}]}, "`data.dt_fs` must be"),
        ({"molecules": ["a"], "trajectory": "b"}, "`data.trajectory` must be left out"),
        ({"molecules": ["a"], "sampling_temperature": 0.0}, "`data.sampling_temperature` must be"),
        ({"sampling_temperature": 2.0}, "must be 1 with one trajectory"),
    ],
)
def test_lists_that_do_not_fit_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        config_from_dict({"data": change})


def test_a_captured_step_is_of_one_molecule():
    with pytest.raises(ConfigError, match="`capture` must be false with data.molecules"):
        config_from_dict({"data": {"molecules": ["a"]}, "capture": True})


def test_more_modes_than_the_smallest_molecule_has_are_refused(files, tmp_path):
    with pytest.raises(ConfigError, match=r"atoms \(3, of the smallest molecule\), got 4"):
        train(mixed_config(files, tmp_path / "run", model={"num_modes": 4}))


def test_options_of_one_molecule_are_its_own(files):
    config = mixed_config(files, Path("run"), data={"bonds": "published"})
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    ethanol, chain = config.data.by_molecule().values()
    assert (ethanol.train_size, chain.train_size) == (8, 3)
    assert ethanol.bonds == chain.bonds == "published"
    assert not chain.is_mixed
