"""The published solve of linear and affine dynamics: torchdiffeq's steps from powers of W.

For y' = y W + s b every stage of a Runge-Kutta step, its end, its error estimate and its dense
output are polynomials in h whose coefficients are the powers P_k of `powers` and the tableau's
numbers. A step is then J products without anything between them, and its end and error are one
product with a table of two rows; a rejected attempt reuses the powers. The initial step needs no
evaluation of its own either: its difference of slopes over h0 is P_2.

Steps, values and gradients are those of `joint` up to rounding, counts included. It takes a method
whose last stage is the next step's first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.control import TINY_NORM, TINY_STEP, next_step
from gfnode_fast.solvers.errors import check_state, check_step, check_times
from gfnode_fast.solvers.powers import Powers, choose_powers
from gfnode_fast.solvers.rhs import LinearRHS, RightHandSide
from gfnode_fast.solvers.stage import flat
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.transfers import to_device

Array = npt.NDArray[np.float64]
RESCALE_FROM = 16.0  # growth of the state by one product from which W is scaled down


@dataclass(frozen=True)
class _Method:
    """A tableau as polynomials: entry k of a row is multiplied by h^k P_k.

    Attributes:
        powers: who multiplies.
        step: (2, J+1), the end of a step and its error estimate.
        dense: (5, J+1), the coefficients of x^0 ... x^4 inside a step.
    """

    tableau: Tableau
    rtol: float
    atol: float
    powers: Powers
    step: Array
    dense: Array


@lru_cache(maxsize=16)
def _method(tableau: Tableau, rtol: float, atol: float, multiplies: Powers) -> _Method:
    count = tableau.num_stages
    stages = np.zeros((count, count))  # k_i = Σ_n stages[i, n] h^n P_{n+1}
    stages[:, 0] = 1
    for i, row in enumerate(tableau.beta, start=1):
        stages[i, 1:] = np.asarray(row) @ stages[: len(row), :-1]
    step = np.zeros((2, count + 1))
    step[:, 1:] = np.asarray((tableau.solution, tableau.error)) @ stages
    step[0, 0] = 1
    dense = np.zeros((5, count + 1))
    dense[1:, 1:] = tableau.dense.numpy() @ stages
    dense[0, 0] = 1
    return _Method(tableau, rtol, atol, multiplies, step, dense)


@dataclass
class _Start:
    """First step size h, and its derivatives with respect to the norms of P_0, P_1, P_2."""

    h: float
    norms: tuple[float, ...]
    slopes: tuple[float, ...]


def _initial_step(norms: tuple[float, ...], order: int) -> _Start:
    """`control.initial_step` on the host."""
    d0, d1, d2 = norms
    slope0: tuple[float, ...]
    slope1: tuple[float, ...]
    if d0 < TINY_NORM or d1 < TINY_NORM:
        h0, slope0 = TINY_STEP, (0.0, 0.0, 0.0)
    else:
        h0 = 0.01 * d0 / d1
        slope0 = (0.01 / d1, -h0 / d1, 0.0)
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1, slope1 = TINY_STEP, (0.0, 0.0, 0.0)
        if 1e-3 * h0 > TINY_STEP:
            h1, slope1 = 1e-3 * h0, tuple(1e-3 * s for s in slope0)
    else:
        largest = max(d1, d2)
        h1 = (0.01 / largest) ** (1 / order)
        falls = -h1 / (order * largest)
        slope1 = (0.0, 0.0, falls) if d2 > d1 else (0.0, falls, 0.0)
    if 100 * h0 < h1:
        return _Start(100 * h0, norms, tuple(100 * s for s in slope0))
    return _Start(h1, norms, slope1)


@dataclass
class _Step:
    """An accepted step: its start, time and size."""

    y: Tensor
    time: float
    size: float


@dataclass
class _Record:
    """What backward needs of a solve."""

    start: _Start
    unit: float = 1.0  # powers are of W times this; steps are in units of it
    steps: list[_Step] = field(default_factory=list)
    first_accepted: bool = False  # then h carries gradient

    def table(self, rows: Array, size: float, like: Tensor) -> Tensor:
        """Rows of coefficients for steps of this size, in the real precision of a tensor."""
        scaled = rows * (size / self.unit) ** np.arange(rows.shape[-1])
        real = like.real.dtype if like.is_complex() else like.dtype
        return to_device(torch.from_numpy(scaled).to(real), like.device)


def _weights(
    method: _Method, record: _Record, rows: Array, step: _Step, times: Tensor, like: Tensor
) -> Tensor:
    """Rows of coefficients of x^0 ... x^4 at the times inside a step: (B, T, J+1), else 0."""
    end = step.time + step.size
    table = record.table(rows, step.size, times)
    return method.powers.weights(times, table, step.time, end - step.time, end, like)


def _begin(method: _Method, buffer: Tensor, times: Tensor) -> tuple[_Start, float]:
    """First step size from P_0, P_1, P_2, and the last time: one reading on the host."""
    real = buffer.real.dtype if buffer.is_complex() else buffer.dtype
    each = torch.eye(3, dtype=real, device=buffer.device)
    _, squares = method.powers.measure(buffer[:3], each, method.rtol, method.atol)
    *found, first, last = torch.cat((squares.sqrt(), torch.stack(times.aminmax()))).tolist()
    check_times("joint", first, last)
    return _initial_step(tuple(found), method.tableau.order), last


def _integrate(
    method: _Method, y: Tensor, weight: Tensor, slope: Tensor | None, times: Tensor,
    stats: SolveStats,
) -> tuple[Tensor, Tensor, _Record]:  # fmt: skip
    """y (R, M, C), times (B, T) float64 → values (B, T, X) real, the last step's powers, the
    record.
    """
    tableau, (batch, num_times) = method.tableau, times.shape
    components = len(y) // batch
    buffer = y.new_empty(tableau.num_stages + 1, *y.shape)
    buffer[0] = y
    method.powers.fill(buffer[:3], weight, slope, 0.0)
    start, last = _begin(method, buffer, times)
    record = _Record(start)
    if not all(map(math.isfinite, start.norms)):
        check_state(tableau.name, y, 0.0, 0.0, components)
    growth = start.norms[1] / max(start.norms[0], TINY_NORM)
    if RESCALE_FROM < growth < math.inf:
        record.unit = 2.0 ** -math.ceil(math.log2(growth))
        buffer[1] *= record.unit
        buffer[2] *= record.unit**2
    weight, slope = _rescaled(weight, slope, record.unit)
    values = flat(buffer).new_zeros(batch, num_times, flat(buffer).shape[1] // batch)
    time, step, filled, rejected = 0.0, start.h, 2, 0
    while True:
        method.powers.fill(buffer, weight, slope, time / record.unit, first=filled)
        while True:
            check_step(tableau.name, time, step)
            table = record.table(method.step, step, y)
            y1, squares = method.powers.measure(buffer, table, method.rtol, method.atol)
            ratio = math.sqrt(squares[1].item())
            if not ratio < math.inf:
                check_state(tableau.name, y1, time, step, components)
            if ratio <= 1:
                break
            rejected += 1
            step = next_step(step, ratio, tableau.order)
        record.first_accepted |= not (record.steps or rejected)
        record.steps.append(_Step(buffer[0].clone(), time, step))
        weights = _weights(method, record, method.dense, record.steps[-1], times, buffer)
        method.powers.read(weights, buffer, values)
        time += step
        if time >= last:
            break
        buffer[0], filled = y1, 0
        step = next_step(step, ratio, tableau.order)
    stats.evaluations += 2 + (len(record.steps) + rejected) * (tableau.num_stages - 1)
    stats.accepted += len(record.steps)
    stats.rejected += rejected
    return values, buffer, record


def _rescaled(weight: Tensor, slope: Tensor | None, unit: float) -> tuple[Tensor, Tensor | None]:
    if unit == 1.0:
        return weight, slope
    return weight * unit, None if slope is None else slope * unit**2


class _LinearJointSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        method: _Method,
        stats: SolveStats,
        times: Tensor,
        y0: Tensor,
        weight: Tensor,
        slope: Tensor | None,
    ) -> Tensor:
        values, buffer, record = _integrate(method, y0, weight, slope, times, stats)
        ctx.method, ctx.record, ctx.has_slope = method, record, slope is not None
        forced = () if slope is None else (slope,)
        starts = (step.y for step in record.steps)
        ctx.save_for_backward(times, y0, weight, *forced, buffer, *starts)
        ctx.steps = [(step.time, step.size) for step in record.steps]
        record.steps = []
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        times, _, weight, *saved = ctx.saved_tensors
        slope = saved.pop(0) if ctx.has_slope else None
        buffer, *starts = saved
        steps = [_Step(y, *when) for y, when in zip(starts, ctx.steps, strict=True)]
        adjoint = _Adjoint(ctx.method, ctx.record, times, weight, slope)
        grad_y = adjoint.run(steps, buffer, grad_values.contiguous())
        return None, None, None, grad_y, adjoint.grad_weight, adjoint.grad_slope


class _Adjoint:
    """The backward pass: one step at a time, last to first."""

    def __init__(
        self,
        method: _Method,
        record: _Record,
        times: Tensor,
        weight: Tensor,
        slope: Tensor | None,
    ) -> None:
        self.method, self.record, self.times = method, record, times
        self.weight, self.slope = _rescaled(weight, slope, record.unit)
        self.grad_weight = torch.zeros_like(weight)
        self.grad_slope = None if slope is None else torch.zeros_like(slope)

    def run(self, steps: list[_Step], buffer: Tensor, grad_values: Tensor) -> Tensor:
        """Gradient of y0; `buffer` holds the powers of the last step."""
        method, record = self.method, self.record
        grad_y: Tensor | None = None
        grad_h = torch.zeros((), dtype=torch.float64, device=buffer.device)
        for step in reversed(steps):
            is_first = step is steps[0]
            if step is not steps[-1]:
                if step is steps[-2]:  # what was saved stays as it is, for another backward
                    buffer = torch.empty_like(buffer)
                buffer[0] = step.y
                method.powers.fill(buffer, self.weight, self.slope, step.time / record.unit)
            weights = _weights(method, record, method.dense, step, self.times, grad_values)
            grad = method.powers.pull_readings(weights, grad_values, buffer)
            if record.first_accepted:
                grad_h += self._moved_readings(step, is_first, buffer, grad_values)
            if grad_y is not None:
                by_end = flat(grad_y.unsqueeze(0))[0]
                flat(grad).addr_(record.table(method.step[0], step.size, buffer), by_end)
                if record.first_accepted and is_first:
                    rows = method.step[0] * np.arange(len(buffer)) / step.size
                    moved = flat(buffer).mv(by_end)
                    grad_h += moved.dot(record.table(rows, step.size, buffer))
            if is_first and record.first_accepted:
                self._pull_start(buffer, grad, grad_h)
            of_weight, of_slope = method.powers.pull_back(
                buffer, grad, self.weight, self.slope, step.time / record.unit
            )
            self.grad_weight += of_weight
            if self.grad_slope is not None and self.slope is not None and of_slope is not None:
                self.grad_slope += of_slope
                if not is_first:  # a later start moves with h, and so does the forcing there
                    grad_h += (grad[1].sum(dim=0) * self.slope).sum() / record.unit
            grad_y = grad[0]
        if record.unit != 1.0:
            self.grad_weight *= record.unit
            if self.grad_slope is not None:
                self.grad_slope *= record.unit**2
        assert grad_y is not None
        return grad_y

    def _moved_readings(
        self, step: _Step, is_first: bool, buffer: Tensor, grad_values: Tensor
    ) -> Tensor:
        """What the values' gradient says of h, which sizes the first step and starts the others.

        d/dh of x^p is -p x^p / h in the first step, -p x^(p-1) / dt in a later one.
        """
        dense, order = self.method.dense, np.arange(5)[:, None]
        if is_first:
            rows = dense * (np.arange(len(buffer)) - order) / step.size
        else:
            rows = np.zeros_like(dense)
            rows[:-1] = -order[1:] * dense[1:] / step.size
        weights = _weights(self.method, self.record, rows, step, self.times, grad_values)
        moved = self.method.powers.read(weights, buffer)
        return moved.mul_(grad_values).sum(dim=2).sum(dtype=torch.float64)

    def _pull_start(self, buffer: Tensor, grad: Tensor, grad_h: Tensor) -> None:
        """Adjoint of the first step size: adds to the gradient of P_0, P_1, P_2."""
        method, start = self.method, self.record.start
        size = buffer[0].abs()
        scale = (size * method.rtol).add_(method.atol)
        for k, (norm, slope) in enumerate(zip(start.norms, start.slopes, strict=True)):
            if slope == 0:
                continue
            # The norm is of P_k without the scale of W.
            factor = self.record.unit**-k
            scaled = buffer[k] * factor / scale
            pulled = scaled / scale * (grad_h * (slope / (norm * size.numel())))
            grad[k].add_(pulled, alpha=factor)
            by_scale = (pulled.conj() * scaled).real if scaled.is_complex() else pulled * scaled
            grad[0].sub_(by_scale * buffer[0].sgn(), alpha=method.rtol)


def is_linear_joint(rhs: RightHandSide, tableau: Tableau) -> bool:
    """Whether `solve_linear_joint` has this right-hand side and method."""
    return (
        isinstance(rhs, LinearRHS)
        and (rhs.forcing is None or rhs.is_proportional)
        and tableau.ends_on_last_stage
    )


def solve_linear_joint(
    rhs: LinearRHS, y0: Tensor, times: Tensor, tableau: Tableau, rtol: float, atol: float,
    stats: SolveStats, backend: str,
) -> Tensor:  # fmt: skip
    """`solve_joint` from y0 (M, B, D, C) and times (B, T) float64 to (B, T, X) real."""
    modes, batch, components, channels = y0.shape
    rows = y0.permute(1, 2, 0, 3).reshape(batch * components, modes, channels).contiguous()
    method = _method(tableau, rtol, atol, choose_powers("joint", backend, rows))
    values: Tensor = _LinearJointSolve.apply(  # type: ignore[no-untyped-call]
        method, stats, times.contiguous(), rows, rhs.weight.contiguous(), rhs.slope()
    )
    return values
