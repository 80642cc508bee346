"""Fixed-step methods on the union of all molecules' times, as published, and its adjoint.

The union of the output times *is* the step grid, so the cost is O(L) steps by nature, L <=
delta_frame united times. Memory is O(sqrt(L)): a state is kept every sqrt(L) steps, the rest is
recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gfnode_fast.solvers.errors import check_state
from gfnode_fast.solvers.rhs import RightHandSide, Tape
from gfnode_fast.solvers.stage import fill_stages, flat, spread
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau


class _Readings:
    """Which (molecule, time) pairs are read at which grid point."""

    def __init__(self, times: Tensor) -> None:
        grid, position = torch.unique(times, sorted=True, return_inverse=True)
        self.grid = [0.0, *grid.tolist()]
        pairs = position.flatten().argsort(stable=True)
        self.molecule = pairs // times.shape[1]
        self.time = pairs % times.shape[1]
        counts = torch.bincount(position.flatten(), minlength=len(grid))
        self.ends = [0, *counts.cumsum(0).tolist()]

    @property
    def num_steps(self) -> int:
        return len(self.grid) - 1

    def at(self, point: int) -> tuple[Tensor, Tensor]:
        """(molecules, times) read at grid point `point` > 0."""
        window = slice(self.ends[point - 1], self.ends[point])
        return self.molecule[window], self.time[window]


def _segments(num_steps: int) -> Iterator[tuple[int, int]]:
    """[start, end) ranges of about sqrt(num_steps) steps."""
    length = max(1, round(num_steps**0.5))
    for start in range(0, num_steps, length):
        yield start, min(start + length, num_steps)


class _GridSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rhs: RightHandSide,
        tableau: Tableau,
        stats: SolveStats,
        times: Tensor,
        y0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        batch, num_times = times.shape
        readings = _Readings(times)
        checkpoint_at = {start for start, _ in _segments(readings.num_steps)}
        checkpoints = []
        buffer = y0.new_empty(tableau.num_stages + 1, *y0.shape)
        values = flat(buffer).new_empty(batch, num_times, flat(buffer).shape[1] // batch)

        def evaluate(time: float, y: Tensor) -> Tensor:
            stats.evaluations += 1
            return rhs(_scalar(time, y), y)

        y = y0
        for index in range(readings.num_steps):
            if index in checkpoint_at:
                checkpoints.append(y)
            y = _step(evaluate, buffer, tableau, readings, index, y)
            molecules, slots = readings.at(index + 1)
            values[molecules, slots] = flat(y.unsqueeze(0)).view(batch, -1)[molecules]
        stats.accepted += readings.num_steps
        check_state(tableau.name, y, readings.grid[-1], 0.0, y.shape[0] // batch)
        ctx.rhs, ctx.tableau, ctx.readings = rhs, tableau, readings
        ctx.save_for_backward(*parameters, *checkpoints)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        rhs, tableau, readings = ctx.rhs, ctx.tableau, ctx.readings
        count = len(rhs.parameters)
        parameters, checkpoints = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        tape = rhs.tape(parameters, wants_time=False)
        bound = rhs.bind(parameters)
        first = checkpoints[0]
        buffer = first.new_empty(tableau.num_stages + 1, *first.shape)
        grad_buffer = torch.empty_like(buffer)
        grad_y = torch.zeros_like(first)
        flat_grad = flat(grad_y.unsqueeze(0)).view(grad_values.shape[0], -1)

        def evaluate(time: float, y: Tensor) -> Tensor:
            k: Tensor = bound(_scalar(time, y), y)
            return k

        segments = list(_segments(readings.num_steps))
        for (start, end), y in zip(reversed(segments), reversed(checkpoints), strict=True):
            states = [y]
            for index in range(start, end - 1):
                states.append(_step(evaluate, buffer, tableau, readings, index, states[-1]))
            for index in reversed(range(start, end)):
                molecules, slots = readings.at(index + 1)
                flat_grad.index_put_((molecules,), grad_values[molecules, slots], accumulate=True)
                grad_y.copy_(
                    _adjoint_step(
                        tape,
                        buffer,
                        grad_buffer,
                        tableau,
                        readings,
                        index,
                        states[index - start],
                        grad_y,
                    )
                )
        grads, _ = tape.finish()
        return None, None, None, None, grad_y, *grads


def _scalar(time: float, y: Tensor) -> Tensor:
    real = y.real.dtype if y.is_complex() else y.dtype
    return torch.tensor(time, dtype=torch.float64, device=y.device).to(real)


def _step(
    evaluate: Any, buffer: Tensor, tableau: Tableau, readings: _Readings, index: int, y: Tensor
) -> Tensor:
    """State at grid point index + 1 from the state at index."""
    time, end = readings.grid[index], readings.grid[index + 1]
    buffer[0], buffer[1] = y, evaluate(time, y)
    return fill_stages(evaluate, buffer, tableau, time, end - time)


def _adjoint_step(
    tape: Tape,
    buffer: Tensor,
    grad_buffer: Tensor,
    tableau: Tableau,
    readings: _Readings,
    index: int,
    y: Tensor,
    grad_y: Tensor,
) -> Tensor:
    """Gradient at grid point index from the gradient at index + 1."""
    numbers: list[int] = []

    def evaluate(time: float, point: Tensor) -> Tensor:
        k, number = tape.evaluate(time, point)
        numbers.append(number)
        return k

    _step(evaluate, buffer, tableau, readings, index, y)
    size = readings.grid[index + 1] - readings.grid[index]
    grad_buffer.zero_()
    spread(grad_buffer, 1.0, tableau.solution, size, grad_y)
    for stage in range(tableau.num_stages - 1, 0, -1):
        grad_point = tape.pull_back(numbers[stage], grad_buffer[stage + 1])
        spread(grad_buffer, 1.0, tableau.beta[stage - 1], size, grad_point)
    grad_start = grad_buffer[0] + tape.pull_back(numbers[0], grad_buffer[1])
    tape.flush()
    return grad_start


def solve_grid(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    stats: SolveStats,
) -> Tensor:
    """Values at every molecule's own times, stepping through the union of all of them.

    Args:
        rhs: right-hand side.
        y0: (M, B, D, C) state at s = 0, real or complex.
        times: (B, T) normalised times > 0.
        tableau: a fixed-step method.
        stats: counts evaluations and steps.

    Returns:
        (B, T, D, M, C).

    Raises:
        SolverError: non-finite state.

    Notes:
        Deterministic. O(L) steps for L united times, as published; memory O(sqrt(L)). Once
        differentiable, in y0 and the parameters.
    """
    modes, batch, components, channels = y0.shape
    rows = y0.permute(1, 2, 0, 3).reshape(batch * components, modes, channels).contiguous()
    values: Tensor = _GridSolve.apply(  # type: ignore[no-untyped-call]
        rhs, tableau, stats, times.detach(), rows, *rhs.parameters
    )
    if y0.is_complex():
        values = torch.view_as_complex(values.view(*values.shape[:2], -1, 2))
    return values.view(*values.shape[:2], components, modes, channels)
