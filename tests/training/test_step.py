"""One training step: captured or plain the same bits. What it waits for: test_device_placement."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnode_fast.training import ConfigError, TrainConfig, train
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.problem import build_model
from gfnode_fast.training.ranks import Ranks
from gfnode_fast.training.step import BatchStep
from run_comparison import assert_same_run
from small_run import small_config

RECIPE: dict[str, Any] = {
    "model": {"use_vae": True, "num_modes": 3},
    "optim": {"optimizer": "adamw", "clip_norm": 0.1, "ema_decay": 0.8, "epochs": 3},
    "data": {"train_size": 7},  # two batches an epoch, the last one smaller
}


def made(config: TrainConfig, device: str, ranks: Ranks | None = None) -> BatchStep:
    molecules = Molecules(config)
    data = molecules.dataset("train", dtype=torch.float32, device=torch.device(device))
    model = build_model(config, molecules.num_atoms).to(device)
    return BatchStep(config, model, data, ranks or Ranks())


def test_captured_on_the_cpu_is_the_plain_run(trajectory_file: Path, tmp_path: Path) -> None:
    plain = small_config(trajectory_file, tmp_path / "plain", **RECIPE)
    train(plain)
    captured = replace(plain, output=str(tmp_path / "captured"), capture=True)
    train(replace(captured, max_steps=3))
    train(captured, resume=True)
    assert_same_run(tmp_path / "plain", tmp_path / "captured")


def test_what_cannot_be_captured_is_refused(trajectory_file: Path, tmp_path: Path) -> None:
    config = small_config(trajectory_file, tmp_path / "run", capture=True)
    with pytest.raises(ConfigError, match=r"`capture` must be false with optim.accumulate \(2\)"):
        replace(config, optim=replace(config.optim, accumulate=2))
    with pytest.raises(ConfigError, match="`capture` must be false with this run.* 2 processes"):
        made(config, "cpu", Ranks(0, 2))


@pytest.mark.gpu
class TestCapture:
    def test_replays_resume_exactly(self, trajectory_file: Path, tmp_path: Path) -> None:
        recipe = {**RECIPE, "model": RECIPE["model"] | {"backend": "triton"}}
        whole = small_config(trajectory_file, tmp_path / "a", device="cuda", capture=True, **recipe)
        train(whole)
        parts = replace(whole, output=str(tmp_path / "b"))
        train(replace(parts, max_steps=3))
        train(parts, resume=True)
        assert_same_run(tmp_path / "a", tmp_path / "b")

    def test_solves_that_read_are_refused(self, trajectory_file: Path, tmp_path: Path) -> None:
        config = small_config(trajectory_file, tmp_path / "run", device="cuda", capture=True)
        with pytest.raises(ConfigError, match="`capture` must be false with this run.* joint"):
            made(replace(config, model=replace(config.model, backend="torch")), "cuda")
