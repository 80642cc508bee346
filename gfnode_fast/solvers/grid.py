"""Fixed-step methods on a grid of times, and their adjoint; the published grid.

The published grid is the union of all molecules' times, so its cost is O(L) steps by nature, L <=
delta_frame united times. Memory is O(sqrt(L)): a state is kept every sqrt(L) steps, the rest is
recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.errors import check_state, check_times
from gfnode_fast.solvers.rhs import RightHandSide, Tape
from gfnode_fast.solvers.stage import fill_stages, flat, spread
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau

Function = Callable[[Tensor, Tensor], Tensor]
"""(s 0-dim, y (R, M, C)) → (R, M, C)."""


class Readings(Protocol):
    """A grid, and which (molecule, time) pairs are read at each of its points."""

    grid: list[float]
    """Points of time, from 0 to the last output time or past it."""
    reads_slopes: bool
    """Whether dy/ds is read too, at the last point at the price of one more evaluation."""

    def at(self, point: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Molecules (P,) and times (P,) read at a grid point, with the weights (2, P) of y and
        dy/ds there; None for y itself. A value is the sum over the points that it is read at.
        """


class _Union:
    """Every time is a grid point."""

    reads_slopes = False

    def __init__(self, times: Tensor) -> None:
        grid, position = torch.unique(times, sorted=True, return_inverse=True)
        self.grid = [0.0, *grid.tolist()]
        check_times("joint", self.grid[1], self.grid[-1])
        pairs = position.flatten().argsort(stable=True)
        self.molecule = pairs // times.shape[1]
        self.time = pairs % times.shape[1]
        counts = torch.bincount(position.flatten(), minlength=len(grid))
        self.ends = [0, 0, *counts.cumsum(0).tolist()]

    def at(self, point: int) -> tuple[Tensor, Tensor, None]:
        window = slice(self.ends[point], self.ends[point + 1])
        return self.molecule[window], self.time[window], None


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
        function: Function,
        tableau: Tableau,
        stats: SolveStats,
        readings: Readings,
        shape: tuple[int, int],
        y0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        batch = shape[0]
        num_steps = len(readings.grid) - 1
        checkpoint_at = {start for start, _ in _segments(num_steps)}
        checkpoints = []
        buffer = y0.new_empty(tableau.num_stages + 1, *y0.shape)
        values = flat(buffer).new_zeros(*shape, flat(buffer).shape[1] // batch)

        def evaluate(time: float, y: Tensor) -> Tensor:
            stats.evaluations += 1
            return function(_scalar(time, y), y)

        def check(point: int) -> None:
            step = readings.grid[point] - readings.grid[max(point - 1, 0)]
            check_state(tableau.name, y, readings.grid[point], step, y.shape[0] // batch)

        y = y0
        for index in range(num_steps):
            if index in checkpoint_at:
                check(index)
                checkpoints.append(y)
            end = _step(evaluate, buffer, tableau, readings, index, y)
            _read(values, buffer, readings, index)
            y = end
        check(num_steps)
        buffer[0] = y
        if readings.reads_slopes:
            buffer[1] = evaluate(readings.grid[-1], y)
        _read(values, buffer, readings, num_steps)
        stats.accepted += num_steps
        ctx.rhs, ctx.tableau, ctx.readings = rhs, tableau, readings
        ctx.save_for_backward(y0, *parameters, *checkpoints, y)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        rhs, tableau, readings = ctx.rhs, ctx.tableau, ctx.readings
        count = len(rhs.parameters)
        _, *saved = ctx.saved_tensors
        parameters, (*checkpoints, last) = saved[:count], saved[count:]
        tape = rhs.tape(parameters, wants_time=False)
        bound = rhs.bind(parameters)
        buffer = last.new_empty(tableau.num_stages + 1, *last.shape)
        grad_buffer = torch.zeros_like(buffer)
        num_steps = len(readings.grid) - 1

        def evaluate(time: float, y: Tensor) -> Tensor:
            k: Tensor = bound(_scalar(time, y), y)
            return k

        _pull_reading(grad_buffer, grad_values, readings, num_steps)
        grad_y = grad_buffer[0].clone()
        if readings.reads_slopes:
            _, number = tape.evaluate(readings.grid[-1], last)
            grad_y += tape.pull_back(number, grad_buffer[1])
            tape.flush()
        segments = list(_segments(num_steps))
        for (start, end), y in zip(reversed(segments), reversed(checkpoints), strict=True):
            states = [y]
            for index in range(start, end - 1):
                states.append(_step(evaluate, buffer, tableau, readings, index, states[-1]))
            for index in reversed(range(start, end)):
                grad_y = _adjoint_step(
                    tape, buffer, grad_buffer, tableau, readings, index,
                    states[index - start], grad_y, grad_values,
                )  # fmt: skip
        grads, _ = tape.finish()
        return None, None, None, None, None, None, grad_y, *grads


def _read(values: Tensor, buffer: Tensor, readings: Readings, point: int) -> None:
    """Add to values (B, T, X) what is read at a point whose y and dy/ds begin the buffer."""
    molecules, slots, weights = readings.at(point)
    if len(molecules) == 0:
        return
    batch = len(values)
    y = flat(buffer[:1]).view(batch, -1)[molecules]
    if weights is None:
        values[molecules, slots] = y
        return
    slope = flat(buffer[1:2]).view(batch, -1)[molecules]
    weight_y, weight_slope = weights.to(y.dtype).unsqueeze(-1)
    values[molecules, slots] += weight_y * y + weight_slope * slope


def _pull_reading(grad_buffer: Tensor, grad_values: Tensor, readings: Readings, point: int) -> None:
    """Adjoint of `_read`: add to the gradients of y and dy/ds."""
    molecules, slots, weights = readings.at(point)
    if len(molecules) == 0:
        return
    grad = grad_values[molecules, slots]
    by_molecule = flat(grad_buffer[:2]).view(2, len(grad_values), -1)
    if weights is None:
        by_molecule[0].index_put_((molecules,), grad, accumulate=True)
        return
    for row, weight in zip(by_molecule, weights.to(grad.dtype).unsqueeze(-1), strict=True):
        row.index_put_((molecules,), weight * grad, accumulate=True)


def _scalar(time: float, y: Tensor) -> Tensor:
    real = y.real.dtype if y.is_complex() else y.dtype
    return torch.full((), time, dtype=torch.float64, device=y.device).to(real)


def _step(
    evaluate: Any, buffer: Tensor, tableau: Tableau, readings: Readings, index: int, y: Tensor
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
    readings: Readings,
    index: int,
    y: Tensor,
    grad_y: Tensor,
    grad_values: Tensor,
) -> Tensor:
    """Gradient at grid point index, readings there included, from the gradient at index + 1."""
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
    _pull_reading(grad_buffer, grad_values, readings, index)
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
        ValueError: times that are not positive and finite.
        SolverError: non-finite state.

    Notes:
        Deterministic. O(L) steps for L united times, as published; memory O(sqrt(L)). Once
        differentiable, in y0 and the parameters.
    """

    def published(s: Tensor, y: Tensor) -> Tensor:
        return rhs.published(s, y.transpose(0, 1)).transpose(0, 1)

    readings = _Union(times.detach())
    return solve_on_grid(rhs, published, y0, readings, times.shape[1], tableau, stats)


def solve_on_grid(
    rhs: RightHandSide,
    function: Function,
    y0: Tensor,
    readings: Readings,
    num_times: int,
    tableau: Tableau,
    stats: SolveStats,
) -> Tensor:
    """Values (B, T, D, M, C) read along a grid from y0 (M, B, D, C); see `solve_grid`.

    `function` is what the forward pass evaluates, `rhs` or another form of it.
    """
    modes, batch, components, channels = y0.shape
    rows = y0.permute(1, 2, 0, 3).reshape(batch * components, modes, channels)
    values: Tensor = _GridSolve.apply(  # type: ignore[no-untyped-call]
        rhs, function, tableau, stats, readings, (batch, num_times), rows, *rhs.parameters
    )
    if y0.is_complex():
        values = torch.view_as_complex(values.view(*values.shape[:2], -1, 2))
    return values.view(*values.shape[:2], components, modes, channels)
