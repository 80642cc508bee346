"""Losses that are not finite and solves that fail: the run stops, its checkpoint stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchdiffeq import odeint

from gfnode_fast.nn import FourierMD
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.training import NonFiniteLossError, TrainConfig, load_model, train
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.optimizer import GuardedAdam
from gfnode_fast.training.step import naming_failed_solves
from small_run import nan_trajectory_step, small_config

VAE = {"use_vae": True}


def test_non_finite_loss_stops_at_the_next_reading_and_spares_the_checkpoint(
    trajectory_file, tmp_path, monkeypatch
):
    config = small_config(trajectory_file, tmp_path / "run", log_every=4)
    nan_trajectory_step(monkeypatch, 7)
    steps = []
    with pytest.raises(NonFiniteLossError, match=r"`loss` must be finite, got nan .* at step 7;"):
        train(config, progress=lambda event: steps.append(event.step))
    assert max(steps) == 4  # the reading at step 8 is the one that raised
    last = read_checkpoint(tmp_path / "run" / "last.json")
    assert last.manifest["position"]["step"] == 4
    assert all(torch.isfinite(tensor).all() for tensor in last.model.values())


def test_non_finite_loss_is_found_before_a_checkpoint_is_written(
    trajectory_file, tmp_path, monkeypatch
):
    config = small_config(trajectory_file, tmp_path / "run", log_every=1000, checkpoint_every=1)
    nan_trajectory_step(monkeypatch, 3)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        train(config)
    assert read_checkpoint(tmp_path / "run" / "last.json").manifest["position"]["step"] == 2


def fail_ours():
    raise SolverError("dopri5: underflow in dt nan", time=0.0, step=0.0, rows=[])


def fail_torchdiffeqs():
    odeint(lambda t, y: y * float("nan"), torch.ones(1), torch.tensor([0.0, 1.0]))


def fail_torchdiffeqs_state():
    odeint(lambda t, y: y, torch.tensor([float("nan")]), torch.tensor([0.0, 1.0]),
           options={"first_step": 0.1})  # fmt: skip


@pytest.mark.parametrize(
    ("failure", "training", "said"),
    [
        (fail_ours, True, "underflow in dt nan.* at step 1;"),
        (fail_ours, False, "underflow in dt nan.* in the validation after step 4;"),
        (fail_torchdiffeqs, True, "underflow in dt.* at step 1;"),
        (fail_torchdiffeqs_state, True, "non-finite values in state.* at step 1;"),
    ],
)
def test_a_failed_solve_is_reported_with_its_step(
    trajectory_file, tmp_path, monkeypatch, failure, training, said
):
    forward = FourierMD.forward

    def fail(self, *args, **kwargs):
        if self.training == training:
            failure()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FourierMD, "forward", fail)
    with pytest.raises(NonFiniteLossError, match=f"(?s){said}"):
        train(small_config(trajectory_file, tmp_path / "run"))
    read_checkpoint(tmp_path / "run" / "last.json")


def assert_in_a_right_hand_side():
    def dynamics(t, y):
        raise AssertionError("underflow in dt of somebody else")

    odeint(dynamics, torch.ones(1), torch.tensor([0.0, 1.0]))


def assert_in_torchdiffeq():
    odeint(lambda t, y: y, torch.ones(1), torch.tensor([0.0, 0.0]))


@pytest.mark.parametrize("failure", [assert_in_a_right_hand_side, assert_in_torchdiffeq])
def test_other_assertions_pass_as_they_are(failure):
    with pytest.raises(AssertionError) as expected:
        failure()
    with pytest.raises(AssertionError) as found, naming_failed_solves(TrainConfig(), "at step 1"):
        failure()
    assert str(found.value) == str(expected.value)


def test_guarded_adam_leaves_everything_as_it_was():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = GuardedAdam([parameter], lr=0.1, weight_decay=0.0)
    plain = torch.nn.Parameter(torch.ones(3))
    plain_adam = torch.optim.Adam([plain], lr=0.1)
    for k, ok in enumerate((True, False, True)):
        parameter.grad = torch.full((3,), float(k + 1) if ok else float("nan"))
        optimizer.guarded_step(torch.tensor(ok))
        if ok:
            plain.grad = parameter.grad.clone()
            plain_adam.step()
    torch.testing.assert_close(parameter, plain)
    assert optimizer.state[parameter]["step"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("model", [{}, VAE], ids=["plain", "vae"])
def test_training_on_a_gpu_resumes_and_guards(trajectory_file, tmp_path, monkeypatch, model):
    config = small_config(trajectory_file, tmp_path / "run", model=model, device="cuda")
    assert train(replace(config, max_steps=5)).status == "max_steps"
    with monkeypatch.context() as patch:
        nan_trajectory_step(patch, 2)
        with pytest.raises(NonFiniteLossError, match="at step 7;"):
            train(config, resume=True)
    assert train(config, resume=True).status == "completed"
    assert load_model(tmp_path / "run", device="cuda").device.type == "cuda"
