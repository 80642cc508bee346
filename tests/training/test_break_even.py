"""Whether compiling pays back: the arithmetic, the sentence, and a run that is none the wiser."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gfnode_fast.solvers import compiled
from gfnode_fast.training import TrainEvent, break_even, train
from gfnode_fast.training.break_even import BreakEven, measure_break_even
from gfnode_fast.training.step import BatchStep
from run_comparison import assert_same_run
from small_run import small_config


class Clock:
    """Time that passes in steps alone: 40 s to compile, then 60 or 95 ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.model: Any = torch.nn.Linear(1, 1)
        self.model.backend = "compiled"
        self.is_compiled = False

    def step(self) -> None:
        if self.model.backend == "compiled":
            self.now += 0.060 if self.is_compiled else 40.060
            self.is_compiled = True
        else:
            self.now += 0.095


def test_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(break_even, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    found = measure_break_even(clock.model, clock.step)
    assert asdict(found) == pytest.approx(
        {"compile_seconds": 40.0, "compiled_seconds": 0.060, "plain_seconds": 0.095}
    )
    assert found.steps == 1143
    assert clock.model.backend == "compiled"


def test_sentences() -> None:
    pays = BreakEven(40.0, 0.060, 0.095)
    assert pays.sentence() == (
        "compiling took 40 s; forward and backward take 60 ms instead of 95 ms: "
        "pays back after 1143 steps"
    )
    assert pays.sentence(5000) == pays.sentence()
    assert pays.sentence(1000).endswith(
        "steps, and 1000 are to go; model.backend=auto is the better choice"
    )
    never = BreakEven(40.0, 0.095, 0.060)
    assert never.steps is None
    assert never.sentence(5000).endswith(
        "does not pay back; model.backend=auto is the better choice"
    )


def test_a_run_says_it_and_is_the_same(
    trajectory_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "_GRAPHS", {})
    events: list[TrainEvent] = []
    recipe: dict[str, Any] = {
        "model": {"backend": "compiled", "use_vae": True, "num_modes": 3},
        "optim": {"epochs": 1, "validate_every": 1, "accumulate": 2},
    }
    config = small_config(trajectory_file, tmp_path / "measured", **recipe)
    train(config, progress=events.append)
    assert [event.kind for event in events[:3]] == ["start", "compile", "compile"]
    assert events[2].note.startswith("compiling took ")
    assert events[2].values.keys() == asdict(BreakEven(0, 0, 0)).keys()
    train(config, resume=True, progress=events.append)
    assert [event.kind for event in events[-2:]] == ["start", "end"]  # nothing left to compile for

    monkeypatch.setattr(BatchStep, "break_even", lambda _: BreakEven(0, 0, 0))
    train(small_config(trajectory_file, tmp_path / "not", **recipe))
    assert_same_run(tmp_path / "measured", tmp_path / "not")
