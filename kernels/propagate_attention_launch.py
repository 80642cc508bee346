"""Launchers of the joint attention solve: y0 (B, M, D, C) → values (T, B, M, D, C)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gfnode_fast.kernels.launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.propagate_attention import (
    _attention_attempt_kernel,
    _attention_init_kernel,
)
from gfnode_fast.kernels.propagate_attention_bwd import _attention_bwd_kernel
from gfnode_fast.kernels.propagate_joint_launch import TYPES, JointSteps, empty_steps
from gfnode_fast.kernels.registry import AotCase
from gfnode_fast.kernels.solve_launch import BLOCK_R, NUM_WARPS, solve_case, solve_cases, tile

MAX_BLOCK_T = 4
BWD_BLOCK_T = 2
MAX_REGISTERS = 160  # of the initial step; without it ptxas spills to fit more warps
MAX_PROGRAMS = 256  # of backward, each with its own share of the parameters' gradients


class Attention(NamedTuple):
    """Parameters of the dynamics, all dense; S = 2 with a slope in time, else 1."""

    key: Tensor  # P (C, C)
    query_bias: Tensor  # q (S, C)
    weight: Tensor  # W (M, C, C)
    bias: Tensor  # b (S, M, C)


def _constexprs(dynamics: Attention) -> dict[str, Any]:
    key, _, _, bias = dynamics
    return tile(len(key), key.dtype, len(bias) == 2) | {"num_warps": NUM_WARPS}


def launch_attention_fwd(
    y0: Tensor,
    dynamics: Attention,
    times: Tensor,
    last: Tensor,
    table: Tensor,
    stages: Tensor,
    settings: Tensor,
    order: int,
    attempts: int,
) -> tuple[Tensor, JointSteps]:
    """Values (T, B, M, D, C) at times (B, T), NaN where the solve did not lead, and its steps.

    Solves from 0 past `last` in at most `attempts` attempts. `times`, `last` (0-dim), `table`
    (K+1, 8), `stages` (K, 16) and `settings` (rtol, atol) are float64 on the device.
    """
    y0 = unit_stride(y0)
    batch, modes, components, channels = y0.shape
    num_times, rows = times.shape[1], batch * components
    tiles = ceil_div(rows, BLOCK_R)
    partial, (record, steps, starts, bad) = empty_steps(y0, attempts, tiles)
    solved = JointSteps(record[-1], steps, starts, bad)
    values = torch.full_like(y0, float("nan")).expand(num_times, *y0.shape).contiguous()
    if values.numel() == 0:
        return values, solved
    constexprs = _constexprs(dynamics)
    degree, entries = len(stages), rows * modes * channels
    workspace = y0.new_empty(tiles, degree + 2, modes, BLOCK_R, constexprs["BLOCK_C"])
    block_t = min(next_power_of_2(num_times), MAX_BLOCK_T)
    sizes = (rows, modes, components, channels)
    with on_device_of(y0):
        for second in (False, True):
            _attention_init_kernel[(tiles,)](
                y0, *dynamics, settings, starts, partial, bad, workspace, *y0.stride()[:3], tiles,
                entries, *sizes, SECOND=second, maxnreg=MAX_REGISTERS,
                **constexprs,
            )  # fmt: skip
        for attempt in range(attempts + 1):  # the last one only decides and reads
            _attention_attempt_kernel[(tiles,)](
                *dynamics, table, stages, settings, times, last, record, steps, starts, partial,
                bad, values, workspace, attempt, attempts, tiles, entries, order, degree, *sizes,
                num_times, BLOCK_T=block_t, **constexprs,
            )  # fmt: skip
    return values, solved


def launch_attention_bwd(
    grad: Tensor,
    solved: JointSteps,
    dynamics: Attention,
    times: Tensor,
    table: Tensor,
    stages: Tensor,
) -> tuple[Tensor, Attention, Tensor]:
    """grad (T, B, M, D, C) → gradients of y0, of the parameters, and of the first step's size,
    0-dim float64.
    """
    grad = unit_stride(grad)
    num_times, batch, modes, components, channels = grad.shape
    rows = batch * components
    programs = min(ceil_div(rows, BLOCK_R), MAX_PROGRAMS)
    grad_y0 = grad.new_empty(grad.shape[1:])
    shares = Attention(*(p.new_zeros(programs, *p.shape) for p in dynamics))
    size_shares = torch.empty(programs, dtype=torch.float64, device=grad.device)
    if grad.numel() == 0:
        return grad_y0.zero_(), Attention(*(s.sum(0) for s in shares)), size_shares.new_zeros(())
    constexprs = _constexprs(dynamics)
    degree = len(stages)
    tiles = (2 * (degree + 1) + 3) * modes
    workspace = grad.new_empty(programs, tiles, BLOCK_R, constexprs["BLOCK_C"])
    with on_device_of(grad):
        _attention_bwd_kernel[(programs,)](
            grad, solved.starts, *dynamics, table, stages, times, solved.record, solved.steps,
            grad_y0, *shares, size_shares, workspace, degree, *grad.stride()[:4], rows, modes,
            components, channels, num_times, BLOCK_T=BWD_BLOCK_T, **constexprs,
        )  # fmt: skip
    return grad_y0, Attention(*(s.sum(0) for s in shares)), size_shares.sum()


def aot_cases() -> list[AotCase]:
    """As `solve_cases`; affine is what moves in time."""
    return solve_cases(_aot_cases, True)


def _aot_cases(channels: int, dtype: str, has_slope: bool) -> list[AotCase]:
    case = functools.partial(
        solve_case, channels=channels, dtype=dtype, has_slope=has_slope, types=TYPES,
        aligned=("stride_", "num_channels"),
    )  # fmt: skip
    dynamics = "key query_bias weight bias"
    sizes = "num_rows num_modes num_components num_channels"
    init = [
        case(
            _attention_init_kernel, name, f"y0 {dynamics} settings starts partial bad workspace",
            f"stride_yb stride_ym stride_yd num_tiles num_entries {sizes}", SECOND=second,
            options={"maxnreg": MAX_REGISTERS},
        )
        for name, second in (("attention_init", False), ("attention_init_second", True))
    ]  # fmt: skip
    return [
        *init,
        case(
            _attention_attempt_kernel, "attention_attempt",
            f"{dynamics} table stages settings times last record steps starts partial bad out "
            "workspace",
            f"attempt max_attempts num_partials num_entries order degree {sizes} num_times",
            BLOCK_T=MAX_BLOCK_T,
        ),
        case(
            _attention_bwd_kernel, "attention_bwd",
            f"grad starts {dynamics} table stages times record steps grad_y0 "
            f"{' '.join('grad_' + name for name in dynamics.split())} grad_size workspace",
            f"degree stride_gt stride_gb stride_gm stride_gd {sizes} num_times",
            BLOCK_T=BWD_BLOCK_T,
            spills="24 bytes of addresses a thread on sm_80, with fewer times no less",
        ),
    ]  # fmt: skip
