"""Adaptive solve with each molecule's own steps, so that an answer does not depend on batch mates.

The published method for one molecule at a time, vectorised: initial step, error norm and controller
see that molecule's state alone (all its components and modes). Molecules advance in lockstep
attempts; one whose attempt was rejected, or that has passed its last time, stays where it is.

The gradient is that of the discrete solve with the same convention as `joint`: step sizes that the
controller derives are constants, the initial one is not; where a molecule's first attempt was
accepted, its steps start, and its times are read, that much later. Backward replays one attempt at
a time from its recorded start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.control import MAX_GROWTH, MIN_GROWTH, SAFETY, TINY_NORM, TINY_STEP
from gfnode_fast.solvers.errors import SolverError, check_times
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.stage import flat
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Row, Tableau, dense_tensor, row_tensor

UNUSED_STEP = 1e-12

Function = Callable[[Tensor, Tensor], Tensor]
"""(s (R,), y (R, M, C)) → (R, M, C)."""


@dataclass(frozen=True)
class Method:
    """What all attempts of a solve share."""

    tableau: Tableau
    rtol: float
    atol: float
    components: int  # rows per molecule

    def by_row(self, value: Tensor, like: Tensor) -> Tensor:
        """(B,) → (R,) in the real precision of a state."""
        return value.to(like.real.dtype if like.is_complex() else like.dtype).repeat_interleave(
            self.components
        )


def molecule_norm(y: Tensor, components: int) -> Tensor:
    """RMS over each molecule's rows, (R, M, C) → (B,), with gradient 0 instead of NaN at 0."""
    size = y.abs() if y.is_complex() else y
    mean = size.square().flatten(1).mean(dim=1).view(-1, components).mean(dim=1)
    is_zero = mean == 0
    return mean.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


def first_step(method: Method, function: Function, y: Tensor, k: Tensor) -> Tensor:
    """`control.initial_step` for every molecule: (B,) float64, differentiable."""
    scale = method.atol + y.abs() * method.rtol
    d0, d1 = (molecule_norm(v / scale, method.components) for v in (y, k))
    is_small = (d0 < TINY_NORM) | (d1 < TINY_NORM)
    h0 = (0.01 * d0 / d1.masked_fill(is_small, 1.0)).masked_fill(is_small, TINY_STEP)
    rows = method.by_row(h0, y)
    f1 = function(rows, y + rows.view(-1, 1, 1) * k)
    d2 = molecule_norm((f1 - k) / scale, method.components) / h0
    is_flat = (d1 <= 1e-15) & (d2 <= 1e-15)
    slope = torch.where(d2 > d1, d2, d1).masked_fill(is_flat, 1.0)
    steep = (0.01 / slope) ** (1.0 / method.tableau.order)
    h1 = torch.where(is_flat, (h0 * 1e-3).clamp(min=TINY_STEP), steep)
    return torch.minimum(100 * h0, h1).double()


def _combine(stages: Sequence[Tensor], row: Row) -> Tensor:
    """Σ_j row[j] k_j."""
    used = torch.stack(tuple(stages[: len(row)])).flatten(1)
    return (row_tensor(row, used.dtype, used.device) @ used).view_as(stages[0])


def _attempt(
    method: Method, function: Function, y: Tensor, k: Tensor, time: Tensor, step: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """End (R, M, C) and stages of a step; time and step (B,) float64."""
    tableau = method.tableau
    start, size = method.by_row(time, y), method.by_row(step, y).view(-1, 1, 1)
    stages, point = [k], y
    for alpha, row in zip(tableau.alpha, tableau.beta, strict=True):
        when = start + alpha * size.view(-1)
        if alpha == 1.0:  # just before the end, as published
            end = method.by_row(time + step, y)
            when = end + (torch.nextafter(end, end - 1) - end).detach()
        point = y + size * _combine(stages, row)
        stages.append(function(when, point))
    if tableau.ends_on_last_stage:
        return point, stages
    return y + size * _combine(stages, tableau.solution), stages


def _read(
    method: Method, y: Tensor, stages: list[Tensor], time: Tensor, step: Tensor, times: Tensor,
    inside: Tensor,
) -> Tensor:  # fmt: skip
    """Values (B, T, X) at the times inside an attempt, 0 at all others."""
    x = ((times - time.unsqueeze(1)) / step.unsqueeze(1)).masked_fill(~inside, 0.0)
    powers = torch.stack((x, x**2, x**3, x**4), dim=-1)
    dense = (powers @ dense_tensor(method.tableau, x.device)) * step.view(-1, 1, 1)
    weights = torch.cat((inside.unsqueeze(-1).to(x.dtype), dense), dim=-1)
    weights = weights * inside.unsqueeze(-1)
    buffer = flat(torch.stack((y, *stages)))
    by_molecule = buffer.view(len(buffer), len(times), -1).transpose(0, 1)
    return torch.bmm(weights.to(buffer.dtype), by_molecule)


@dataclass
class _Record:
    """Where an attempt started: state and slope, and per molecule time, size and acceptance."""

    y: Tensor
    k: Tensor
    time: Tensor
    step: Tensor
    accepted: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.y, self.k, self.time, self.step, self.accepted

    def inside(self, times: Tensor) -> Tensor:
        """(B, T), the times that are read from this attempt."""
        time, end = self.time.unsqueeze(1), (self.time + self.step).unsqueeze(1)
        return (times > time) & (times <= end) & self.accepted.unsqueeze(1)


def _integrate(
    method: Method, function: Function, y: Tensor, times: Tensor, stats: SolveStats
) -> tuple[Tensor, list[_Record]]:
    """y (R, M, C), times (B, T) float64 → values (B, T, X) real, and the attempts."""
    components = method.components
    last = times.amax(dim=1)
    time = torch.zeros_like(last)

    def evaluate(s: Tensor, y: Tensor) -> Tensor:
        stats.evaluations += 1
        return function(s, y)

    check_molecules(method, y, time, time, torch.ones_like(last, dtype=torch.bool))
    k = evaluate(method.by_row(time, y), y)
    step = first_step(method, evaluate, y, k)
    values = flat(y.unsqueeze(0)).new_zeros(*times.shape, flat(y.unsqueeze(0)).numel() // len(last))
    records = []
    counted = torch.zeros(2, dtype=torch.int64, device=time.device)  # accepted, tried
    active = time < last
    while active.any():
        # A molecule that has arrived goes on with the size of its last step, unread.
        underflows = active & ~(time + step > time)
        if underflows.any():
            refuse_step(time, step, underflows)
        y1, stages = _attempt(method, evaluate, y, k, time, step)
        size = method.by_row(step, y).view(-1, 1, 1)
        tolerance = torch.maximum(y.abs(), y1.abs()) * method.rtol + method.atol
        error = size * _combine(stages, method.tableau.error) / tolerance
        ratio = molecule_norm(error, components).double()
        check_molecules(method, y1, time, step, active & ~(ratio < math.inf))
        accepted = active & (ratio <= 1)
        record = _Record(y, k, time, step, accepted)
        records.append(record)
        values += _read(method, y, stages, time, step, times, record.inside(times))
        rows = accepted.repeat_interleave(components).view(-1, 1, 1)
        y, k = torch.where(rows, y1, y), torch.where(rows, stages[-1], k)
        counted += torch.stack((accepted.sum(), active.sum()))
        time = torch.where(accepted, time + step, time)
        active = time < last
        step = torch.where(active, step * growth_after(ratio, method.tableau.order), step)
    taken, tried = counted.tolist()
    stats.accepted += taken
    stats.rejected += tried - taken
    return values, records


def growth_after(ratio: Tensor, order: int) -> Tensor:
    """`control.next_step` over the step it follows, for every molecule."""
    floor = torch.where(ratio < 1, 1.0, MIN_GROWTH).to(ratio.dtype)
    return torch.maximum(SAFETY / ratio ** (1 / order), floor).clamp(max=MAX_GROWTH)


def check_molecules(method: Method, y: Tensor, time: Tensor, step: Tensor, of: Tensor) -> None:
    """Raise SolverError if the state of a molecule in the mask `of` (B,) is not finite."""
    finite = torch.isfinite(y).flatten(1).all(dim=1).view(-1, method.components).all(dim=1)
    bad = of & ~finite
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        when, size = time[bad].min().item(), step[bad][time[bad].argmin()].item()
        raise SolverError(
            f"per_molecule: the state must be finite, got non-finite values at s = {when:.6g} "
            f"(step {size:.3g}) in molecule(s) {rows[:8]}{' ...' if len(rows) > 8 else ''}; check "
            "these molecules' inputs, lower the learning rate, or tighten rtol and atol",
            time=when,
            step=size,
            rows=rows,
        )


def refuse_step(time: Tensor, step: Tensor, bad: Tensor) -> None:
    """Raise SolverError for the steps of the molecules in the mask `bad` (B,)."""
    rows = bad.nonzero().flatten().tolist()
    when, size = time[rows[0]].item(), step[rows[0]].item()
    raise SolverError(
        f"per_molecule: the step must advance time, got step {size:.3g} at s = {when:.6g} in "
        f"molecule(s) {rows[:8]}{' ...' if len(rows) > 8 else ''}; the dynamics is too stiff here: "
        "loosen rtol and atol or use smaller weights",
        time=when,
        step=size,
        rows=rows,
    )


class _PerMoleculeSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rhs: RightHandSide,
        method: Method,
        stats: SolveStats,
        times: Tensor,
        y0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        values, records = _integrate(method, rhs, y0, times, stats)
        ctx.rhs, ctx.method = rhs, method
        kept = (t for r in records for t in r.tensors())
        ctx.save_for_backward(times, y0, *parameters, *kept)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        times, _, *saved = ctx.saved_tensors
        count = len(ctx.rhs.parameters)
        width = len(_Record.__dataclass_fields__)
        records = [_Record(*saved[i : i + width]) for i in range(count, len(saved), width)]
        adjoint = _Adjoint(ctx.rhs, ctx.method, times, saved[:count])
        grad_y0 = adjoint.run(records, grad_values.contiguous())
        return None, None, None, None, grad_y0, *adjoint.grads


class _Adjoint:
    """The backward pass: one attempt at a time, last to first."""

    def __init__(
        self, rhs: RightHandSide, method: Method, times: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        self.method, self.times = method, times
        self.parameters = [p.detach().requires_grad_() for p in parameters]
        self.function = rhs.bind(self.parameters)
        self.grads: list[Tensor | None] = [None] * len(self.parameters)

    def _pull(
        self, outputs: list[Tensor], inputs: list[Tensor], grads: list[Tensor]
    ) -> list[Tensor]:
        """Gradients of the inputs; those of the parameters accumulate."""
        wanted = [i for i, output in enumerate(outputs) if output.requires_grad]
        pulled = torch.autograd.grad(
            [outputs[i] for i in wanted],
            [*inputs, *self.parameters],
            [grads[i] for i in wanted],
            allow_unused=True,
        )
        for i, more in enumerate(pulled[len(inputs) :]):
            mine = self.grads[i]
            if more is not None:
                self.grads[i] = more if mine is None else mine + more
        return [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, pulled, strict=False)
        ]

    def run(self, records: list[_Record], grad_values: Tensor) -> Tensor:
        method, first = self.method, records[0]
        grad_y, grad_k = torch.zeros_like(first.y), torch.zeros_like(first.k)
        grad_h = torch.zeros_like(first.step)
        for record in reversed(records):
            # What was not accepted is not used; a tiny step keeps it finite, and 0 times it 0.
            step = record.step.where(record.accepted, UNUSED_STEP)
            inputs = [t.clone().requires_grad_() for t in (record.y, record.k, record.time, step)]
            y, k, time, step = inputs
            rows = record.accepted.repeat_interleave(method.components).view(-1, 1, 1)
            with torch.enable_grad():
                y1, stages = _attempt(method, self.function, y, k, time, step)
                values = _read(method, y, stages, time, step, self.times, record.inside(self.times))
            more_y, more_k, grad_time, grad_step = self._pull(
                [y1, stages[-1], values],
                inputs,
                [grad_y.where(rows, 0), grad_k.where(rows, 0), grad_values],
            )
            # Of an accepted first attempt the size is h, and later ones start that much later.
            moved = grad_step if record is first else grad_time
            grad_h += moved.masked_fill(~first.accepted, 0.0)
            grad_y, grad_k = more_y + grad_y.where(~rows, 0), more_k + grad_k.where(~rows, 0)
        y = first.y.detach().requires_grad_()
        with torch.enable_grad():
            k = self.function(method.by_row(torch.zeros_like(grad_h), y), y)
            h = first_step(method, self.function, y, k)
        (more_y,) = self._pull([k, h], [y], [grad_k, grad_h])
        return grad_y + more_y


def solve_per_molecule(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
    stats: SolveStats | None = None,
) -> Tensor:
    """Values at every molecule's own times, each molecule with its own adaptive steps.

    Args:
        rhs: right-hand side.
        y0: (M, B, D, C) state at s = 0, real or complex; D components ride along as rows.
        times: (B, T) normalised times > 0.
        tableau: an adaptive method.
        rtol, atol: tolerances; the error norm is the RMS over one molecule's state.
        stats: counts when given: evaluations are of the whole batch at once, steps are summed over
            the molecules.

    Returns:
        (B, T, D, M, C). For a batch of one the same as `solve_joint`, gradients included.

    Raises:
        ValueError: times that are not positive and finite, or a fixed-step method.
        SolverError: non-finite state or step underflow.

    Notes:
        Deterministic. An answer does not depend on batch mates beyond the rounding of the matrix
        products. Time and memory are linear in B and in the attempts of the molecule that needs the
        most. Once differentiable, in y0 and the parameters, through each molecule's initial step
        as `solve_joint` is; `times` get no gradient.
    """
    if not tableau.is_adaptive:
        raise ValueError(
            f"per_molecule: `tableau` must be an adaptive method, got {tableau.name!r}; pass e.g. "
            "dopri5"
        )
    times = times.detach().double()
    first, last = torch.stack((times.amin(), times.amax())).tolist()
    check_times("per_molecule", first, last)
    modes, batch, components, channels = y0.shape
    rows = y0.permute(1, 2, 0, 3).reshape(batch * components, modes, channels)
    values: Tensor = _PerMoleculeSolve.apply(  # type: ignore[no-untyped-call]
        rhs,
        Method(tableau, rtol, atol, components),
        SolveStats() if stats is None else stats,
        times,
        rows,
        *rhs.parameters,
    )
    if y0.is_complex():
        values = torch.view_as_complex(values.view(*values.shape[:2], -1, 2))
    return values.view(batch, -1, components, modes, channels)
