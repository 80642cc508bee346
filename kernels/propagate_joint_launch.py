"""Launchers of the joint solve of linear and affine dynamics: y0 (B, M, D, C) → (T, B, M, D, C)."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from gfnode_fast.kernels.joint_control import RECORD, _joint_decide_kernel
from gfnode_fast.kernels.launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.propagate_joint import _joint_attempt_kernel, _joint_init_kernel
from gfnode_fast.kernels.propagate_joint_read import (
    _joint_read_bwd_kernel,
    _joint_read_fwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase
from gfnode_fast.kernels.solve_launch import BLOCK_R, NUM_WARPS, solve_case, solve_cases, tile

MAX_BLOCK_T = 8  # times of a forward tile, all held in registers
BWD_BLOCK_T = 2  # times whose gradients are read at once; 4 would spill
MAX_PROGRAMS = 512  # of backward, each with its own share of grad W


class JointSteps(NamedTuple):
    """What a solve leaves for reading: all on the device."""

    record: Tensor  # (8,) float64, the last decision
    steps: Tensor  # (attempts, 2) float64: start and size of the accepted steps
    starts: Tensor  # (attempts + 1, R, M, C): their states
    bad: Tensor  # (R,) int32: 1 for rows that were not finite


def empty_steps(y0: Tensor, attempts: int, partials: int) -> tuple[Tensor, JointSteps]:
    """Partial norms and, for all attempts, what a solve leaves; defined everywhere, as an
    operator's outputs have to be.
    """
    batch, modes, components, channels = y0.shape
    rows = batch * components
    record, steps, partial = (
        torch.zeros(shape, dtype=torch.float64, device=y0.device)
        for shape in ((attempts + 1, RECORD), (attempts, 2), (attempts + 3, partials))
    )
    starts = y0.new_zeros(attempts + 1, rows, modes, channels)
    bad = torch.zeros(rows, dtype=torch.int32, device=y0.device)
    return partial, JointSteps(record, steps, starts, bad)


def launch_joint_steps(
    y0: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    last: Tensor,
    table: Tensor,
    settings: Tensor,
    order: int,
    attempts: int,
) -> JointSteps:
    """Solve from 0 past `last` (0-dim float64) in at most `attempts` attempts.

    W (M, C, C) with any strides, b (M, C) dense; `table` (K+1, 8) and `settings` (rtol, atol) are
    float64 on the device.
    """
    y0 = unit_stride(y0)
    batch, modes, components, channels = y0.shape
    rows = batch * components
    tiles = ceil_div(rows, BLOCK_R)
    partials = tiles * modes
    partial, (record, steps, starts, bad) = empty_steps(y0, attempts, partials)
    solved = JointSteps(record[-1], steps, starts, bad)
    if y0.numel() == 0:
        return solved
    common = tile(channels, y0.dtype, slope is not None) | {"num_warps": NUM_WARPS}
    entries = rows * modes * channels
    with on_device_of(y0):
        _joint_init_kernel[(tiles, modes)](
            y0, weight, slope, settings, starts, partial, bad, *y0.stride()[:3], *weight.stride(),
            rows, modes, components, channels, **common,
        )  # fmt: skip
        for attempt in range(attempts):
            _joint_attempt_kernel[(tiles, modes)](
                weight, slope, table, settings, last, record, steps, starts, partial, bad, attempt,
                partials, entries, order, len(table) - 1, *weight.stride(), rows, modes, channels,
                **common,
            )  # fmt: skip
        _joint_decide_kernel[(1,)](
            last, record, steps, partial, attempts, partials, entries, order, num_warps=NUM_WARPS
        )
    return solved


def launch_joint_read_fwd(
    solved: JointSteps,
    weight: Tensor,
    slope: Tensor | None,
    table: Tensor,
    times: Tensor,
    components: int,
) -> Tensor:
    """Values (T, B, M, D, C) at times (B, T), float64."""
    _, rows, modes, channels = solved.starts.shape
    batch, num_times = times.shape
    values = solved.starts.new_empty(num_times, batch, modes, components, channels)
    if values.numel() == 0:
        return values
    block_t = min(next_power_of_2(num_times), MAX_BLOCK_T)
    with on_device_of(values):
        _joint_read_fwd_kernel[(ceil_div(rows, BLOCK_R), modes, ceil_div(num_times, block_t))](
            solved.starts, weight, slope, table, times.contiguous(), solved.record, solved.steps,
            values, len(table) - 1, *weight.stride(), rows, modes, components, channels, num_times,
            **tile(channels, values.dtype, slope is not None), BLOCK_T=block_t,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return values


def launch_joint_read_bwd(
    grad: Tensor,
    solved: JointSteps,
    weight: Tensor,
    slope: Tensor | None,
    table: Tensor,
    times: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad (T, B, M, D, C) → gradients of y0, W, b (M, C) or (0,), and of the first step's size,
    0-dim float64.
    """
    grad = unit_stride(grad)
    num_times, batch, modes, components, channels = grad.shape
    rows = batch * components
    programs = min(ceil_div(rows, BLOCK_R), ceil_div(MAX_PROGRAMS, modes))
    grad_y0 = grad.new_empty(grad.shape[1:])
    shares = grad.new_empty(programs, modes, channels, channels)
    slope_shares = grad.new_zeros((programs, modes, channels) if slope is not None else (0, 0))
    size_shares = torch.empty(programs, modes, dtype=torch.float64, device=grad.device)
    if grad.numel() == 0:
        no_slope = slope_shares.sum(0)
        return grad_y0.zero_(), torch.zeros_like(weight), no_slope, size_shares.new_zeros(())
    options = tile(channels, grad.dtype, slope is not None)
    workspace = grad.new_empty(programs, modes, 2 * len(table), BLOCK_R, options["BLOCK_C"])
    with on_device_of(grad):
        _joint_read_bwd_kernel[(programs, modes)](
            grad, solved.starts, weight, slope, table, times.contiguous(), solved.record,
            solved.steps, grad_y0, shares, slope_shares, size_shares, workspace, len(table) - 1,
            *grad.stride()[:4], *weight.stride(), rows, modes, components, channels, num_times,
            **options, BLOCK_T=BWD_BLOCK_T, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_y0, shares.sum(0), slope_shares.sum(0), size_shares.sum()


CONTROL = "attempt num_partials num_entries order"
FP64 = "table stages settings times last record steps partial grad_size"
TYPES = dict.fromkeys(FP64.split(), "*fp64") | {"bad": "*i32"}  # of pointers, in any precision


def aot_cases() -> list[AotCase]:
    """As `solve_cases`, with the decision on the last attempt."""
    decide = AotCase(
        kernel=_joint_decide_kernel,
        name="joint_decide",
        signature=dict.fromkeys(("last_ptr", "record_ptr", "steps_ptr", "partial_ptr"), "*fp64")
        | dict.fromkeys(CONTROL.split(), "i32"),
        num_warps=NUM_WARPS,
    )
    return [decide, *solve_cases(_aot_cases, False)]


def _aot_cases(channels: int, dtype: str, has_slope: bool) -> list[AotCase]:
    case = functools.partial(
        solve_case, channels=channels, dtype=dtype, has_slope=has_slope, types=TYPES, stride_wo=1,
        absent=None if has_slope else "slope",
    )  # fmt: skip
    weight = "stride_wm stride_wi"
    sizes = "num_rows num_modes num_components num_channels"
    return [
        case(
            _joint_init_kernel, "joint_init", "y0 weight slope settings starts partial bad",
            f"stride_yb stride_ym stride_yd {weight} {sizes}",
        ),
        case(
            _joint_attempt_kernel, "joint_attempt",
            "weight slope table settings last record steps starts partial bad",
            f"{CONTROL} degree {weight} num_rows num_modes num_channels",
        ),
        case(
            _joint_read_fwd_kernel, "joint_read_fwd",
            "starts weight slope table times record steps out",
            f"degree {weight} {sizes} num_times", BLOCK_T=MAX_BLOCK_T,
            spills="8 bytes a thread on sm_80",
        ),
        case(
            _joint_read_bwd_kernel, "joint_read_bwd",
            "grad starts weight slope table times record steps grad_y0 grad_weight grad_slope "
            "grad_size workspace",
            f"degree stride_gt stride_gb stride_gm stride_gd {weight} {sizes} num_times",
            BLOCK_T=BWD_BLOCK_T,
        ),
    ]  # fmt: skip
