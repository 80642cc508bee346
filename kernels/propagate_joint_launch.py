"""Launchers of the joint solve of linear and affine dynamics: y0 (B, M, D, C) → (T, B, M, D, C)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gfnode_fast.kernels.joint_control import RECORD, _joint_decide_kernel
from gfnode_fast.kernels.launch import (
    acc_type,
    ceil_div,
    dot_block,
    dot_precision,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.propagate_joint import _joint_attempt_kernel, _joint_init_kernel
from gfnode_fast.kernels.propagate_joint_read import (
    _joint_read_bwd_kernel,
    _joint_read_fwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase, of_ones

BLOCK_R = 16
MAX_BLOCK_T = 8  # times of a forward tile, all held in registers
BWD_BLOCK_T = 2  # times whose gradients are read at once; 4 would spill
NUM_WARPS = 8
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
    common: dict[str, Any] = {
        "HAS_SLOPE": slope is not None, "BLOCK_R": BLOCK_R, "BLOCK_C": dot_block(channels),
        "PRECISION": dot_precision(y0.dtype), "ACC": acc_type(y0.dtype), "num_warps": NUM_WARPS,
    }  # fmt: skip
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
            HAS_SLOPE=slope is not None, BLOCK_R=BLOCK_R, BLOCK_T=block_t,
            BLOCK_C=dot_block(channels), PRECISION=dot_precision(values.dtype),
            ACC=acc_type(values.dtype), num_warps=NUM_WARPS,
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
    block_c = dot_block(channels)
    workspace = grad.new_empty(programs, modes, 2 * len(table), BLOCK_R, block_c)
    with on_device_of(grad):
        _joint_read_bwd_kernel[(programs, modes)](
            grad, solved.starts, weight, slope, table, times.contiguous(), solved.record,
            solved.steps, grad_y0, shares, slope_shares, size_shares, workspace, len(table) - 1,
            *grad.stride()[:4], *weight.stride(), rows, modes, components, channels, num_times,
            HAS_SLOPE=slope is not None, BLOCK_R=BLOCK_R, BLOCK_T=BWD_BLOCK_T, BLOCK_C=block_c,
            PRECISION=dot_precision(grad.dtype), ACC=acc_type(grad.dtype), num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_y0, shares.sum(0), slope_shares.sum(0), size_shares.sum()


CONTROL = "attempt num_partials num_entries order"


def aot_cases() -> list[AotCase]:
    """Feature width 64, with and without a slope; coordinates (C = 2); fp64."""
    decide = AotCase(
        kernel=_joint_decide_kernel,
        name="joint_decide",
        signature=dict.fromkeys(("last_ptr", "record_ptr", "steps_ptr", "partial_ptr"), "*fp64")
        | dict.fromkeys(CONTROL.split(), "i32"),
        num_warps=NUM_WARPS,
    )
    cases = [
        case
        for channels, dtype, has_slope in (
            (64, "fp32", False),
            (64, "fp32", True),
            (2, "fp32", False),
            (64, "fp64", True),
        )
        for case in _aot_cases(channels, dtype, has_slope)
    ]
    sizes = ("num_rows", "num_modes", "num_components", "num_times", "num_partials", "num_entries")
    narrow = [case for case in cases if "C=2" in case.name]
    return [decide, *cases, *of_ones(narrow, *sizes)]


def _aot_cases(channels: int, dtype: str, has_slope: bool) -> list[AotCase]:
    torch_dtype = torch.float64 if dtype == "fp64" else torch.float32
    types = dict.fromkeys(
        ["table", "settings", "last", "record", "steps", "partial", "times", "grad_size"], "*fp64"
    ) | {"bad": "*i32"}
    tile = {
        "HAS_SLOPE": has_slope, "BLOCK_R": BLOCK_R, "BLOCK_C": dot_block(channels),
        "PRECISION": dot_precision(torch_dtype), "ACC": acc_type(torch_dtype), "stride_wo": 1,
    }  # fmt: skip
    if not has_slope:
        tile["slope_ptr"] = None

    def case(kernel: Any, name: str, tensors: str, integers: str, **more: object) -> AotCase:
        reason = None
        if dtype == "fp64":
            reason = "for checking only: no fp64 tensor products on sm_100"
        elif name == "read_bwd" and channels == 64:
            reason = "up to 24 bytes of addresses a thread on sm_80"
        return AotCase(
            kernel=kernel,
            name=f"joint_{name} {dtype} C={channels}" + (" affine" if has_slope else ""),
            signature={
                f"{t}_ptr": types.get(t, f"*{dtype}")
                for t in tensors.split()
                if t != "slope" or has_slope
            }
            | dict.fromkeys(integers.split(), "i32"),
            constexprs=tile | more,
            num_warps=NUM_WARPS,
            divisible_by_16=tuple(i for i in integers.split() if i[:6] == "stride")
            if channels % 16 == 0
            else (),
            allowed_spills_reason=reason,
        )

    weight = "stride_wm stride_wi"
    sizes = "num_rows num_modes num_components num_channels"
    return [
        case(
            _joint_init_kernel, "init", "y0 weight slope settings starts partial bad",
            f"stride_yb stride_ym stride_yd {weight} {sizes}",
        ),
        case(
            _joint_attempt_kernel, "attempt",
            "weight slope table settings last record steps starts partial bad",
            f"{CONTROL} degree {weight} num_rows num_modes num_channels",
        ),
        case(
            _joint_read_fwd_kernel, "read_fwd", "starts weight slope table times record steps out",
            f"degree {weight} {sizes} num_times", BLOCK_T=MAX_BLOCK_T,
        ),
        case(
            _joint_read_bwd_kernel, "read_bwd",
            "grad starts weight slope table times record steps grad_y0 grad_weight grad_slope "
            "grad_size workspace",
            f"degree stride_gt stride_gb stride_gm stride_gd {weight} {sizes} num_times",
            BLOCK_T=BWD_BLOCK_T,
        ),
    ]  # fmt: skip
