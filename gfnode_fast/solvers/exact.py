"""Linear and affine dynamics without a solver: the truncated exponential at each molecule's times.

    y' = y W           y(t + x) = Σ_k x^k/k! P_k,   P_0 = y(t), P_{k+1} = P_k W
    y' = y W + s b     the same with P_1 = P_0 W + t b, P_2 = P_1 W + b

Time is cut into steps of size h = 1 / n, one step for trained norms, so that θ = h ‖W‖ is small
enough for the degree K. Both n and K follow from ‖W‖ alone: they do not depend on the times, so an
answer does not depend on batch mates. A step costs K products for the whole batch; every molecule
reads its own times from the P_k by one batched product.

Remainder. Written with the integral form of Taylor's remainder, what is left out of a step is at
most θ^(K+1)/(K+1)! max‖y‖, the maximum along that step. As a matrix, T_K(hW) = exp(hW) (I + E) with
‖E‖ <= e^θ θ^(K+1)/(K+1)! / (1 - θ/(K+2)): the steps together solve exactly, for rounding-free
arithmetic, a system whose W is off by about ‖E‖/h (Al-Mohy and Higham, SIAM J. Sci. Comput. 33
(2011) 488). Degrees are chosen with one order to spare, so that the derivative with respect to W,
whose remainder is θ^K/K!, meets the tolerance too. With a forcing s b the remainder is
θ^(K-1)/(K+1)! e^θ h²‖y''(t)‖, and since y'' changes by less than half its size within
x = min(h, 0.4/‖W‖), the second difference of y bounds x²‖y''‖ by 32 max‖y‖.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers import powers
from gfnode_fast.solvers.errors import SolverError, check_state, check_times
from gfnode_fast.solvers.forced import forced_response
from gfnode_fast.solvers.powers import Powers, choose_powers
from gfnode_fast.solvers.rhs import LinearRHS, RightHandSide
from gfnode_fast.solvers.stage import flat
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import kept

MAX_DEGREE = 30
MAX_THETA = {torch.float32: 2.0, torch.float64: 4.0}  # e^θ times rounding stays within the bound
HALF = (torch.float16, torch.bfloat16)
MAX_STEPS = 100_000
NORM_SLACK = 1.001  # the norm itself is computed with rounding


def remainder(theta: float, degree: int, *, affine: bool) -> float:
    """Bound of a step's remainder relative to max‖y‖, and of its derivative's, at ‖hW‖ = θ."""
    if theta >= degree + 1:
        return math.inf
    if not affine:
        bound = theta**degree / math.factorial(degree)
        return math.exp(theta) * bound / (1 - theta / (degree + 1))
    if degree < 3:  # the derivative's remainder carries θ^(K-2), which must vanish with W
        return math.inf
    widening = 32 * max(1.0, (theta / 0.4) ** 2)
    return widening * math.exp(theta) * theta ** (degree - 2) / math.factorial(degree)


@lru_cache(maxsize=8)
def largest_thetas(dtype: torch.dtype, affine: bool) -> tuple[tuple[int, float], ...]:
    """(K, largest θ that degree K serves) to the rounding of `dtype`, by bisection."""
    tolerance = torch.finfo(dtype).eps
    table = []
    for degree in range(3 if affine else 1, MAX_DEGREE + 1):
        low, high = 0.0, MAX_THETA[dtype]
        for _ in range(100):
            middle = (low + high) / 2
            if remainder(middle, degree, affine=affine) <= tolerance:
                low = middle
            else:
                high = middle
        table.append((degree, low))
    return tuple(table)


def degree_and_substeps(norm: float, dtype: torch.dtype, *, affine: bool) -> tuple[int, int]:
    """The cheapest degree K and number n of steps per unit of time for a given ‖W‖."""
    best = (math.inf, 0, 0)
    for degree, theta in largest_thetas(dtype, affine):
        substeps = max(1, math.ceil(norm / theta))
        best = min(best, (degree * substeps, degree, substeps))
        if substeps == 1:  # a higher degree costs more
            break
    return best[1:]


@dataclass(frozen=True)
class Plan:
    """How a solve goes about it.

    Attributes:
        norm: bound of ‖W‖.
        degree: K. substeps: per unit of time.
        may_overflow: whether the values have to be looked at.
        powers: who multiplies.
    """

    norm: float
    degree: int
    substeps: int
    num_steps: int
    may_overflow: bool
    powers: Powers = powers.TORCH


def make_plan(
    rows: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    times: Tensor,
    components: int,
    multiplies: Powers = powers.TORCH,
) -> Plan:
    """Reads ‖W‖, max |y0|, max |b| and the times' range: the one host synchronisation of a solve.

    ‖W‖ is bounded by sqrt(‖W‖_1 ‖W‖_∞), the largest over the modes.
    """
    size = weight.detach().abs()
    norms = size.sum(dim=1).amax(dim=1) * size.sum(dim=2).amax(dim=1)
    measured = [norms.amax().sqrt(), rows.detach().abs().amax(), times.amin(), times.amax()]
    if slope is not None:
        measured.append(slope.detach().abs().amax())
    norm, start, first, last, *force = torch.stack([m.double() for m in measured]).tolist()
    check_times("exact", first, last)
    if not math.isfinite(start):
        check_state("exact", rows, 0.0, 0.0, components)
    if not all(map(math.isfinite, (norm, *force))):
        raise SolverError(
            f"exact: the weights must be finite, got a norm of {norm:g} at s = 0; lower the "
            "learning rate or restart from an earlier checkpoint",
            time=0.0,
            step=0.0,
            rows=[],
        )
    norm *= NORM_SLACK
    dtype = weight.real.dtype if weight.is_complex() else weight.dtype
    degree, substeps = degree_and_substeps(norm, dtype, affine=slope is not None)
    if last * substeps > MAX_STEPS:
        raise SolverError(
            f"exact: ‖sW‖ must be below about {MAX_STEPS * MAX_THETA[dtype] / 2:.0e}, got "
            f"{norm * last:.3g} (step {1 / substeps:.3g}, s up to {last:.3g}); use smaller weights "
            "or earlier times",
            time=0.0,
            step=1 / substeps,
            rows=[],
        )
    largest = start + max(last, 1.0) ** 2 * sum(force)
    terms = MAX_THETA[dtype] + degree * math.log(max(norm / substeps, 1.0))
    growth = norm * last + terms + math.log(max(largest, 1.0) * weight.shape[-1])
    may_overflow = growth > math.log(torch.finfo(dtype).max) - 1
    num_steps = max(1, math.ceil(last * substeps))
    return Plan(norm, degree, substeps, num_steps, may_overflow, multiplies)


@lru_cache(maxsize=64)
@kept()
def _taylor_table(degree: int, device: torch.device) -> Tensor:
    """1, 1, 1/2, ... 1/K! on the diagonal."""
    numbers = torch.arange(degree + 1, dtype=torch.float64)
    return torch.diag(1 / numbers.clamp(min=1).cumprod(0)).to(device)


def _reading_weights(plan: Plan, times: Tensor, step: int, like: Tensor) -> Tensor:
    """Weights (B, T, K+1) of the derivatives at a step's start, 0 for times outside the step."""
    end = step + 1.0 if step + 1 < plan.num_steps else math.inf
    table = _taylor_table(plan.degree, times.device)
    return plan.powers.weights(times, table, float(step), 1.0, end, like)


def _end_weights(plan: Plan, like: Tensor) -> Tensor:
    return _taylor_table(plan.degree, like.device).diagonal().to(like.dtype)


def _derivatives(
    plan: Plan, step: int, state: Tensor, weight: Tensor, slope: Tensor | None
) -> Tensor:
    """P (K+1, R, M, C) at a step's start."""
    buffer = state.new_empty(plan.degree + 1, *state.shape)
    buffer[0] = state
    plan.powers.fill(buffer, weight, slope, step)
    return buffer


def _drop_arrived(state: Tensor, times: Tensor, step: int) -> Tensor:
    """State with zeros for molecules past their last time, which would overflow for their mates."""
    active = (times > step).any(dim=1).repeat_interleave(len(state) // len(times))
    return state.where(active.view(-1, 1, 1), 0)


def _check_finite(plan: Plan, buffer: Tensor, batch: int, step: int) -> None:
    """Raise SolverError if a step's derivatives are not finite."""
    bad = ~torch.isfinite(flat(buffer).view(len(buffer), batch, -1)).all(dim=2).all(dim=0)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        time, size = step / plan.substeps, 1 / plan.substeps
        raise SolverError(
            f"exact: the state must be finite, got an overflow of {buffer.dtype} after s = "
            f"{time:.6g} (step {size:.3g}) in molecule(s) {rows[:8]}"
            f"{' ...' if len(rows) > 8 else ''}; lower the learning rate or use float64",
            time=time,
            step=size,
            rows=rows,
        )


class _ExactSolve(torch.autograd.Function):
    """In units of one step: times, W and b come scaled, so that h = 1 and no power overflows."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        times: Tensor,
        rows: Tensor,
        weight: Tensor,
        slope: Tensor | None,
    ) -> Tensor:
        batch = len(times)
        starts = [rows]
        values: Tensor | None = None
        for step in range(plan.num_steps):
            if plan.may_overflow:
                starts[-1] = _drop_arrived(starts[-1], times, step)
            buffer = _derivatives(plan, step, starts[-1], weight, slope)
            if plan.may_overflow:
                _check_finite(plan, buffer, batch, step)
            reading = _reading_weights(plan, times, step, buffer)
            values = plan.powers.read(reading, buffer, values)
            if step + 1 < plan.num_steps:
                ends = _end_weights(plan, values).expand(batch, 1, -1).contiguous()
                end = plan.powers.read(ends, buffer)
                starts.append(powers.as_complex_or_real(end, rows))
        ctx.plan, ctx.has_slope = plan, slope is not None
        forced = () if slope is None else (slope,)
        ctx.save_for_backward(times, rows, weight, *forced, buffer, *starts)
        assert values is not None
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        plan: Plan = ctx.plan
        times, _, weight, *saved = ctx.saved_tensors
        slope = saved.pop(0) if ctx.has_slope else None
        buffer, *starts = saved
        grad_values = grad_values.contiguous()
        grad_weight = grad_slope = grad_state = None
        for step in reversed(range(plan.num_steps)):
            if step + 1 < plan.num_steps:
                buffer = _derivatives(plan, step, starts[step], weight, slope)
            reading = _reading_weights(plan, times, step, grad_values)
            grad = plan.powers.pull_readings(reading, grad_values, buffer)
            if grad_state is not None:
                end = _end_weights(plan, grad_values)
                flat(grad).addr_(end, flat(grad_state.unsqueeze(0))[0])
            of_weight, of_slope = plan.powers.pull_back(buffer, grad, weight, slope, step)
            grad_weight = of_weight if grad_weight is None else grad_weight.add_(of_weight)
            if of_slope is not None:
                grad_slope = of_slope if grad_slope is None else grad_slope.add_(of_slope)
            grad_state = grad[0]
        return None, None, grad_state, grad_weight, grad_slope


def solve_exact(
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    stats: SolveStats | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Values of linear or affine dynamics at every molecule's own times, without a solver.

    Args:
        rhs: a right-hand side that does not mix modes.
        y0: (M, B, D, C) state at s = 0, real or complex; D components ride along as rows.
        times: (B, T) normalised times > 0.
        rtol, atol: tolerances of the quadrature of a forcing that is not proportional to s; the
            part that is linear in y0, and a forcing s b, are exact whatever they are.
        stats: counts products with W (evaluations) and steps when given.
        backend: of the products, "torch", "cpp" or "auto" (`powers.choose_powers`).

    Returns:
        (B, T, D, M, C). Relative to max‖y‖ along the path the error is at most 1e-6 max(1, ‖sW‖) in
        float32, in which half precision is solved too, and 1e-13 max(1, ‖sW‖) in float64, apart
        from how much the dynamics itself magnifies rounding.

    Raises:
        ValueError: a right-hand side that mixes modes, so is not linear.
        SolverError: a state or weights that are not finite; a forcing that cannot be resolved.
        RuntimeError: C++ was asked for and cannot serve.

    Notes:
        Deterministic. Linear in B and T; ‖sW‖ / 2 or so steps when that exceeds 1. The norms of W
        and y0 are read on the host once per solve, on a GPU too. Once differentiable, in y0 and the
        parameters (the forcing's own any number of times); `times` get no gradient. An answer does
        not depend on batch mates: bit for bit in C++, up to the rounding of BLAS in PyTorch.
    """
    if not isinstance(rhs, LinearRHS):
        raise ValueError(
            "exact: `rhs` must be linear or affine in y, got one that mixes modes; use "
            "mode_interaction='no_interaction' or solver_mode='joint'"
        )
    modes, batch, components, channels = y0.shape
    rows = y0.permute(1, 2, 0, 3).reshape(batch * components, modes, channels).contiguous()
    times = times.detach().double().contiguous()
    weight, slope = rhs.weight.contiguous(), rhs.slope()
    if weight.dtype in HALF:  # to whose rounding no degree solves
        rows, weight = rows.float(), weight.float()
        slope = None if slope is None else slope.float()
    multiplies = choose_powers("exact", backend, rows)
    plan = make_plan(rows, weight, slope, times, components, multiplies)
    forced, scaled = slope, times
    if plan.substeps > 1:
        weight, scaled = weight / plan.substeps, times * plan.substeps
        forced = None if slope is None else slope / plan.substeps**2
    values: Tensor = _ExactSolve.apply(  # type: ignore[no-untyped-call]
        plan, scaled, rows, weight, forced
    )
    if stats is not None:
        stats.evaluations += plan.degree * plan.num_steps
        stats.accepted += plan.num_steps
    if y0.is_complex():
        values = torch.view_as_complex(values.view(*values.shape[:2], -1, 2))
    values = values.view(batch, -1, components, modes, channels)
    if slope is None and rhs.forcing is not None:
        values = values + forced_response(rhs, times, rtol, atol).unsqueeze(2)
    return values.to(y0.dtype)
