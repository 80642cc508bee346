"""torchdiffeq's steps, bit for bit.

With a rapidly oscillating time embedding (posenc, rope) the published step control is chaotic: a
rounding difference of 1e-16 in one step grows to one of 10 % in the step sizes forty steps later.
The published numbers then need the published arithmetic: the same operations, in the same order, on
the same memory layouts, the reference's own right-hand side included. This integrator does that;
the others are free to fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gfnode_fast.solvers.control import initial_step, next_step, rms_norm
from gfnode_fast.solvers.errors import check_state, check_step
from gfnode_fast.solvers.stage import stage_time
from gfnode_fast.solvers.tableau import Tableau, row_tensor

Accept = Callable[[Tensor, Tensor, float, float], None]
"""(y0 (M, R, C), stages (M, R, C, J), time, size) of an accepted step."""


def integrate_published(
    function: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    last: float,
    tableau: Tableau,
    rtol: float,
    atol: float,
    accept: Accept,
    components: int,
) -> tuple[int, int, bool]:
    """Step from 0 past `last`, calling `accept` for each accepted step.

    Args:
        function: the reference's right-hand side, (s 0-dim, y (M, R, C)) → (M, R, C).
        y0: (M, R, C), in the reference's memory layout.
        last: largest output time.
        tableau: an adaptive method.
        rtol, atol: tolerances.
        accept: called with each accepted step.
        components: rows per molecule, for messages.

    Returns:
        evaluations, rejected steps, and whether the first step was accepted.
    """
    evaluations = 0

    def evaluate(s: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return function(s, y)

    def scalar(value: float) -> Tensor:
        return torch.full((), value, dtype=torch.float64, device=y0.device).to(y0.dtype)

    check_state(tableau.name, y0.transpose(0, 1), 0.0, 0.0, components)
    f0 = evaluate(scalar(0.0), y0)
    step = initial_step(evaluate, y0, f0, tableau, rtol, atol).item()
    time, attempts, rejected, first_accepted = 0.0, 0, 0, False
    rtol_, atol_ = (torch.full((), t, dtype=torch.float64, device=y0.device) for t in (rtol, atol))
    while time < last:
        check_step(tableau.name, time, step)
        dt = scalar(step)
        k = y0.new_empty(*f0.shape, tableau.num_stages)
        k[..., 0] = f0
        y1 = y0
        for stage in range(1, tableau.num_stages):
            beta = row_tensor(tableau.beta[stage - 1], y0.dtype, y0.device)
            y1 = y0 + torch.sum(k[..., :stage] * (beta * dt), dim=-1).view_as(f0)
            when = scalar(stage_time(tableau, stage, time, step, y0.dtype))
            k[..., stage] = evaluate(when, y1)
        if not tableau.ends_on_last_stage:
            solution = row_tensor(tableau.solution, y0.dtype, y0.device)
            y1 = y0 + torch.sum(k * (dt * solution), dim=-1).view_as(f0)
        error = torch.sum(k * (dt * row_tensor(tableau.error, y0.dtype, y0.device)), dim=-1)
        tolerance = atol_ + rtol_ * torch.max(y0.abs(), y1.abs())
        ratio = rms_norm(error / tolerance).item()
        if not ratio < float("inf"):
            check_state(tableau.name, y1.transpose(0, 1), time, step, components)
        if ratio <= 1:
            first_accepted |= attempts == 0
            accept(y0, k, time, step)
            time, y0, f0 = time + step, y1, k[..., -1]
        else:
            rejected += 1
        attempts += 1
        step = next_step(step, ratio, tableau.order)
    return evaluations, rejected, first_accepted
