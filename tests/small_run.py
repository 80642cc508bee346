"""A trajectory of ethanol's heavy atoms and a model so small that tests can train it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from gfnode_fast.data import Batch, Trajectory, WindowDataset
from gfnode_fast.training import DataConfig, ModelConfig, OptimConfig, TrainConfig

NUM_TIMES = 4
HORIZON = 20


def small_trajectory(num_frames: int = 400, *, seed: int = 0) -> Trajectory:
    """C-C-O with smooth vibrations, (F, 3, 3) Å; no run of xTB is needed for it."""
    rng = np.random.default_rng(seed)
    rest = np.array([[0.0, 0.0, 0.0], [1.52, 0.0, 0.0], [2.0, 1.35, 0.0]])
    time = np.arange(num_frames)[:, None, None]
    period = rng.uniform(40.0, 90.0, (1, 3, 3))
    phase = rng.uniform(0.0, 2 * np.pi, (1, 3, 3))
    positions = rest + 0.05 * np.sin(2 * np.pi * time / period + phase)
    return Trajectory(
        positions=positions.astype(np.float32), numbers=np.array([6, 6, 8]), dt_fs=0.5
    )


def small_config(
    trajectory: Path, output: Path, *, data: Any = None, model: Any = None, optim: Any = None,
    **run: Any,
) -> TrainConfig:  # fmt: skip
    """Two steps of four windows an epoch, 1 + 1 layers of width 8; 6 epochs in about a second."""
    config = TrainConfig(
        data=DataConfig(
            trajectory=str(trajectory),
            num_timesteps=NUM_TIMES,
            delta_frame=HORIZON,
            train_size=8,
            val_size=4,
            test_size=5,
        ),
        model=ModelConfig(n_layers=1, hidden_nf=8, num_modes=2, time_emb_dim=4),
        optim=OptimConfig(lr=1e-3, batch_size=4, epochs=6, validate_every=2, lr_step_epochs=2),
        output=str(output),
        device="cpu",
        log_every=2,
        checkpoint_every=2,
    )
    return replace(
        config,
        data=replace(config.data, **(data or {})),
        model=replace(config.model, **(model or {})),
        optim=replace(config.optim, **(optim or {})),
        **run,
    )


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


def mixed_files(directory: Path) -> list[str]:
    """Trajectories of the two molecules, ethanol's and the chain's."""
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
        model={"solver_mode": "exact", **(model or {})},
        **changes,
    )


def nan_trajectory_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The batch of one optimiser step gets a NaN target."""
    original, calls = WindowDataset.batch, list[int]()

    def batch(self: WindowDataset, index: Tensor) -> Batch:
        found = original(self, index)
        if len(self) == 8:
            calls.append(1)
            if len(calls) == step:
                found = found._replace(target=found.target * float("nan"))
        return found

    monkeypatch.setattr(WindowDataset, "batch", batch)
