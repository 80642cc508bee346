"""What a training run tells its caller: while it goes on, at its end, and when it fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Status = Literal["completed", "early_stopped", "max_steps", "max_seconds", "interrupted"]
EventKind = Literal["start", "compile", "train", "validation", "end"]


class NonFiniteLossError(RuntimeError):
    """The loss or its gradient was not finite; the message names the step."""


@dataclass(frozen=True)
class TrainEvent:
    """What the progress callback gets, at every reading of the losses and every validation.

    Attributes:
        kind: ``start``, ``compile`` (twice, before and after it, with ``model.backend=compiled``),
            ``train`` (a reading), ``validation`` or ``end``.
        step, total_steps: optimiser steps made, and to make in all (``max_steps`` at most).
        epoch: passes completed.
        values: the numbers of the row just written to the metrics, if any; after compiling those
            of :class:`gfnode_fast.training.break_even.BreakEven`.
        note: a sentence to show, if any.
    """

    kind: EventKind
    step: int
    total_steps: int
    epoch: int
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


Callback = Callable[[TrainEvent], None]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        status: ``completed``, ``early_stopped``, or, resumable, ``max_steps``, ``max_seconds``,
            ``interrupted``.
        output: the run's directory.
        step, epoch: optimiser steps and passes made in all.
        best_mse, best_epoch: of the best validation, ``None`` before the first.
        seconds: wall-clock time of this call's training.
        total_seconds: of all calls' that led to this state.
    """

    status: Status
    output: Path
    step: int
    epoch: int
    best_mse: float | None
    best_epoch: int | None
    seconds: float
    total_seconds: float
