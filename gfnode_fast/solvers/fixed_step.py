"""Uniform steps from s = 0, every molecule's own times read from them.

    s_j = j h;  inside a step, with x = (s - s_j) / h, the cubic through the values and slopes at
    both ends: y = (1 + 2x)(1 - x)² y_j + h x (1 - x)² y'_j + x² (3 - 2x) y_{j+1} - h x² (1 - x)
    y'_{j+1}

Its error is O(h⁴), so that no method of order up to 4 loses its order between grid points. The grid
does not depend on the times, so an answer does not depend on batch mates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.errors import SolverError, check_times
from gfnode_fast.solvers.grid import solve_on_grid
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau

MAX_STEPS = 10_000_000


class _Uniform:
    """A uniform grid; a time is read at both ends of its step."""

    reads_slopes = True

    def __init__(self, times: Tensor, step_size: float) -> None:
        position = times / step_size
        step = (position.ceil() - 1).clamp_(min=0).flatten().long()
        x, order = (position.flatten() - step), step.argsort(stable=True)
        x = x[order]
        num_steps = int(step.max()) + 1
        self.grid = [j * step_size for j in range(num_steps + 1)]
        self.molecule = order // times.shape[1]
        self.time = order % times.shape[1]
        self.ends = [0, *torch.bincount(step, minlength=num_steps).cumsum(0).tolist()]
        left = torch.stack(((1 + 2 * x) * (1 - x) ** 2, step_size * x * (1 - x) ** 2))
        right = torch.stack((x**2 * (3 - 2 * x), -step_size * x**2 * (1 - x)))
        self.weights = (left, right)

    def at(self, point: int) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs of the step that ends at `point` and of the one that starts there."""
        before, here = self.ends[max(point - 1, 0)], self.ends[min(point, len(self.ends) - 1)]
        after = self.ends[min(point + 1, len(self.ends) - 1)]
        left, right = self.weights
        weights = torch.cat((right[:, before:here], left[:, here:after]), dim=1)
        window = slice(before, after)
        return self.molecule[window], self.time[window], weights


def check_uniform(times: Tensor, step_size: float) -> None:
    """Raise for times that uniform steps cannot reach; reads their range on the host."""
    first, last = torch.stack((times.amin(), times.amax())).tolist()
    check_times("fixed", first, last)
    if last / step_size > MAX_STEPS:
        raise SolverError(
            f"fixed: the solve must take at most {MAX_STEPS} steps, got {last / step_size:.3g} of "
            f"size {step_size:.3g} to s = {last:.6g}; raise step_size",
            time=0.0,
            step=step_size,
            rows=[],
        )


def solve_fixed(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    step_size: float,
    stats: SolveStats | None = None,
) -> Tensor:
    """Values at every molecule's own times from uniform steps of `step_size`.

    Args:
        rhs: right-hand side.
        y0: (M, B, D, C) state at s = 0, real or complex.
        times: (B, T) normalised times > 0.
        tableau: a fixed-step method.
        step_size: size of a step in normalised time.
        stats: counts evaluations and steps when given.

    Returns:
        (B, T, D, M, C), of the method's order in `step_size` (at most 4).

    Raises:
        ValueError: times that are not positive and finite, or an adaptive method.
        SolverError: non-finite state, or more steps than can be taken.

    Notes:
        Deterministic. O(B (steps + T)); memory O(B (sqrt(steps) + T)). Once differentiable, in y0
        and the parameters, as the discrete solve is; `times` get no gradient.
    """
    if tableau.is_adaptive:
        raise ValueError(
            f"fixed: `tableau` must be a fixed-step method, got {tableau.name!r}; pass e.g. rk4"
        )
    times = times.detach().double()
    check_uniform(times, step_size)
    stats = SolveStats() if stats is None else stats
    readings = _Uniform(times, step_size)
    return solve_on_grid(rhs, rhs, y0, readings, times.shape[1], tableau, stats)
