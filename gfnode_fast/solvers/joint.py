"""The published solve, linear in the batch: torchdiffeq's accepted steps, each molecule's own
times.

dopri5 and its kin choose their steps without regard to the output times and read the values in
between from a quartic on the step's stages, so nothing is gained by walking the union of all
molecules' times: the steps are taken once (one error norm over the whole batch, as published) and
every molecule reads its own T times.

The gradient is that of the published solver, by record and replay: a step's start (y0, k_0) and its
size are kept, its stages are recomputed in backward. torchdiffeq detaches the step sizes that its
controller derives but not the first one, h: if the first step is accepted, every step start and
every interpolation abscissa moves with h, and h depends on y0 and the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.control import initial_step
from gfnode_fast.solvers.errors import check_times
from gfnode_fast.solvers.joint_linear import is_linear_joint, solve_linear_joint
from gfnode_fast.solvers.powers import by_molecule
from gfnode_fast.solvers.published import integrate_published
from gfnode_fast.solvers.rhs import LinearRHS, RightHandSide
from gfnode_fast.solvers.stage import fill_stages, flat, inner, spread
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau, dense_tensor


@dataclass
class _Step:
    """An accepted step: its start (y0, k_0), time and size."""

    y0: Tensor
    k0: Tensor
    time: float
    size: float


@dataclass
class _Record:
    """Everything backward needs of a solve."""

    steps: list[_Step] = field(default_factory=list)
    first_accepted: bool = False  # then h carries gradient


def _dense_weights(
    tableau: Tableau, times: Tensor, step: _Step, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (B, T, J+1) of the buffer for the times inside a step, 0 for all others.

    Also returns x (B, T), the abscissae, and the mask (B, T) of the times inside.
    """
    end = step.time + step.size
    inside = (times > step.time) & (times <= end)
    x = ((times - step.time) / (end - step.time)).where(inside, times.new_zeros(()))
    powers = torch.stack((x, x**2, x**3, x**4), dim=-1)
    stages = powers @ dense_tensor(tableau, times.device) * step.size
    weights = torch.cat((inside.unsqueeze(-1).to(times.dtype), stages), dim=-1)
    return weights.to(dtype), x, inside


def _dense_weight_slopes(tableau: Tableau, x: Tensor, inside: Tensor, *, is_first: bool) -> Tensor:
    """d weights / dh (B, T, J), float64, of the stages inside a step.

    The first step starts at 0 and has size h: weight h b(s / h). Later ones keep their size and
    start later with h: weight dt b((s - h - c) / dt).
    """
    dense = dense_tensor(tableau, x.device)
    powers = torch.stack((x, x**2, x**3, x**4), dim=-1)
    slopes = torch.stack((torch.ones_like(x), 2 * x, 3 * x**2, 4 * x**3), dim=-1)
    value = (powers - x.unsqueeze(-1) * slopes) @ dense if is_first else -slopes @ dense
    return value * inside.unsqueeze(-1)


def _integrate(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
    stats: SolveStats,
) -> tuple[Tensor, _Record]:
    """y0 (M, R, C), times (B, T) float64 → values (B, T, X) real, and the record."""
    batch, num_times = times.shape
    record = _Record()
    num_modes, rows, channels = y0.shape
    buffer = y0.new_empty(tableau.num_stages + 1, rows, num_modes, channels)
    width = flat(buffer).shape[1] // batch
    values = flat(buffer).new_zeros(batch, num_times, width)

    def accept(start: Tensor, stages: Tensor, time: float, size: float) -> None:
        buffer[0] = start.transpose(0, 1)
        buffer[1:] = stages.permute(3, 1, 0, 2)
        step = _Step(buffer[0].clone(), buffer[1].clone(), time, size)
        record.steps.append(step)
        weights, _, _ = _dense_weights(tableau, times, step, values.dtype)
        values.baddbmm_(weights, by_molecule(buffer, batch))

    earliest, last = torch.stack(times.aminmax()).tolist()
    check_times("joint", earliest, last)
    evaluations, rejected, record.first_accepted = integrate_published(
        rhs.published, y0, last, tableau, rtol, atol, accept, rows // batch
    )
    stats.evaluations += evaluations
    stats.accepted += len(record.steps)
    stats.rejected += rejected
    return values, record


class _JointSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rhs: RightHandSide,
        tableau: Tableau,
        tolerances: tuple[float, float],
        stats: SolveStats,
        times: Tensor,
        y0: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        values, record = _integrate(rhs, y0, times, tableau, *tolerances, stats)
        ctx.rhs, ctx.tableau, ctx.tolerances = rhs, tableau, tolerances
        ctx.steps = [(s.time, s.size) for s in record.steps]
        ctx.first_accepted = record.first_accepted
        starts = [t for s in record.steps for t in (s.y0, s.k0)]
        ctx.save_for_backward(times, y0, *parameters, *starts)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        times, _, *saved = ctx.saved_tensors
        count = len(ctx.rhs.parameters)
        parameters, starts = saved[:count], saved[count:]
        steps = [
            _Step(y0, k0, time, size)
            for y0, k0, (time, size) in zip(starts[::2], starts[1::2], ctx.steps, strict=True)
        ]
        grad_y0, grads = _adjoint(
            ctx.rhs, parameters, ctx.tableau, ctx.tolerances, times, steps,
            ctx.first_accepted, grad_values.contiguous(),
        )  # fmt: skip
        return None, None, None, None, None, grad_y0.transpose(0, 1), *grads


def _adjoint(
    rhs: RightHandSide,
    parameters: Sequence[Tensor],
    tableau: Tableau,
    tolerances: tuple[float, float],
    times: Tensor,
    steps: list[_Step],
    first_accepted: bool,
    grad_values: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of y0 and of the parameters from the gradient (B, T, X) of the values."""
    batch = times.shape[0]
    first = steps[0]
    tape = rhs.tape(parameters, wants_time=first_accepted)
    buffer = first.y0.new_empty(tableau.num_stages + 1, *first.y0.shape)
    grad_buffer = torch.empty_like(buffer)
    grad_y = torch.zeros_like(first.y0)
    grad_k = torch.zeros_like(first.y0)
    grad_h = torch.zeros((), dtype=torch.float64, device=times.device)
    time_slopes: dict[int, float] = {}  # d (evaluation's time) / dh
    for index in reversed(range(len(steps))):
        step = steps[index]
        numbers = [-1]  # k_0 belongs to the step before
        points = [step.y0]

        def evaluate(
            when: float, point: Tensor, numbers: list[int] = numbers, points: list[Tensor] = points
        ) -> Tensor:
            k, number = tape.evaluate(when, point)
            numbers.append(number)
            points.append(point)
            return k

        buffer[0], buffer[1] = step.y0, step.k0
        y1 = fill_stages(evaluate, buffer, tableau, step.time, step.size)
        weights, x, inside = _dense_weights(tableau, times, step, grad_values.dtype)
        pulled = torch.bmm(weights.transpose(1, 2), grad_values)
        by_molecule(grad_buffer, batch).copy_(pulled)
        is_first = index == 0
        if first_accepted:
            slopes = _dense_weight_slopes(tableau, x, inside, is_first=is_first)
            products = torch.bmm(grad_values, by_molecule(buffer[1:], batch).transpose(1, 2))
            grad_h += (products * slopes).sum()
        grad_buffer[-1] += grad_k
        spread(grad_buffer, 1.0, tableau.solution, step.size, grad_y)
        moves_with_h = first_accepted and is_first
        if moves_with_h:
            grad_h += inner(grad_y, y1 - step.y0) / step.size
        for stage in range(tableau.num_stages - 1, 0, -1):
            grad_point = tape.pull_back(numbers[stage], grad_buffer[stage + 1])
            spread(grad_buffer, 1.0, tableau.beta[stage - 1], step.size, grad_point)
            if moves_with_h:
                grad_h += inner(grad_point, points[stage] - step.y0) / step.size
            time_slopes[numbers[stage]] = tableau.alpha[stage - 1] if is_first else 1.0
        tape.flush()
        grad_y, grad_k = grad_buffer[0].clone(), grad_buffer[1].clone()
    grads, grad_times = tape.finish()
    grad_h += sum(grad_times[n] * slope for n, slope in time_slopes.items() if n in grad_times)
    return _adjoint_of_start(
        rhs, parameters, tableau, tolerances, first, grad_y, grad_k, grad_h, list(grads)
    )


def _adjoint_of_start(
    rhs: RightHandSide,
    parameters: Sequence[Tensor],
    tableau: Tableau,
    tolerances: tuple[float, float],
    first: _Step,
    grad_y: Tensor,
    grad_k: Tensor,
    grad_h: Tensor,
    grads: list[Tensor | None],
) -> tuple[Tensor, list[Tensor | None]]:
    """Pull back k_0 = g(0, y0) and the initial step h(y0, k_0)."""
    leaves = [p.detach().requires_grad_() for p in parameters]
    bound = rhs.bind(leaves)
    y0 = first.y0.detach().requires_grad_()
    real = y0.real.dtype if y0.is_complex() else y0.dtype
    with torch.enable_grad():
        k0 = bound(torch.zeros((), dtype=real, device=y0.device), y0)
        h = initial_step(bound, y0, k0, tableau, *tolerances)
        outputs, seeds = [k0], [grad_k]
        if h.requires_grad:
            outputs.append(h)
            seeds.append(grad_h)
    more = torch.autograd.grad(outputs, [y0, *leaves], seeds, allow_unused=True)
    for i, extra in enumerate(more[1:]):
        if extra is not None:
            mine = grads[i]
            grads[i] = extra if mine is None else mine + extra
    grad_y0 = grad_y if more[0] is None else grad_y + more[0]
    return grad_y0, grads


def solve_joint(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
    stats: SolveStats | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Values at every molecule's own times, with the published solver's steps and gradients.

    Args:
        rhs: right-hand side.
        y0: (M, B, D, C) state at s = 0, real or complex; D components ride along as rows.
        times: (B, T) normalised times > 0.
        tableau: an adaptive method.
        rtol, atol: tolerances; the error norm is the RMS over the whole batch state.
        stats: counts evaluations and steps when given.
        backend: where the solve is one of powers (`joint_linear`): "torch", "cpp" or "auto"
            (`powers.choose_powers`). Without effect elsewhere.

    Returns:
        (B, T, D, M, C).

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: non-finite state or step underflow.

    Notes:
        Deterministic. Time and memory are linear in B and T. Once differentiable, in y0 and the
        parameters; `times` get no gradient.
    """
    modes, batch, components, channels = y0.shape
    num_times = times.shape[1]
    stats = SolveStats() if stats is None else stats
    times = times.detach().double()
    values: Tensor
    if isinstance(rhs, LinearRHS) and is_linear_joint(rhs, tableau):
        values = solve_linear_joint(rhs, y0, times, tableau, rtol, atol, stats, backend)
    else:
        values = _JointSolve.apply(  # type: ignore[no-untyped-call]
            rhs,
            tableau,
            (rtol, atol),
            stats,
            times,
            y0.reshape(modes, batch * components, channels),
            *rhs.parameters,
        )
    if y0.is_complex():
        values = torch.view_as_complex(
            values.view(batch, num_times, components, modes, channels, 2)
        )
    return values.view(batch, num_times, components, modes, channels)
