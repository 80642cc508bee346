"""What one update does: loss, parts, rate, clipping, average, decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gfnode_fast import reference
from gfnode_fast.training import OptimConfig, load_model, read_metrics, train
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.optimizer import GuardedAdam, learning_rate
from gfnode_fast.training.order import epoch_order
from gfnode_fast.training.problem import build_model
from small_run import small_config


def test_the_loss_is_the_published_one(trajectory_file, tmp_path):
    """The first reading equals the MSE of the untouched reference model on the first batch."""
    from gfnode_fast.training.problem import load_problem

    config = small_config(trajectory_file, tmp_path / "run", log_every=1, max_steps=1)
    train(config)
    problem = load_problem(config.data)
    dataset = problem.dataset("train", dtype=torch.float32, device=torch.device("cpu"))
    batch = dataset.batch(epoch_order(0, 0, [8])[:4])
    torch.manual_seed(config.optim.seed)
    model = reference.FourierMD(
        1, 2, 5, 8, with_v=True, num_modes=2, num_timesteps=4, time_emb_dim=4, num_atoms=3,
        delta_frame=20, fourier_basis="graph",
    )  # fmt: skip
    expected = torch.nn.functional.mse_loss(model(**batch.inputs())[0], batch.target)
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_parts_of_a_batch_make_the_same_update(trajectory_file, tmp_path):
    exact = {"solver_mode": "exact"}  # joint steps would follow from the molecules run together
    for parts in (1, 3):
        options = {"accumulate": parts, "dtype": "float64"}
        train(small_config(trajectory_file, tmp_path / str(parts), model=exact, optim=options))
    whole, parted = (read_checkpoint(tmp_path / n / "last.json").model for n in ("1", "3"))
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=1e-6, atol=1e-9)


def test_rate_is_scaled_warmed_up_and_decayed(trajectory_file, tmp_path):
    optim = {"lr": 1e-3, "lr_scaling": "sqrt", "warmup_steps": 4, "batch_size": 4}
    train(small_config(trajectory_file, tmp_path / "run", optim=optim))
    rates = {r["step"]: r["lr"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"}
    full = 1e-3 * (4 / 50) ** 0.5
    assert rates[2] == pytest.approx(full * 3 / 4)  # of the update to come
    assert rates[4] == pytest.approx(full)
    assert rates[12] == pytest.approx(full / 4)  # halved every second of 6 epochs
    linear = OptimConfig(lr=1e-3, lr_scaling="linear", batch_size=200)
    assert learning_rate(linear, 0, 0) == pytest.approx(4e-3)


def test_gradients_are_clipped_to_the_norm(trajectory_file, tmp_path, monkeypatch):
    norms = []

    def watched(self: GuardedAdam, ok: torch.Tensor) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.nn.utils.get_total_norm([g for g in gradients if g is not None])))

    monkeypatch.setattr(GuardedAdam, "guarded_step", watched)
    for name, limit in (("free", None), ("far", 1e6), ("clipped", 0.01)):
        config = small_config(trajectory_file, tmp_path / name, optim={"clip_norm": limit})
        train(replace(config, max_steps=1))
    free, far, clipped = norms
    assert free == far > 0.02
    assert clipped == pytest.approx(0.01, rel=1e-3)
    read = [r["grad_norm"] for r in read_metrics(tmp_path / "clipped") if r["kind"] == "train"]
    assert all(norm == pytest.approx(free) for norm in read)  # as it was before clipping


def test_average_of_the_weights_is_validated_and_kept(trajectory_file, tmp_path):
    seen = []
    config = small_config(trajectory_file, tmp_path / "run", optim={"ema_decay": 0.5})
    for step in range(1, 13):
        train(replace(config, max_steps=step), resume=step > 1)
        seen.append(read_checkpoint(tmp_path / "run" / "last.json"))
    torch.manual_seed(config.optim.seed)
    average = dict(build_model(config, 3).state_dict())
    for number, checkpoint in enumerate(seen, start=1):
        weight = 1 - min(0.5, number / (number + 9))
        for name, value in checkpoint.model.items():
            average[name] = average[name].lerp(value, weight)
        kept = checkpoint.section("average")
        torch.testing.assert_close(kept, {name: average[name] for name in kept})
    best = read_checkpoint(tmp_path / "run" / "best.json")
    epoch = best.manifest["position"]["best_epoch"]
    then = seen[2 * epoch - 1].section("average")
    assert all(torch.equal(best.model[name], then[name]) for name in then)


def test_adamw_decays_apart_from_the_gradient(trajectory_file, tmp_path):
    first = {}
    for name in ("adam", "adamw"):
        optim = {"optimizer": name, "weight_decay": 0.5, "lr": 0.1}
        train(small_config(trajectory_file, tmp_path / name, optim=optim, max_steps=1))
        first[name] = read_checkpoint(tmp_path / name / "last.json")
    torch.manual_seed(0)
    start = dict(build_model(small_config(trajectory_file, tmp_path / "x"), 3).named_parameters())
    name = next(iter(start))  # index 0 of the optimizer
    moments = first["adamw"].section("optimizer")
    gradient = moments["0.exp_avg"] / 0.1  # 1 - beta1
    assert gradient.shape == start[name].shape
    expected = start[name] * (1 - 0.1 * 0.5) - 0.1 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(first["adamw"].model[name], expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(first["adam"].model[name], expected)


def test_double_precision(trajectory_file, tmp_path):
    train(small_config(trajectory_file, tmp_path / "run", optim={"dtype": "float64"}, max_steps=1))
    trained = load_model(tmp_path / "run", device="cpu")
    assert trained.dtype == torch.float64
    for key, value in read_checkpoint(tmp_path / "run").model.items():
        assert torch.equal(trained.model.state_dict()[key], value)  # not rounded on the way
