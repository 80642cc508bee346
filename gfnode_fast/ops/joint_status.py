"""How a joint solve on the device went: a record that the host reads where it waits anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.errors import SolverError

MAX_ATTEMPTS = 16
RUNNING, DONE, NOT_FINITE, UNDERFLOW, BAD_TIME = 0, 1, 2, 3, 4


def finished(device: torch.device) -> Tensor:
    """The record of a solve about which nothing more is known than that it arrived."""
    return torch.tensor([0, 0, 0, DONE, 0, 0, 0, 0], dtype=torch.float64, device=device)


def with_times_checked(record: Tensor, times: Tensor) -> Tensor:
    """The record, with a status of its own if a time is not positive and finite."""
    good = ((times > 0) & (times < float("inf"))).all()
    code = record[3:4].where(good, BAD_TIME)
    return torch.cat((record[:3], code, record[4:]))


def check_joint_status(
    status: Tensor, bad: Tensor | None = None, *, op: str = "propagate_joint", components: int = 1
) -> None:
    """Raise if a solve failed; reads `status` on the host.

    Args:
        status: (8,) float64 from `propagate_joint` or `propagate_attention`.
        bad: (B·D,) int32, 1 for rows that were not finite; read only when the solve failed.
        op: name of the operation, for the message.
        components: D.

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: a solve that did not arrive.
    """
    time, step, _, code, *_ = status.tolist()
    if code == DONE:
        return
    if code == BAD_TIME:
        raise ValueError(
            f"{op}: `times` must be positive and finite, got others; time 0 is the given state"
        )
    rows = [] if bad is None else bad.nonzero().flatten().tolist()
    molecules = sorted({row // components for row in rows})
    shown = f" in molecule(s) {molecules[:8]}{' ...' if len(molecules) > 8 else ''}"
    problem = {
        RUNNING: "needs more than its `max_attempts` attempts; raise it, loosen rtol and atol, or "
        "use backend='torch'",
        NOT_FINITE: f"met a state or error norm that is not finite{shown if molecules else ''}; "
        "check the inputs, lower the learning rate or tighten rtol and atol",
        UNDERFLOW: "met a step that no longer advances time; loosen rtol and atol or use smaller "
        "weights",
    }[int(code)]
    raise SolverError(
        f"{op}: the solve must arrive, but at s = {time:.6g} (step {step:.3g}) it {problem}",
        time=time,
        step=step,
        rows=molecules,
    )
