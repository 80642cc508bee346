"""One training step: captured or plain the same bits, and nothing read from the device."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gfnode_fast import FourierMD
from gfnode_fast.ops import triton_solve
from gfnode_fast.training import ConfigError, TrainConfig, train
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.problem import build_model
from gfnode_fast.training.ranks import Ranks
from gfnode_fast.training.step import BatchStep
from run_comparison import assert_same_run
from small_run import mixed_config, mixed_files, small_config

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


class TestNothingIsRead:
    """Steps on torch's meta device, whose tensors have no values: whatever a step would read from
    the device, or copy from it to the host, raises.

    What it cannot see: what kernels and the operators around them do on a real device (here their
    fake implementations run), the deferred report of a solve (`SolveStats.expect`, which waits for
    nothing on a GPU and always on other devices), and branches on `is_cuda`.
    """

    @pytest.fixture(autouse=True)
    def _meta_as_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What of torch and this package asks for the kind of the device."""
        torch_optim = importlib.import_module("torch.optim.optimizer")
        name = "_get_fused_kernels_supported_devices"
        served = getattr(torch_optim, name)()
        monkeypatch.setattr(torch_optim, name, lambda: [*served, "meta"])
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        monkeypatch.setattr(FourierMD, "_reads_times", lambda _: False)
        monkeypatch.setattr(triton_solve, "_expect", lambda *_: None)

    def steps(self, trajectory_file: Path, backend: str, **changes: Any) -> None:
        recipe = {**RECIPE, "model": RECIPE["model"] | {"backend": backend}}
        for name, values in changes.items():
            recipe[name] = recipe.get(name, {}) | values if isinstance(values, dict) else values
        config = small_config(trajectory_file, Path("unused"), log_every=10, **recipe)
        step = made(config, "meta")
        index = torch.zeros(7, dtype=torch.int64, device="meta")
        for number, batch in enumerate((*index.split(4), index[:4])):
            step(batch, number, 0)

    @pytest.mark.parametrize("solver_mode", ["joint", "exact"])
    @pytest.mark.parametrize("changes", [{"optim": {"accumulate": 2}}, {"capture": True}], ids=str)
    def test_by_a_step(
        self, trajectory_file: Path, solver_mode: str, changes: dict[str, Any]
    ) -> None:
        self.steps(trajectory_file, "triton", **{"model": {"solver_mode": solver_mode}} | changes)

    def test_by_a_step_on_several_molecules(self, tmp_path: Path) -> None:
        model = {"backend": "triton", "solver_mode": "joint"}
        config = mixed_config(mixed_files(tmp_path), Path("unused"), model=model, log_every=10)
        step = made(config, "meta")
        for number in range(2):
            step(torch.arange(5), number, 0)

    def test_a_step_that_reads_is_noticed(self, trajectory_file: Path) -> None:
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            self.steps(trajectory_file, "torch")


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
