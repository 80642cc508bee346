from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
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
from gfnode_fast.data import Trajectory, WindowDataset
from gfnode_fast.nn import FourierMD
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.training import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    OptimConfig,
    load_model,
    read_metrics,
    train,
)
from gfnode_fast.training import loop as loop_module
from gfnode_fast.training.checkpoint import read_checkpoint, write_checkpoint
from gfnode_fast.training.optimizer import GuardedAdam, learning_rate
from gfnode_fast.training.order import epoch_order
from gfnode_fast.training.problem import build_model
from run_comparison import assert_same_run
from small_run import small_config, small_trajectory

VAE = {"use_vae": True}


RECIPES = {
    "plain": {},
    "vae": {"model": {"use_vae": True}},
    "large batch": {
        "optim": {"optimizer": "adamw", "weight_decay": 0.01, "lr_scaling": "sqrt",
                  "warmup_steps": 5, "clip_norm": 0.1, "accumulate": 2, "ema_decay": 0.8},
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=RECIPES)
def uninterrupted(request, trajectory_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("uninterrupted") / "run"
    recipe = RECIPES[request.param]
    result = train(small_config(trajectory_file, output, **recipe))
    return recipe, output, result


# 12 steps in all, 2 an epoch, validation every 2 epochs, a reading every 2 steps: 3 and 7 lie in
# the middle of an epoch and of a reading, 4 between an epoch's end and its validation's epoch.
@pytest.mark.parametrize("stops", [(1,), (3,), (4,), (8,), (11,), (3, 7)])
def test_resumed_equals_uninterrupted(uninterrupted, trajectory_file, tmp_path, stops):
    recipe, whole, expected = uninterrupted
    config = small_config(trajectory_file, tmp_path / "run", **recipe)
    resume = False
    for stop in stops:
        torch.manual_seed(stop)  # whatever the process did before must not matter
        result = train(replace(config, max_steps=stop), resume=resume)
        assert (result.status, result.step) == ("max_steps", stop)
        resume = True
    torch.manual_seed(99)
    result = train(config, resume=True)
    assert result.status == "completed"
    timeless = {"seconds": 0.0, "total_seconds": 0.0}
    assert replace(result, output=whole, **timeless) == replace(expected, **timeless)
    assert_same_run(whole, tmp_path / "run")


_KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
from run_comparison import assert_same_run
from small_run import small_config
import torch
torch.set_num_threads(1)
from gfnode_fast.training import train
def kill(event):
    if event.step == {step} and event.kind == "train":
        os.kill(os.getpid(), signal.{signal})
train(small_config(Path({trajectory!r}), Path({output!r})), progress=kill)
"""


@pytest.mark.parametrize("uninterrupted", ["plain"], indirect=True)
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -signal.SIGKILL), ("SIGTERM", 0)])
def test_a_killed_process_resumes_exactly(uninterrupted, trajectory_file, tmp_path, name, code):
    _, whole, _ = uninterrupted
    output = tmp_path / "run"
    script = _KILLED.format(
        helpers=str(Path(__file__).parents[1]),
        step=6,
        signal=name,
        trajectory=str(trajectory_file),
        output=str(output),
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=120)
    assert done.returncode == code
    # SIGTERM stops after the step at hand; SIGKILL goes back to the last checkpoint.
    stored = read_checkpoint(output / "last.json").manifest["position"]["step"]
    assert stored == (4 if name == "SIGKILL" else 6)
    train(small_config(trajectory_file, output), resume=True)
    assert_same_run(whole, output)


def test_ctrl_c_leaves_a_resumable_run_and_the_handlers_as_they_were(
    uninterrupted, trajectory_file, tmp_path
):
    recipe, whole, _ = uninterrupted
    config = small_config(trajectory_file, tmp_path / "run", **recipe)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(event):
        if event.step == 6 and event.kind == "train":
            os.kill(os.getpid(), signal.SIGINT)

    result = train(config, progress=interrupt)
    assert result.status == "interrupted"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    train(config, resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_thread_can_train(trajectory_file, tmp_path):
    results = []
    config = small_config(trajectory_file, tmp_path / "run", max_steps=1)
    thread = threading.Thread(target=lambda: results.append(train(config)))
    thread.start()
    thread.join()
    assert results[0].status == "max_steps"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"optim": {"lr": 1e-2}}, r"optim.lr: 0.001 -> 0.01"),
        ({"data": {"seed": 5}}, r"data.seed: 0 -> 5"),
        ({"model": {"rtol": 1e-4}}, r"model.rtol"),
        ({"optim": {"epochs": 9}}, r"optim.epochs"),
    ],
)
def test_resume_refuses_a_changed_config(trajectory_file, tmp_path, changes, name):
    train(small_config(trajectory_file, tmp_path / "run", max_steps=1))
    with pytest.raises(ConfigError, match=name):
        train(small_config(trajectory_file, tmp_path / "run", **changes), resume=True)


def test_resume_refuses_changed_data(tmp_path):
    path = tmp_path / "moving.npz"
    small_trajectory().save(path)
    train(small_config(path, tmp_path / "run", max_steps=1))
    small_trajectory(seed=1).save(path)
    with pytest.raises(CheckpointError, match="another trajectory"):
        train(small_config(path, tmp_path / "run"), resume=True)


def test_resume_refuses_other_windows(trajectory_file, tmp_path, monkeypatch):
    from gfnode_fast.training import problem

    config = small_config(trajectory_file, tmp_path / "run", max_steps=1)
    train(config)
    draw = problem.draw_windows
    monkeypatch.setattr(problem, "draw_windows", lambda t, **kw: draw(t, **(kw | {"seed": 7})))
    with pytest.raises(CheckpointError, match="another windows"):
        train(config, resume=True)


def test_resume_refuses_another_kind_of_device(trajectory_file, tmp_path):
    """Its random state and rounding are others."""
    config = small_config(trajectory_file, tmp_path / "run", max_steps=1)
    train(config)
    stored = read_checkpoint(tmp_path / "run" / "last.json")
    manifest = {k: v for k, v in stored.manifest.items() if k not in ("files", "format", "version")}
    write_checkpoint(
        tmp_path / "run",
        "last",
        model=stored.model,
        state=stored.state,
        manifest=manifest | {"device": "cuda"},
    )
    with pytest.raises(ConfigError, match=r"`device` must be of the kind .* \(cuda\), got cpu"):
        train(config, resume=True)


def test_resume_uses_the_stored_basis(trajectory_file, tmp_path, monkeypatch, uninterrupted):
    """Another LAPACK may flip signs: still the same run."""
    from gfnode_fast.training import problem

    recipe, whole, _ = uninterrupted
    config = small_config(trajectory_file, tmp_path / "run", **recipe)
    train(replace(config, max_steps=3))
    build = problem.build_graph

    def flipped(*args, **kwargs):
        graph = build(*args, **kwargs)
        return replace(graph, eigvecs=-graph.eigvecs)

    monkeypatch.setattr(problem, "build_graph", flipped)
    train(config, resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_a_run_is_not_overwritten_and_none_is_not_resumed(trajectory_file, tmp_path):
    config = small_config(trajectory_file, tmp_path / "run", max_steps=1)
    with pytest.raises(CheckpointError, match="does not exist"):
        train(config, resume=True)
    train(config)
    with pytest.raises(ConfigError, match="`output` must not hold a run already"):
        train(config)


def test_a_run_can_be_resumed_from_its_very_start(trajectory_file, tmp_path):
    config = small_config(trajectory_file, tmp_path / "run")

    def crash(event):
        if event.kind == "train":
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train(config, progress=crash)
    assert train(config, resume=True).status == "completed"


def test_windows_of_a_split_file_give_the_same_run(uninterrupted, trajectory_file, tmp_path):
    recipe, whole, expected = uninterrupted
    config = small_config(
        trajectory_file,
        tmp_path / "run",
        **recipe,
        data={"split_file": str(whole / "windows.json")},
    )
    assert train(config).best_mse == expected.best_mse
    with pytest.raises(ConfigError, match="`data.split_file` must have windows of 3 times"):
        train(replace(config, output=str(tmp_path / "x"),
                      data=replace(config.data, num_timesteps=3)))  # fmt: skip


def nan_trajectory_step(monkeypatch, step: int) -> None:
    """The batch of one optimiser step gets a NaN target."""
    original, calls = WindowDataset.batch, []

    def batch(self, index):
        found = original(self, index)
        if len(self) == 8:
            calls.append(1)
            if len(calls) == step:
                found = found._replace(target=found.target * float("nan"))
        return found

    monkeypatch.setattr(WindowDataset, "batch", batch)


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


def test_the_run_goes_on_exactly_once_the_cause_is_gone(
    uninterrupted, trajectory_file, tmp_path, monkeypatch
):
    recipe, whole, _ = uninterrupted
    config = small_config(trajectory_file, tmp_path / "run", **recipe)
    with monkeypatch.context() as patch:
        nan_trajectory_step(patch, 7)
        with pytest.raises(NonFiniteLossError):
            train(config)
    train(config, resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_non_finite_loss_is_found_before_a_checkpoint_is_written(
    trajectory_file, tmp_path, monkeypatch
):
    config = small_config(trajectory_file, tmp_path / "run", log_every=1000, checkpoint_every=1)
    nan_trajectory_step(monkeypatch, 3)
    with pytest.raises(NonFiniteLossError, match="step 3"):
        train(config)
    assert read_checkpoint(tmp_path / "run" / "last.json").manifest["position"]["step"] == 2


@pytest.mark.parametrize(
    "failure",
    [
        AssertionError("underflow in dt nan"),  # torchdiffeq's
        SolverError("dopri5: underflow in dt nan", time=0.0, step=0.0, rows=[]),
    ],
)
@pytest.mark.parametrize(
    ("training", "where"), [(True, "at step 1;"), (False, "in the validation after step 4;")]
)
def test_a_failed_solve_is_reported_with_its_step(
    trajectory_file, tmp_path, monkeypatch, failure, training, where
):
    forward = FourierMD.forward

    def fail(self, *args, **kwargs):
        if self.training == training:
            raise failure
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(FourierMD, "forward", fail)
    with pytest.raises(NonFiniteLossError, match=f"underflow in dt nan.* {where}"):
        train(small_config(trajectory_file, tmp_path / "run"))
    read_checkpoint(tmp_path / "run" / "last.json")


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
    train(small_config(trajectory_file, tmp_path / "run", model=VAE, max_steps=2))
    assert torch.equal(torch.get_rng_state(), before)


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
