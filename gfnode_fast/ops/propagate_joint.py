"""Linear and affine dynamics dy/ds = y W + s b under the published joint step control.

Torch: `gfnode_fast.solvers.joint`. Triton: one launch an attempt, decisions on the device, then one
launch that reads every molecule's own times; the host never waits.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gfnode_fast.ops.joint_operator import (
    checked_on_cpu,
    choose_solve,
    joint_on_torch,
    register_solve,
)
from gfnode_fast.ops.joint_start import AffineDynamics
from gfnode_fast.ops.joint_status import MAX_ATTEMPTS
from gfnode_fast.ops.linear_dynamics import check_linear, linear_rhs
from gfnode_fast.solvers.tableau import ADAPTIVE, Tableau, kept

if TYPE_CHECKING:
    from gfnode_fast.kernels.propagate_joint_launch import JointSteps

LinearTensors = tuple[Tensor, Tensor | None]  # W and b


def propagate_joint(
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    *,
    slope: Tensor | None = None,
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_attempts: int = MAX_ATTEMPTS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Values of dy/ds = y W + s b at each molecule's times, with the published steps and gradients.

    Args:
        y0: (B, M, D, C) state at s = 0: M modes of D components (1, or 3 Cartesian ones) of C
            channels.
        weight: W (M, C, C), dtype and device of y0; y is multiplied from the left.
        times: (B, T) normalised times > 0, floating point.
        slope: b (M, C), or None for linear dynamics.
        solver: an adaptive method; with Triton one whose last stage is the step's end ("dopri5",
            "bosh3", "dopri8").
        rtol, atol: tolerances; the error norm is the RMS over the whole batch state.
        max_attempts: Triton: how many step attempts are launched. Those after the end cost a launch
            each; a solve that needs more is reported in the status.
        backend: "torch", "triton" (fp32 and fp64, C <= 64), or "auto", which is "triton" where
            it serves and has passed on this family of GPU (`dispatch.verified_gpus`), else "torch".

    Returns:
        Values (T, B, M, D, C), NaN where the solve did not arrive, and a status, (8,) float64: time
        reached, next step size, accepted steps, code (1 where the solve arrived; 0 needs more
        attempts, 2 not finite, 3 step underflow, 4 a time that is not positive and finite),
        whether the first step was accepted, attempts. On the CPU the status has been looked at,
        outside of compiled graphs; elsewhere give it to `check_joint_status` where the host waits
        anyway.

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
    check_linear(op, y0, weight, times, slope)
    backend = choose_solve(op, backend, y0, solver, max_attempts)
    if backend == "torch":
        rhs = linear_rhs(weight, slope)
        return joint_on_torch(op, rhs, y0, times, ADAPTIVE[solver], rtol, atol)
    solved = joint_on_triton(y0, weight, slope, times, solver, rtol, atol, max_attempts)
    return checked_on_cpu(op, *solved)


def polynomial_table(tableau: Tableau) -> Tensor:
    """Dense output, end and error of a step of linear dynamics in v_k = y (hW)^k.

    Returns:
        (K+1, 8) float64, K the number of stages: p_k's coefficients of 1, x, ... x^4, then e_k,
        r_k and 0: y(t + x h) = Σ_k p_k(x) v_k, y_1 = Σ_k e_k v_k, error = Σ_k r_k v_k.

    Notes:
        The same for affine dynamics: with time as an entry of the state they are linear, since the
        methods' stage times are the sums of their coefficients.
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


@cache  # CUDA graphs have their addresses
@kept()
def _table(solver: str, device: torch.device) -> Tensor:
    return polynomial_table(ADAPTIVE[solver]).contiguous().to(device)


def _launch(
    y0: Tensor,
    dynamics: LinearTensors,
    times: Tensor,
    last: Tensor,
    solver: str,
    tolerances: Tensor,
    attempts: int,
) -> tuple[Tensor, JointSteps]:
    from gfnode_fast.kernels import propagate_joint_launch as kernels

    table, order = _table(solver, y0.device), ADAPTIVE[solver].order
    solved = kernels.launch_joint_steps(y0, *dynamics, last, table, tolerances, order, attempts)
    return kernels.launch_joint_read_fwd(solved, *dynamics, table, times, y0.shape[2]), solved


def _launch_bwd(
    grad: Tensor, solved: JointSteps, dynamics: LinearTensors, times: Tensor, solver: str
) -> tuple[Tensor, list[Tensor], Tensor]:
    from gfnode_fast.kernels import propagate_joint_launch as kernels

    table = _table(solver, grad.device)
    grad_y0, *grads, grad_size = kernels.launch_joint_read_bwd(
        grad, solved, *dynamics, table, times
    )
    return grad_y0, grads, grad_size


joint_on_triton = register_solve(
    "propagate_joint", "Tensor weight, Tensor? slope", _launch, _launch_bwd, AffineDynamics
)
