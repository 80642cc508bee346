"""Training in several processes is training in one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from gfnode_fast.training import config_to_dict, loop, read_metrics, train
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.ranks import Ranks, local_device
from small_run import mixed_config, mixed_files, small_config

# Steps do not follow from the molecules run together, so that only rounding differs.
MODEL = {"solver_mode": "exact"}
OPTIM = {"dtype": "float64", "batch_size": 5, "ema_decay": 0.9}  # batches of 5 and 3: uneven


def launch(config, ranks: int, *more: str, module: str = "gfnode_fast.cli"):
    """`torchrun` with this many processes on the CPU."""
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config_to_dict(config)))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", "-m", module, "train", "--config", str(path), *more,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def assert_close_runs(one: Path, two: Path) -> None:
    for name in ("last.json", "best.json"):
        first, second = read_checkpoint(one / name), read_checkpoint(two / name)
        for key, value in first.model.items():
            torch.testing.assert_close(second.model[key], value, rtol=1e-6, atol=1e-9)
    keys = {"loss", "grad_norm", "val_mse", "val_mse_last", "val_mse/ethanol", "val_mse/chain"}
    for a, b in zip(read_metrics(one), read_metrics(two), strict=True):
        assert a["step"] == b["step"]
        for key in keys & a.keys():
            assert a.get(key) == pytest.approx(b.get(key), rel=1e-9)


@pytest.fixture(scope="module")
def alone(trajectory_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    train(small_config(trajectory_file, output, model=MODEL, optim=OPTIM))
    return output


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_make_the_run_of_one_process(alone, trajectory_file, tmp_path, ranks):
    """With 4 ranks the batch of 3 leaves one without a window."""
    config = small_config(trajectory_file, tmp_path / "run", model=MODEL, optim=OPTIM)
    done = launch(config, ranks)
    assert done.returncode == 0, done.stderr
    assert_close_runs(alone, tmp_path / "run")
    assert done.stdout.count("best") <= 1  # one process speaks


def test_ranks_make_the_mixed_run_of_one_process(tmp_path):
    files = mixed_files(tmp_path)
    runs = [
        mixed_config(
            files, tmp_path / name, data={"sampling_temperature": 2.0}, optim=OPTIM | {"epochs": 2}
        )
        for name in ("alone", "together")
    ]
    train(runs[0])
    done = launch(runs[1], 2)
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "alone", tmp_path / "together")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(alone, trajectory_file, tmp_path):
    config = small_config(trajectory_file, tmp_path / "run", model=MODEL, optim=OPTIM)
    assert launch(replace(config, max_steps=4), 2).returncode == 0
    stored = read_checkpoint(tmp_path / "run" / "last.json")
    assert stored.manifest["position"]["step"] == 4
    train(config, resume=True)
    assert_close_runs(alone, tmp_path / "run")


_FAILING = """
import os, sys
if os.environ["RANK"] == "1":
    from gfnode_fast.training import step
    def broken(self, index, where):
        raise RuntimeError("broken: `rank` must hold, got a failure; mend it")
    step.BatchStep._gradients = broken
from gfnode_fast.cli.main import main
sys.exit(main())
"""


@pytest.mark.slow
def test_a_failed_rank_ends_all(trajectory_file, tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text(_FAILING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = small_config(trajectory_file, tmp_path / "run", model=MODEL, optim=OPTIM)
    done = launch(config, 2, module="failing")
    assert done.returncode != 0
    assert done.stderr.count("broken: `rank` must hold") == 1


def test_shares_are_disjoint_and_whole():
    index = torch.randperm(11)
    shares = [Ranks(rank, 4).share(index) for rank in range(4)]
    assert torch.equal(torch.cat(shares), index)
    assert torch.equal(Ranks().share(index), index)


def test_each_process_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert local_device("auto") == "auto"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert local_device("auto") == "cuda:1"
    assert local_device("cpu") == "cpu"


def test_a_run_is_on_its_own_gpu(trajectory_file, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Also what names no device."""
    current: list[torch.device] = []

    @contextlib.contextmanager
    def device(place: torch.device):
        current.append(place)
        yield
        current.pop()

    class Run:
        metrics = None

        def __init__(self, *_: object) -> None: ...

        def run(self) -> list[torch.device]:
            return current.copy()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(loop, "resolve_device", lambda _: torch.device("cuda:1"))
    monkeypatch.setattr(loop, "forked_random_state", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(loop, "_Run", Run)
    assert train(small_config(trajectory_file, tmp_path)) == [torch.device("cuda:1")]
    assert current == []
