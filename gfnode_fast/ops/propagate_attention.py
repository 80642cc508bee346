"""Attention across modes under the published joint step control.

    dy_m/ds = (Σ_n A_mn y_n) W_m + b_m(s),   A = softmax_n(u_m · y_n),   u_m = y_m P + q(s)

with q and b constant or affine in s. Torch: `gfnode_fast.solvers.joint`. Triton: one launch an
attempt, which also reads the times inside the step before, decisions on the device; the host never
waits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import require_triton
from gfnode_fast.ops.joint_operator import (
    checked_on_cpu,
    choose_solve,
    joint_on_torch,
    register_solve,
)
from gfnode_fast.ops.joint_start import pull_first_size
from gfnode_fast.ops.joint_status import MAX_ATTEMPTS, finished, with_times_checked
from gfnode_fast.ops.linear_dynamics import check_dynamics, check_state_shape, check_triton
from gfnode_fast.ops.mode_rhs_registered import attention_gradients, mode_attention
from gfnode_fast.solvers.rhs import GeneralRHS
from gfnode_fast.solvers.tableau import ADAPTIVE, kept

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


def attention_on_triton(
    y0: Tensor,
    key: Tensor,
    query_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    times: Tensor,
    solver: str,
    rtol: float,
    atol: float,
    max_attempts: int = MAX_ATTEMPTS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, record (8,) and rows that were not finite (B·D,); nothing is read on the host."""
    check_triton("propagate_attention", y0)
    if y0.shape[1] > LARGEST_M:
        raise ValueError(
            f"propagate_attention: `y0` must have at most {LARGEST_M} modes with backend='triton', "
            f"got {y0.shape[1]}; use backend='torch'"
        )
    values, record, _, _, bad = torch.ops.gfnode_fast.propagate_attention(
        y0, key, query_bias, weight, bias, times.detach().double(), solver, rtol, atol, max_attempts
    )
    return values, record, bad


@lru_cache(maxsize=16)
@kept()
def _constants(
    solver: str, rtol: float, atol: float, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables of values (K+1, 8) and of stages (K, 16), as the kernels read them; tolerances."""
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
    settings = torch.tensor([rtol, atol], dtype=torch.float64)
    return table.to(device), stages.to(device), settings.to(device)


@torch.library.custom_op(
    "gfnode_fast::propagate_attention",
    mutates_args=(),
    schema="(Tensor y0, Tensor key, Tensor query_bias, Tensor weight, Tensor bias, Tensor times, "
    "str solver, float rtol, float atol, int max_attempts) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _propagate_attention(
    y0: Tensor,
    key: Tensor,
    query_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    times: Tensor,
    solver: str,
    rtol: float,
    atol: float,
    max_attempts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Values, record; steps and starts, for backward; rows that were not finite."""
    from gfnode_fast.kernels import propagate_attention_launch as kernels

    require_triton("propagate_attention", y0)
    table, stages, settings = _constants(solver, rtol, atol, y0.device)
    dynamics = kernels.Attention(*(p.contiguous() for p in (key, query_bias, weight, bias)))
    empty = y0.numel() == 0 or times.numel() == 0
    last = times.new_zeros(()) if empty else times.amax()
    order = ADAPTIVE[solver].order
    values, solved = kernels.launch_attention_fwd(
        y0, dynamics, times.contiguous(), last, table, stages, settings, order, max_attempts
    )
    record = finished(y0.device) if empty else with_times_checked(solved.record, times, last)
    return values, record, *solved[1:]


@torch.library.custom_op(
    "gfnode_fast::propagate_attention_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor y0, Tensor key, Tensor query_bias, Tensor weight, Tensor bias, "
    "Tensor times, Tensor record, Tensor steps, Tensor starts, str solver, float rtol, float atol) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _propagate_attention_bwd(
    grad: Tensor,
    y0: Tensor,
    key: Tensor,
    query_bias: Tensor,
    weight: Tensor,
    bias: Tensor,
    times: Tensor,
    record: Tensor,
    steps: Tensor,
    starts: Tensor,
    solver: str,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y0, P, q, W and b."""
    from gfnode_fast.kernels import propagate_attention_launch as kernels
    from gfnode_fast.kernels.propagate_joint_launch import JointSteps

    table, stages, _ = _constants(solver, rtol, atol, y0.device)
    dynamics = kernels.Attention(*(p.contiguous() for p in (key, query_bias, weight, bias)))
    solved = JointSteps(record, steps, starts, record.new_empty(0))
    grad_y0, grads, grad_size = kernels.launch_attention_bwd(
        grad, solved, dynamics, times.contiguous(), table, stages
    )
    if grad.numel() == 0:
        return grad_y0, *grads
    # a first step that was rejected leaves its size as a constant to the ones after it
    seed = grad_size.where(record[4] > 0, 0)
    more_y0, more = pull_first_size(
        seed, y0, AttentionDynamics(*dynamics), ADAPTIVE[solver].order, rtol, atol
    )
    key_, query_bias_, weight_, bias_ = (a + b for a, b in zip(grads, more, strict=True))
    return grad_y0 + more_y0, key_, query_bias_, weight_, bias_


@_propagate_attention_bwd.register_fake
def _(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(p.new_empty(p.shape) for p in inputs[:5])


register_solve(_propagate_attention, _propagate_attention_bwd)
