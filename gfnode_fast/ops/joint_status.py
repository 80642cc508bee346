"""How a joint solve on the device went: a record that the host reads where it waits anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gfnode_fast.solvers.errors import SolverError

MAX_ATTEMPTS = 16  # dopri5 with the published tolerances takes 2 to 4 where ‖W‖ <= 3
LARGEST_RAISE = 8
RUNNING, DONE, NOT_FINITE, UNDERFLOW, BAD_TIME = 0, 1, 2, 3, 4


def check_max_attempts(op: str, max_attempts: object) -> None:
    """Refuse what is no number of attempts to launch."""
    if isinstance(max_attempts, bool) or not isinstance(max_attempts, int):
        raise TypeError(
            f"{op}: `max_attempts` must be an int, got {type(max_attempts).__name__}; pass e.g. 64"
        )
    if max_attempts < 1:
        raise ValueError(
            f"{op}: `max_attempts` must be at least 1, got {max_attempts}; pass e.g. 64"
        )


def finished(device: torch.device) -> Tensor:
    """The record of a solve about which nothing more is known than that it arrived."""
    record = torch.zeros(8, dtype=torch.float64, device=device)
    record[3].fill_(DONE)  # not assigned, which would copy a number from the host
    return record


def with_times_checked(record: Tensor, times: Tensor, last: Tensor) -> Tensor:
    """The record with `last` (0-dim), the largest of the times (B, T), and a status of its own if
    one of them is not positive and finite.
    """
    good = ((times > 0) & (times < float("inf"))).all()
    code = record[3:4].where(good, BAD_TIME)
    return torch.cat((record[:3], code, record[4:6], last.view(1), record[7:]))


def ran_out(record: Sequence[float]) -> bool:
    """Whether a solve had made its attempts before it arrived."""
    return record[3] == RUNNING


def attempts_to_launch(record: Sequence[float]) -> int:
    """How many attempts the solve after one with this record should be given.

    Twice what that one made, or a quarter more than it would have made at the pace at which it ran
    out; a power of two, so that memory is asked for in few sizes, and at least `MAX_ATTEMPTS`.
    """
    time, _, _, _, _, made, last, _ = record
    wanted = 2 * made
    if ran_out(record):
        pace = last / time if time > 0 else LARGEST_RAISE
        wanted = max(wanted, 1.25 * made * min(pace, LARGEST_RAISE))
    return max(MAX_ATTEMPTS, 1 << (math.ceil(wanted) - 1).bit_length())


def check_joint_status(
    status: Tensor,
    bad: Tensor | None = None,
    *,
    op: str = "propagate_joint",
    components: int = 1,
    learns: bool = False,
) -> None:
    """Raise if a solve failed; reads `status` on the host.

    Args:
        status: (8,) float64 from `propagate_joint` or `propagate_attention`.
        bad: (B·D,) int32, 1 for rows that were not finite; read only when the solve failed.
        op: name of the operation, for the message.
        components: D.
        learns: whether the next solve is given more attempts, for the message.

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: a solve that did not arrive.
    """
    record = status.tolist()
    time, step, _, code, _, made, last, _ = record
    if code == DONE:
        return
    if code == BAD_TIME:
        raise ValueError(
            f"{op}: `times` must be positive and finite, got others; time 0 is the given state"
        )
    rows = [] if bad is None else bad.nonzero().flatten().tolist()
    molecules = sorted({row // components for row in rows})
    shown = f" in molecule(s) {molecules[:8]}{' ...' if len(molecules) > 8 else ''}"
    wanted = attempts_to_launch(record)
    remedies = [f"pass max_attempts={wanted}", "loosen rtol and atol", "use backend='torch'"]
    if learns:
        remedies.insert(0, f"solve again ({wanted} will be launched)")
    problem = {
        RUNNING: f"had made its {made:.0f} attempts on the way to {last:.6g}; "
        f"{', '.join(remedies[:-1])} or {remedies[-1]}",
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
