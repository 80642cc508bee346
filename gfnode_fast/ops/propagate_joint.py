"""Linear dynamics dy/ds = y W under the published joint step control.

Torch: `gfnode_fast.solvers.joint`. Triton: one launch an attempt, decisions on the device, then one
launch that reads every molecule's own times; the host never waits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import choose_backend, require_triton
from gfnode_fast.ops.mode_rhs_registered import unserved_by_triton
from gfnode_fast.ops.propagate_exact import check_linear, check_triton, no_values
from gfnode_fast.solvers.control import TINY_NORM, TINY_STEP
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.rhs import LinearRHS
from gfnode_fast.solvers.tableau import ADAPTIVE, Tableau

MAX_ATTEMPTS = 16
FSAL = tuple(name for name, tableau in ADAPTIVE.items() if tableau.ends_on_last_stage)
RUNNING, DONE, NOT_FINITE, UNDERFLOW = 0, 1, 2, 3
BAD_TIME = 4


def propagate_joint(
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    *,
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_attempts: int = MAX_ATTEMPTS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Values of dy/ds = y W at each molecule's times, with the published steps and gradients.

    Args:
        y0: (B, M, D, C) state at s = 0: M modes of D components (1, or 3 Cartesian ones) of C
            channels.
        weight: W (M, C, C), dtype and device of y0; y is multiplied from the left.
        times: (B, T) normalised times > 0, floating point.
        solver: an adaptive method; with Triton one whose last stage is the step's end ("dopri5",
            "bosh3", "dopri8").
        rtol, atol: tolerances; the error norm is the RMS over the whole batch state.
        max_attempts: Triton: how many step attempts are launched. Those after the end cost a launch
            each; a solve that needs more is reported in the status.
        backend: "torch", "triton" (fp32 and fp64, C <= 64), or "auto", which is "triton" where
            it serves and has passed on this family of GPU (`dispatch.verified_gpus`), else "torch".

    Returns:
        Values (T, B, M, D, C), and a status, 0-dim int32: 1 where the solve arrived; 0 needs more
        attempts, 2 not finite, 3 step underflow, 4 a time that is not positive and finite. On the
        CPU the status has been looked at, outside of compiled graphs; elsewhere give it to
        `check_joint_status` where the host waits anyway.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values that do not match.
        SolverError: on the CPU a solve that did not arrive.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        Deterministic. Once differentiable, through the initial step as published; `times` get no
        gradient. Triton's steps are the published ones to rounding of the norms: at a step whose
        error ratio is 1 to rounding the decision may differ. dopri8's error estimate cancels so far
        that its step sizes agree to about 1e-7 only.
    """
    op = "propagate_joint"
    check_linear(op, y0, weight, times, None)
    if solver not in ADAPTIVE:
        raise ValueError(
            f"{op}: `solver` must be one of {', '.join(ADAPTIVE)}, got {solver!r}; choose an "
            "adaptive method"
        )
    unserved = unserved_by_triton(y0)
    if solver not in FSAL:
        unserved = f"the Triton kernels serve {', '.join(FSAL)}, not {solver}"
    backend, _ = choose_backend(op, backend, y0.device, unserved=unserved)
    if backend == "torch":
        return _on_torch(y0, weight, times, ADAPTIVE[solver], rtol, atol)
    check_triton(op, y0)
    if solver not in FSAL:
        raise ValueError(
            f"{op}: `solver` must be one of {', '.join(FSAL)} with backend='triton', got "
            f"{solver!r}; use backend='torch'"
        )
    if max_attempts < 1:
        raise ValueError(f"{op}: `max_attempts` must be at least 1, got {max_attempts}; raise it")
    wide = times.detach().double()
    values, *_, status = torch.ops.gfnode_fast.propagate_joint(
        y0, weight, wide, solver, rtol, atol, max_attempts
    )
    if y0.device.type == "cpu" and not torch.compiler.is_compiling():
        check_joint_status(status)
    return values, status


def check_joint_status(status: Tensor) -> None:
    """Raise if a solve failed; reads `status` on the host.

    Args:
        status: 0-dim int32 from `propagate_joint`.

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: a solve that did not arrive.
    """
    code = int(status)
    if code == DONE:
        return
    if code == BAD_TIME:
        raise ValueError(
            "propagate_joint: `times` must be positive and finite, got others; time 0 is the given "
            "state"
        )
    reason = {
        RUNNING: "got to none of the last times in `max_attempts` attempts; raise it, or loosen "
        "rtol and atol",
        NOT_FINITE: "met a state or error norm that is not finite; check the inputs, lower the "
        "learning rate or tighten rtol and atol",
        UNDERFLOW: "met a step that no longer advances time; loosen rtol and atol or use smaller "
        "weights",
    }[code]
    raise SolverError(
        f"propagate_joint: the solve must arrive, but {reason}",
        time=float("nan"),
        step=float("nan"),
        rows=[],
    )


def _on_torch(
    y0: Tensor, weight: Tensor, times: Tensor, tableau: Tableau, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    status = torch.full((), DONE, dtype=torch.int32, device=y0.device)
    if y0.numel() == 0 or times.numel() == 0:
        return no_values(y0, weight, times), status
    if not bool(((times > 0) & (times < float("inf"))).all()):
        check_joint_status(torch.tensor(BAD_TIME))
    rhs = LinearRHS(lambda s, y: torch.bmm(y, weight.detach()), weight)
    values = solve_joint(rhs, y0.transpose(0, 1), times, tableau, rtol, atol)
    return values.permute(1, 0, 3, 2, 4), status


def polynomial_table(tableau: Tableau) -> Tensor:
    """Dense output, end and error of a step of linear dynamics in v_k = y (hW)^k.

    Returns:
        (K+1, 8) float64, K the number of stages: p_k's coefficients of 1, x, ... x^4, then e_k,
        r_k and 0: y(t + x h) = Σ_k p_k(x) v_k, y_1 = Σ_k e_k v_k, error = Σ_k r_k v_k.
    """
    count = tableau.num_stages
    start = torch.zeros(count + 1, dtype=torch.float64)
    start[0] = 1
    stages: list[Tensor] = []  # h k_j
    for beta in ((), *tableau.beta):
        point = start.clone()
        for factor, stage in zip(beta, stages, strict=False):
            point += factor * stage
        stages.append(point.roll(1))
    basis = torch.stack(stages)
    end = start + torch.tensor(tableau.solution, dtype=torch.float64) @ basis
    error = torch.tensor(tableau.error, dtype=torch.float64) @ basis
    dense = tableau.dense.cpu() @ basis
    return torch.stack((start, *dense, end, error, torch.zeros_like(start)), dim=1)


@lru_cache(maxsize=16)
def _constants(
    solver: str, rtol: float, atol: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    settings = torch.tensor([rtol, atol], dtype=torch.float64)
    return polynomial_table(ADAPTIVE[solver]).contiguous().to(device), settings.to(device)


def _pull_first_size(
    grad_size: Tensor, y0: Tensor, weight: Tensor, order: int, rtol: float, atol: float
) -> tuple[Tensor, Tensor]:
    """Gradients of y0 and W from that of the first step's size, by hand: nothing reads the host.

    The size is min(d0 / d1, (0.01 / max(d1, d2))^(1/order)) with d_i the RMS of (y, yW, yWW) / s,
    s = atol + rtol |y|; constant where the norms are tiny (`solvers.control.initial_step`).
    """
    scale = atol + rtol * y0.abs()
    f0 = torch.matmul(y0, weight)
    states = (y0, f0, torch.matmul(f0, weight))
    scaled = [y / scale for y in states]
    d0, d1, d2 = (q.double().square().mean().sqrt() for q in scaled)
    tiny = (d0 < TINY_NORM) | (d1 < TINY_NORM)
    still = (d1 <= 1e-15) & (d2 <= 1e-15)
    safe_d1 = d1.where(~tiny, 1)
    hundred_h0 = (d0 / safe_d1).where(~tiny, 100 * TINY_STEP)
    largest = torch.where(d2 > d1, d2, d1).where(~still, 1)
    h1 = (0.01 / largest) ** (1.0 / order)
    by_h0 = (hundred_h0 < h1) & ~tiny & ~still
    by_h1 = (h1 < hundred_h0) & ~still
    of_largest = (-h1 / (order * largest)).where(by_h1, 0)
    by_norm = (
        (1 / safe_d1).where(by_h0, 0),
        (-d0 / safe_d1**2).where(by_h0, 0) + of_largest.where(d2 <= d1, 0),
        of_largest.where(d2 > d1, 0),
    )
    grad_states, grad_scale = [], torch.zeros_like(y0)
    for q, norm, slope in zip(scaled, (d0, d1, d2), by_norm, strict=True):
        factor = (grad_size * slope / (norm * q.numel())).where(norm > 0, 0).to(q.dtype)
        grad_states.append(factor * q / scale)
        grad_scale -= factor * q * q / scale
    adjoint = weight.transpose(1, 2)
    grad_f0 = grad_states[1] + torch.matmul(grad_states[2], adjoint)
    grad_y0 = grad_states[0] + torch.matmul(grad_f0, adjoint) + rtol * y0.sign() * grad_scale
    before = torch.cat((y0, f0)).transpose(0, 1).flatten(1, 2)
    after = torch.cat((grad_f0, grad_states[2])).transpose(0, 1).flatten(1, 2)
    return grad_y0, torch.bmm(before.transpose(1, 2), after)


@torch.library.custom_op(
    "gfnode_fast::propagate_joint",
    mutates_args=(),
    schema="(Tensor y0, Tensor weight, Tensor times, str solver, float rtol, float atol, "
    "int max_attempts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _propagate_joint(
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    solver: str,
    rtol: float,
    atol: float,
    max_attempts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values; record, steps and starts, for backward; status."""
    from gfnode_fast.kernels import propagate_joint_launch as kernels

    require_triton("propagate_joint", y0)
    table, settings = _constants(solver, rtol, atol, y0.device)
    empty = y0.numel() == 0 or times.numel() == 0
    last = times.new_zeros(()) if empty else times.amax()
    solved = kernels.launch_joint_steps(
        y0, weight, last, table, settings, ADAPTIVE[solver].order, max_attempts
    )
    values = kernels.launch_joint_read_fwd(solved, weight, table, times, y0.shape[2])
    if empty:
        return values, *solved, torch.full((), DONE, dtype=torch.int32, device=y0.device)
    good = ((times > 0) & (times < float("inf"))).all()
    status = solved.record[3].where(good, BAD_TIME).to(torch.int32)
    return values, solved.record.clone(), solved.steps, solved.starts, status


@_propagate_joint.register_fake
def _(
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    solver: str,
    rtol: float,
    atol: float,
    max_attempts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, modes, components, channels = y0.shape
    return (
        y0.new_empty(times.shape[1], *y0.shape),
        times.new_empty(8),
        times.new_empty(max_attempts, 2),
        y0.new_empty(max_attempts + 1, batch * components, modes, channels),
        torch.empty((), dtype=torch.int32, device=y0.device),
    )


@torch.library.custom_op(
    "gfnode_fast::propagate_joint_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor y0, Tensor weight, Tensor times, Tensor record, Tensor steps, "
    "Tensor starts, str solver, float rtol, float atol) -> (Tensor, Tensor)",
)
def _propagate_joint_bwd(
    grad: Tensor,
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    record: Tensor,
    steps: Tensor,
    starts: Tensor,
    solver: str,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    from gfnode_fast.kernels import propagate_joint_launch as kernels

    table, _ = _constants(solver, rtol, atol, y0.device)
    solved = kernels.JointSteps(record, steps, starts)
    grad_y0, grad_weight, grad_size = kernels.launch_joint_read_bwd(
        grad, solved, weight, table, times
    )
    if grad.numel() == 0:
        return grad_y0, grad_weight
    # a first step that was rejected leaves its size as a constant to the ones after it
    seed = grad_size.where(record[4] > 0, 0)
    order = ADAPTIVE[solver].order
    more_y0, more_weight = _pull_first_size(seed, y0, weight, order, rtol, atol)
    return grad_y0 + more_y0, grad_weight + more_weight


@_propagate_joint_bwd.register_fake
def _(
    grad: Tensor,
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    record: Tensor,
    steps: Tensor,
    starts: Tensor,
    solver: str,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    return y0.new_empty(y0.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y0, weight, times, ctx.solver, ctx.rtol, ctx.atol, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(y0, weight, times, *output[1:4])


def _pull(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _propagate_joint_bwd(grad, *ctx.saved_tensors, ctx.solver, ctx.rtol, ctx.atol)
    return *grads, None, None, None, None, None


_propagate_joint.register_autograd(_pull, setup_context=_save)
