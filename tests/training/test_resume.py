"""Interrupted and resumed runs equal uninterrupted ones; what a resume refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gfnode_fast.training import CheckpointError, ConfigError, NonFiniteLossError, train
from gfnode_fast.training.checkpoint import read_checkpoint, write_checkpoint
from run_comparison import assert_same_run
from small_run import nan_trajectory_step, small_config, small_trajectory

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
