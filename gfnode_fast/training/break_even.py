"""Whether compiling the solves pays back within a run."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gfnode_fast.nn import FourierMD

STEPS = 5


@dataclass(frozen=True)
class BreakEven:
    """What compiling cost, and what forward and backward of a batch take with it and without, s.

    Attributes:
        compile_seconds: of the first step beyond a later one; little where torch's compiler finds
            its results on disk.
        compiled_seconds, plain_seconds: medians with ``backend="compiled"`` and "auto".
    """

    compile_seconds: float
    compiled_seconds: float
    plain_seconds: float

    @property
    def steps(self) -> int | None:
        """Steps after which the time spent on compiling is saved; None: never."""
        saved = self.plain_seconds - self.compiled_seconds
        return math.ceil(self.compile_seconds / saved) if saved > 0 else None

    def sentence(self, steps_to_go: int | None = None) -> str:
        """For people; with the steps that the run has yet to make, whether it is worth it."""
        text = (
            f"compiling took {self.compile_seconds:.0f} s; forward and backward take "
            f"{_milliseconds(self.compiled_seconds)} instead of "
            f"{_milliseconds(self.plain_seconds)}: "
        )
        if self.steps is None:
            return text + "does not pay back; model.backend=auto is the better choice"
        text += f"pays back after {self.steps} steps"
        if steps_to_go is not None and self.steps > steps_to_go:
            text += f", and {steps_to_go} are to go; model.backend=auto is the better choice"
        return text


def measure_break_even(model: FourierMD, step: Callable[[], object]) -> BreakEven:
    """Time a step of a model with ``backend="compiled"``, the first of which compiles, and "auto".

    Args:
        model: with ``backend="compiled"``, which it has again afterwards.
        step: one step of it, which must leave parameters and random state alone.
    """
    first = _seconds(model, step)
    compiled = statistics.median(_seconds(model, step) for _ in range(STEPS))
    with _plain(model):
        _seconds(model, step)
        plain = statistics.median(_seconds(model, step) for _ in range(STEPS))
    return BreakEven(max(0.0, first - compiled), compiled, plain)


@contextlib.contextmanager
def _plain(model: FourierMD) -> Iterator[None]:
    backend, model.backend = model.backend, "auto"
    try:
        yield
    finally:
        model.backend = backend


def _seconds(model: FourierMD, step: Callable[[], object]) -> float:
    device = next(model.parameters()).device
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
