"""Launchers of the joint solve of linear dynamics: y0 (B, M, D, C) → values (T, B, M, D, C)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gfnode_fast.kernels.launch import ceil_div, next_power_of_2, on_device_of, unit_stride
from gfnode_fast.kernels.propagate_joint import (
    RECORD,
    _joint_attempt_kernel,
    _joint_decide_kernel,
    _joint_init_kernel,
)
from gfnode_fast.kernels.propagate_joint_read import (
    _joint_read_bwd_kernel,
    _joint_read_fwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase

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


def launch_joint_steps(
    y0: Tensor,
    weight: Tensor,
    last: Tensor,
    table: Tensor,
    settings: Tensor,
    order: int,
    attempts: int,
) -> JointSteps:
    """Solve from 0 past `last` (0-dim float64) in at most `attempts` attempts.

    `table` (K+1, 8) and `settings` (rtol, atol) are float64 on the device.
    """
    y0 = unit_stride(y0)
    batch, modes, components, channels = y0.shape
    rows = batch * components
    tiles = ceil_div(rows, BLOCK_R)
    partials = tiles * modes
    starts = y0.new_zeros(attempts + 1, rows, modes, channels)  # an operator's output: all defined
    record, steps, partial = (
        torch.zeros(shape, dtype=torch.float64, device=y0.device)
        for shape in ((attempts + 1, RECORD), (attempts, 2), (attempts + 3, partials))
    )
    if y0.numel() == 0:
        return JointSteps(record[-1].zero_(), steps, starts)
    common: dict[str, Any] = {
        "BLOCK_R": BLOCK_R, "BLOCK_C": _block(channels), "PRECISION": _precision(y0.dtype),
        "ACC": _acc(y0.dtype), "num_warps": NUM_WARPS,
    }  # fmt: skip
    entries = rows * modes * channels
    with on_device_of(y0):
        _joint_init_kernel[(tiles, modes)](
            y0, weight, settings, starts, partial, *y0.stride()[:3], *weight.stride(),
            rows, modes, components, channels, **common,
        )  # fmt: skip
        for attempt in range(attempts):
            _joint_attempt_kernel[(tiles, modes)](
                weight, table, settings, last, record, steps, starts, partial, attempt, partials,
                entries, order, len(table) - 1, *weight.stride(), rows, modes, channels, **common,
            )  # fmt: skip
        _joint_decide_kernel[(1,)](
            last, record, steps, partial, attempts, partials, entries, order, num_warps=NUM_WARPS
        )
    return JointSteps(record[-1], steps, starts)


def launch_joint_read_fwd(
    solved: JointSteps, weight: Tensor, table: Tensor, times: Tensor, components: int
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
            solved.starts, weight, table, times.contiguous(), solved.record, solved.steps, values,
            len(table) - 1, *weight.stride(), rows, modes, components, channels, num_times,
            BLOCK_R=BLOCK_R, BLOCK_T=block_t, BLOCK_C=_block(channels),
            PRECISION=_precision(values.dtype), ACC=_acc(values.dtype), num_warps=NUM_WARPS,
        )  # fmt: skip
    return values


def launch_joint_read_bwd(
    grad: Tensor, solved: JointSteps, weight: Tensor, table: Tensor, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (T, B, M, D, C) → gradients of y0 and W, and of the first step's size, 0-dim float64."""
    grad = unit_stride(grad)
    num_times, batch, modes, components, channels = grad.shape
    rows = batch * components
    programs = min(ceil_div(rows, BLOCK_R), ceil_div(MAX_PROGRAMS, modes))
    grad_y0 = grad.new_empty(grad.shape[1:])
    shares = grad.new_empty(programs, modes, channels, channels)
    size_shares = torch.empty(programs, modes, dtype=torch.float64, device=grad.device)
    if grad.numel() == 0:
        return grad_y0.zero_(), weight.new_zeros(weight.shape), size_shares.new_zeros(())
    block_c = _block(channels)
    workspace = grad.new_empty(programs, modes, 2 * len(table), BLOCK_R, block_c)
    with on_device_of(grad):
        _joint_read_bwd_kernel[(programs, modes)](
            grad, solved.starts, weight, table, times.contiguous(), solved.record, solved.steps,
            grad_y0, shares, size_shares, workspace, len(table) - 1,
            *grad.stride()[:4], *weight.stride(), rows, modes, components, channels, num_times,
            BLOCK_R=BLOCK_R, BLOCK_T=BWD_BLOCK_T, BLOCK_C=block_c,
            PRECISION=_precision(grad.dtype), ACC=_acc(grad.dtype), num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_y0, shares.sum(0), size_shares.sum()


def _block(width: int) -> int:
    """A matrix product wants extents of at least 16."""
    return max(16, next_power_of_2(width))


def _precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float64 else "tf32x3"


def _acc(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def aot_cases() -> list[AotCase]:
    """Feature width 64, coordinates (C = 2), fp64."""
    return [
        case
        for channels, dtype in ((64, "fp32"), (2, "fp32"), (64, "fp64"))
        for case in _aot_cases(channels, dtype)
    ]


def _aot_cases(channels: int, dtype: str) -> list[AotCase]:
    torch_dtype = torch.float64 if dtype == "fp64" else torch.float32
    in_fp64 = ["table", "settings", "last", "record", "steps", "partial", "times", "grad_size"]

    def case(kernel: Any, name: str, tensors: str, integers: str, **more: int) -> AotCase:
        reason = None
        if dtype == "fp64":
            reason = "for checking only: no fp64 tensor products on sm_100"
        elif name == "read_bwd" and channels == 64:
            reason = "16 bytes of addresses a thread on sm_80"
        tile = {
            "BLOCK_R": BLOCK_R, "BLOCK_C": _block(channels), "PRECISION": _precision(torch_dtype),
            "ACC": _acc(torch_dtype), **more,
        }  # fmt: skip
        return AotCase(
            kernel=kernel,
            name=f"joint_{name} {dtype} C={channels}",
            signature={
                f"{t}_ptr": "*fp64" if t in in_fp64 else f"*{dtype}" for t in tensors.split()
            }
            | dict.fromkeys(integers.split(), "i32"),
            constexprs={**tile, "stride_wo": 1} if name != "decide" else {},
            num_warps=NUM_WARPS,
            divisible_by_16=tuple(i for i in integers.split() if i[:6] == "stride")
            if channels % 16 == 0
            else (),
            allowed_spills_reason=reason,
        )

    weight = "stride_wm stride_wi"
    control = "attempt num_partials num_entries order"
    sizes = "num_rows num_modes num_components num_channels"
    return [
        case(
            _joint_init_kernel, "init", "y0 weight settings starts partial",
            f"stride_yb stride_ym stride_yd {weight} {sizes}",
        ),
        case(
            _joint_attempt_kernel, "attempt",
            "weight table settings last record steps starts partial",
            f"{control} degree {weight} num_rows num_modes num_channels",
        ),
        case(_joint_decide_kernel, "decide", "last record steps partial", control),
        case(
            _joint_read_fwd_kernel, "read_fwd", "starts weight table times record steps out",
            f"degree {weight} {sizes} num_times", BLOCK_T=MAX_BLOCK_T,
        ),
        case(
            _joint_read_bwd_kernel, "read_bwd",
            "grad starts weight table times record steps grad_y0 grad_weight grad_size workspace",
            f"degree stride_gt stride_gb stride_gm stride_gd {weight} {sizes} num_times",
            BLOCK_T=BWD_BLOCK_T,
        ),
    ]  # fmt: skip
