"""What a solve reports when it cannot go on."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class SolverError(RuntimeError):
    """A solve could not go on; the message says at which time, with which step, and for whom.

    Attributes:
        time: normalised time s at which the solve stopped.
        step: size of the step that was tried.
        rows: molecules (or rows of the state) whose values are not finite; empty for an underflow.
    """

    def __init__(self, message: str, *, time: float, step: float, rows: list[int]) -> None:
        super().__init__(message)
        self.time = time
        self.step = step
        self.rows = rows


def check_state(solver: str, y: Tensor, time: float, step: float, components: int) -> None:
    """Raise SolverError if the state y (R, M, C) at `time` is not finite; rows are B *
    components.
    """
    finite = torch.isfinite(y).flatten(1).all(dim=1)
    if not finite.all():
        rows = sorted({row // components for row in (~finite).nonzero().flatten().tolist()})
        raise SolverError(
            f"{solver}: the state must be finite, got non-finite values at s = {time:.6g} "
            f"(step {step:.3g}) in molecule(s) {rows[:8]}{' ...' if len(rows) > 8 else ''}; "
            "check these molecules' inputs, lower the learning rate, or tighten rtol and atol",
            time=time,
            step=step,
            rows=rows,
        )


def check_step(solver: str, time: float, step: float) -> None:
    """Raise SolverError if a step no longer advances time."""
    if not time + step > time:
        raise SolverError(
            f"{solver}: the step must advance time, got step {step:.3g} at s = {time:.6g}; the "
            "dynamics is too stiff here: loosen rtol and atol or use smaller weights",
            time=time,
            step=step,
            rows=[],
        )


def check_all_times(op: str, times: Tensor) -> None:
    """`check_times` of a tensor, which is read on the host."""
    check_times(op, *torch.stack(times.aminmax()).tolist())


def check_times(op: str, first: float, last: float) -> None:
    """Raise ValueError unless the smallest and the largest output time are positive and finite."""
    if not 0 < first <= last < math.inf:
        raise ValueError(
            f"{op}: `times` must be positive and finite, got {first:g} ... {last:g}; time 0 is "
            "the given state"
        )
