"""A run: readings, metrics, how it ends, what it says of its configuration."""

from __future__ import annotations

import csv
import json
import os
import sys
import threading
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gfnode_fast import reference
from gfnode_fast.data import Trajectory
from gfnode_fast.training import ConfigError, load_model, read_metrics, train
from gfnode_fast.training import loop as loop_module
from gfnode_fast.training.checkpoint import read_checkpoint
from small_run import small_config, small_trajectory


def test_a_thread_can_train(trajectory_file, tmp_path):
    results = []
    config = small_config(trajectory_file, tmp_path / "run", max_steps=1)
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    thread.join()
    assert results[0].status == "max_steps"


def test_losses_are_read_only_when_due(trajectory_file, tmp_path, monkeypatch):
    """Twelve steps with a reading every six, and three validations: no other transfer of losses."""
    reads = []
    original = loop_module._Run._check_readings
    monkeypatch.setattr(
        loop_module._Run,
        "_check_readings",
        lambda self: (reads.append(self.position.step), original(self))[1],
    )
    train(small_config(trajectory_file, tmp_path / "run", log_every=6, checkpoint_every=100))
    assert sorted(set(reads)) == [4, 6, 8, 12]


def test_early_stopping(trajectory_file, tmp_path, monkeypatch):
    values = iter([3.0, 2.0, 2.5, 2.0, 2.2, 1.0])
    monkeypatch.setattr(loop_module, "mean_squared_errors", lambda *a, **k: (next(values), 9.0, []))
    config = small_config(
        trajectory_file, tmp_path / "run", optim={"patience": 3, "validate_every": 1, "epochs": 50}
    )
    result = train(config)
    assert (result.status, result.epoch) == ("early_stopped", 5)
    assert (result.best_mse, result.best_epoch) == (2.0, 2)
    assert read_checkpoint(tmp_path / "run").manifest["position"]["epoch"] == 2
    assert train(config, resume=True).epoch == 5


def test_time_budget(trajectory_file, tmp_path, monkeypatch):
    config = small_config(
        trajectory_file, tmp_path / "run", max_seconds=0.05, optim={"epochs": 5000}
    )
    started = time.perf_counter()
    result = train(config)
    assert result.status == "max_seconds"
    assert time.perf_counter() - started < 20


def test_metrics_files(finished_run):
    rows = read_metrics(finished_run)
    assert [(row["kind"], row["step"]) for row in rows] == [
        ("train", 2), ("train", 4), ("validation", 4), ("train", 6), ("train", 8),
        ("validation", 8), ("train", 10), ("train", 12), ("validation", 12),
    ]  # fmt: skip
    assert [row["lr"] for row in rows if row["kind"] == "train"] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    )
    with open(finished_run / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(rows, table, strict=True):
        filled = {key: value for key, value in line.items() if value != ""}
        assert filled == {key: str(value) for key, value in row.items()}
    assert json.loads((finished_run / "config.json").read_text())["optim"]["epochs"] == 6


def test_tensorboard_missing_is_said(trajectory_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match=r"gfnode-fast\[tensorboard\]"):
        train(small_config(trajectory_file, tmp_path / "run", tensorboard=True))


def test_tensorboard_gets_every_row(trajectory_file, tmp_path, monkeypatch):
    """Through a stand-in with the two methods used, so that it is tested without the package."""
    written = []

    class Writer:
        def __init__(self, directory):
            self.directory = directory

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

        def close(self):
            written.append(self.directory)

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train(small_config(trajectory_file, tmp_path / "run", tensorboard=True))
    rows = read_metrics(tmp_path / "run")
    assert ("train/loss", rows[0]["loss"], 2) in written
    assert ("validation/val_mse", rows[2]["val_mse"], 4) in written
    assert written[-1] == str(tmp_path / "run" / "tensorboard")


def test_a_trained_model_loads_into_the_reference(finished_run):
    trained = load_model(finished_run, device="cpu")
    model = reference.FourierMD(
        1, 2, 5, 8, with_v=True, num_modes=2, num_timesteps=4, time_emb_dim=4, num_atoms=3,
        delta_frame=20, fourier_basis="graph",
    )  # fmt: skip
    model.load_state_dict(trained.model.state_dict(), strict=True)


def test_global_random_state_is_left_alone(trajectory_file, tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    train(small_config(trajectory_file, tmp_path / "run", model={"use_vae": True}, max_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_gpu_that_is_not_there_is_said(trajectory_file, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = replace(small_config(trajectory_file, tmp_path / "run"), device="cuda")
    with pytest.raises(RuntimeError, match="`device` must be available"):
        train(config)


def test_too_many_modes_are_said(trajectory_file, tmp_path):
    for basis, modes, most in (("graph", 4, 3), ("linear", 3, 2)):
        model = {"num_modes": modes, "fourier_basis": basis}
        text = f"`model.num_modes` must be at most {most} for the 3 atoms of the molecule, got"
        with pytest.raises(ConfigError, match=text):
            train(small_config(trajectory_file, tmp_path / "run", model=model))


def test_modes_that_cut_an_eigenspace_are_warned_of_once(trajectory_file, tmp_path, caplog):
    config = small_config(trajectory_file, tmp_path / "cut", max_steps=1)
    train(config)  # two modes of a triangle: 0, 3, 3
    train(replace(config, max_steps=2), resume=True)
    assert caplog.text.count("2 modes cut the eigenspace of eigenvalue 3, modes 1 to 2") == 1
    assert "3 modes are the nearest safe number" in caplog.text
    caplog.clear()
    train(small_config(trajectory_file, tmp_path / "whole", max_steps=1, model={"num_modes": 3}))
    assert "cut the eigenspace" not in caplog.text


def test_unknown_rigid_bonds_are_said(trajectory_file, tmp_path):
    config = small_config(trajectory_file, tmp_path / "run", data={"rigid_bonds": "caffeine"})
    with pytest.raises(ConfigError, match="`data.rigid_bonds`"):
        train(config)


@pytest.mark.parametrize("name", ["aspirin", "uracil"])
def test_sparse_real_md17_trains_and_evaluates(tmp_path, name):
    from gfnode_fast.training import evaluate

    folder = os.environ.get("GFNODE_MD17_DIR")
    if not folder:
        pytest.skip("GFNODE_MD17_DIR does not name the folder of the sparse MD17 files")
    config = small_config(
        Path(folder) / f"rmd17_sparse_{name}_firsthalf.npz",
        tmp_path / "run",
        data={
            "num_timesteps": 8,
            "delta_frame": 3000,
            "train_size": 40,
            "val_size": 10,
            "test_size": 20,
        },
        optim={"batch_size": 10, "epochs": 4},
    )
    result = train(config)
    assert result.status == "completed"
    losses = [row["loss"] for row in read_metrics(config.output) if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    report = evaluate(config.output)
    assert report.num_windows == 20
    assert np.isfinite(list(report.mse.values())).all()


def test_trajectories_with_gaps_have_their_own_times(tmp_path):
    whole = small_trajectory(900)
    rows = np.sort(np.random.default_rng(0).choice(900, 700, replace=False))
    sparse = Trajectory(
        positions=whole.positions[rows], numbers=whole.numbers, dt_fs=0.5, frames=rows
    )
    sparse.save(tmp_path / "sparse.npz")
    config = small_config(tmp_path / "sparse.npz", tmp_path / "run", max_steps=2)
    assert train(config).step == 2
