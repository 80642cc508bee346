"""Attention across modes under the published joint step control.

    dy_m/ds = (Σ_n A_mn y_n) W_m + b_m(s),   A = softmax_n(u_m · y_n),   u_m = y_m P + q(s)

with q and b constant or affine in s. Torch: `gfnode_fast.solvers.joint`. Triton: one launch an
attempt, which also reads the times inside the step before, decisions on the device; the host never
waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gfnode_fast.ops.joint_operator import (
    checked_on_cpu,
    choose_solve,
    joint_on_torch,
    register_solve,
)
from gfnode_fast.ops.joint_status import MAX_ATTEMPTS
from gfnode_fast.ops.linear_dynamics import check_dynamics, check_state_shape
from gfnode_fast.ops.mode_rhs_registered import attention_gradients, mode_attention
from gfnode_fast.solvers.rhs import GeneralRHS
from gfnode_fast.solvers.tableau import ADAPTIVE, kept

if TYPE_CHECKING:
    from gfnode_fast.kernels.propagate_joint_launch import JointSteps

LARGEST_M = 16


def propagate_attention(
    y0: Tensor,
    key: Tensor,
    query_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    times: Tensor,
    *,
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    max_attempts: int = MAX_ATTEMPTS,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Values at each molecule's times, with the published steps and gradients.

    Args:
        y0: (B, M, D, C) state at s = 0: M modes of D components (1, or 3 Cartesian ones) of C
            channels. Components attend separately.
        key: P (C, C), dtype and device of y0; y is multiplied from the left.
        query_bias: q (S, C): the constant and, for S = 2, the slope in s.
        weight: W (M, C, C).
        bias: b (S, M, C).
        times: (B, T) normalised times > 0, floating point.
        solver, rtol, atol, max_attempts: as in `propagate_joint`.
        backend: "torch", "triton" (fp32 and fp64, C <= 64, M <= 16), or "auto", which is "triton"
            where it serves and has passed on this family of GPU (`dispatch.verified_gpus`), else
            "torch".

    Returns:
        Values (T, B, M, D, C) and the status of `propagate_joint`.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values that do not match.
        SolverError: on the CPU a solve that did not arrive.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        As `propagate_joint`: deterministic, once differentiable, through the initial step.
        `gfnode_fast.ops.mode_rhs_folded` makes P, q, W and b of the published parameters.
    """
    op = "propagate_attention"
    _check(op, y0, key, query_bias, weight, bias, times)
    backend = choose_solve(op, backend, y0, solver, max_attempts, LARGEST_M)
    dynamics = (key, query_bias, weight, bias)
    if backend == "torch":
        rhs = GeneralRHS(_published(*dynamics), _derivative, dynamics)
        return joint_on_torch(op, rhs, y0, times, ADAPTIVE[solver], rtol, atol)
    solved = attention_on_triton(y0, *dynamics, times, solver, rtol, atol, max_attempts)
    return checked_on_cpu(op, *solved)


def _check(
    op: str,
    y0: Tensor,
    key: Tensor,
    query_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    times: Tensor,
) -> None:
    check_state_shape(op, y0)
    if query_bias.dim() != 2 or query_bias.shape[0] not in (1, 2):
        raise ValueError(
            f"{op}: `query_bias` must be (1, C) or (2, C), got {tuple(query_bias.shape)}; pass the "
            "constant and, where there is one, the slope in time"
        )
    _, modes, _, channels = y0.shape
    rows = len(query_bias)
    check_dynamics(
        op,
        y0,
        times,
        {
            "key": (key, (channels, channels)),
            "query_bias": (query_bias, (rows, channels)),
            "weight": (weight, (modes, channels, channels)),
            "bias": (bias, (rows, modes, channels)),
        },
    )


def _at(s: Tensor, constant_and_slope: Tensor) -> Tensor:
    value = constant_and_slope[0]
    return value if len(constant_and_slope) == 1 else value + s * constant_and_slope[1]


def _derivative(
    s: Tensor, y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """g of rows y (R, M, C)."""
    u = (y.flatten(0, 1) @ key).view_as(y) + _at(s, query_bias)
    mixed = torch.bmm(torch.bmm(u, y.transpose(1, 2)).softmax(dim=-1), y)
    return torch.bmm(mixed.transpose(0, 1), weight).transpose(0, 1) + _at(s, bias)


def _published(*dynamics: Tensor) -> Any:
    """g of (s, y (M, R, C)), for the steps."""
    fixed = [p.detach() for p in dynamics]
    return lambda s, y: _derivative(s, y.transpose(0, 1), *fixed).transpose(0, 1)


class AttentionDynamics:
    """The dynamics of states (B, M, D, C) and its adjoint, by the kernels of `mode_rhs`."""

    def __init__(self, key: Tensor, query_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.key, self.query_bias, self.weight, self.bias = key, query_bias, weight, bias

    def _at(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = s.to(self.key.dtype)
        return self.key, _at(s, self.query_bias), self.weight

    def evaluate(self, s: Tensor, y: Tensor) -> Tensor:
        bias = _at(s.to(y.dtype), self.bias)
        return _states(mode_attention(_rows(y), *self._at(s), bias), y)

    def pull(self, s: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        grad_y, grad_key, grad_q, grad_weight, grad_b = attention_gradients(
            _rows(grad), _rows(y), *self._at(s)
        )
        pairs = ((self.query_bias, grad_q), (self.bias, grad_b))
        time = s.to(y.dtype)
        grads = [g.unsqueeze(0) if len(p) == 1 else torch.stack((g, time * g)) for p, g in pairs]
        grad_s = torch.zeros_like(s)
        if len(self.bias) == 2:
            grad_s = torch.stack([(p[1] * g).sum() for p, g in pairs]).sum().to(s.dtype)
        return _states(grad_y, y), grad_s, (grad_key, grads[0], grad_weight, grads[1])


def _rows(y: Tensor) -> Tensor:
    """(B, M, D, C) → (B·D, M, C)."""
    return y.transpose(1, 2).flatten(0, 1)


def _states(rows: Tensor, like: Tensor) -> Tensor:
    """(B·D, M, C) → (B, M, D, C)."""
    batch, _, components, _ = like.shape
    states: Tensor = rows.unflatten(0, (batch, components)).transpose(1, 2)
    return states


@cache  # CUDA graphs have their addresses
@kept()
def _tables(solver: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of values (K+1, 8) and of stages (K, 16), as the kernels read them."""
    tableau = ADAPTIVE[solver]
    count = tableau.num_stages
    table = torch.zeros(count + 1, 8, dtype=torch.float64)
    table[0, 0] = table[0, 5] = 1
    table[1:, 1:5] = tableau.dense.cpu().T
    table[1:, 5] = torch.tensor(tableau.solution, dtype=torch.float64)
    table[1:, 6] = torch.tensor(tableau.error, dtype=torch.float64)
    stages = torch.zeros(count, 16, dtype=torch.float64)
    for i, (alpha, beta) in enumerate(zip(tableau.alpha, tableau.beta, strict=True), start=1):
        stages[i, : len(beta)] = torch.tensor(beta, dtype=torch.float64)
        stages[i, 15] = alpha
    return table.to(device), stages.to(device)


def _launch(
    y0: Tensor,
    dynamics: Sequence[Tensor],
    times: Tensor,
    last: Tensor,
    solver: str,
    tolerances: Tensor,
    attempts: int,
) -> tuple[Tensor, JointSteps]:
    from gfnode_fast.kernels import propagate_attention_launch as kernels

    tables, order = _tables(solver, y0.device), ADAPTIVE[solver].order
    attention = kernels.Attention(*dynamics)
    return kernels.launch_attention_fwd(
        y0, attention, times, last, *tables, tolerances, order, attempts
    )


def _launch_bwd(
    grad: Tensor, solved: JointSteps, dynamics: Sequence[Tensor], times: Tensor, solver: str
) -> tuple[Tensor, Sequence[Tensor], Tensor]:
    from gfnode_fast.kernels import propagate_attention_launch as kernels

    tables = _tables(solver, grad.device)
    return kernels.launch_attention_bwd(grad, solved, kernels.Attention(*dynamics), times, *tables)


attention_on_triton = register_solve(
    "propagate_attention",
    "Tensor key, Tensor query_bias, Tensor weight, Tensor bias",
    _launch,
    _launch_bwd,
    AttentionDynamics,
)
