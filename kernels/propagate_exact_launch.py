"""Launchers of the exact propagation: y0 (B, M, D, C) → values (T, B, M, D, C)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.kernels.launch import (
    acc_type,
    ceil_div,
    dot_block,
    dot_precision,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.propagate_exact import (
    _propagate_exact_bwd_kernel,
    _propagate_exact_fwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase, of_ones

BLOCK_R = 16
MAX_BLOCK_T = 8  # times of a forward tile, all held in registers
BWD_BLOCK_T = 4  # times whose gradients are read at once; 8 would spill
NUM_WARPS = 8
MAX_PROGRAMS = 512  # of backward, each with its own share of grad W
MAX_STEPS = 100_000  # a time that needs more is refused, so that no launch runs on and on
MAX_STARTS = 16  # states at starts of steps that backward keeps, per program


def launch_propagate_exact_fwd(
    y0: Tensor, weight: Tensor, slope: Tensor | None, times: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    """W (M, C, C) with any strides, b (M, C), times (B, T), plan (2,) int32: K and n.

    Returns the values and the status (chunks of times, B·D, M) int32.
    """
    y0, times = unit_stride(y0), times.contiguous()
    batch, modes, components, channels = y0.shape
    num_times, rows = times.shape[1], batch * components
    values = y0.new_empty(num_times, *y0.shape)
    block_t = _block_t(num_times)
    status = torch.empty(status_shape(y0, times), dtype=torch.int32, device=y0.device)
    if values.numel() == 0:
        return values, status.zero_()
    with on_device_of(y0):
        _propagate_exact_fwd_kernel[(ceil_div(rows, BLOCK_R), modes, len(status))](
            y0, weight, None if slope is None else slope.contiguous(), times, plan, values, status,
            *y0.stride()[:3], *weight.stride(), rows, modes, components, channels, num_times,
            HAS_BIAS=slope is not None, BLOCK_R=BLOCK_R, BLOCK_T=block_t,
            BLOCK_C=dot_block(channels), PRECISION=dot_precision(y0.dtype), ACC=acc_type(y0.dtype),
            MAX_STEPS=MAX_STEPS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return values, status


def status_shape(y0: Tensor, times: Tensor) -> tuple[int, int, int]:
    """(tiles of times, B·D, M)."""
    batch, modes, components, _ = y0.shape
    return ceil_div(times.shape[1], _block_t(times.shape[1])), batch * components, modes


def launch_propagate_exact_bwd(
    grad: Tensor,
    y0: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    times: Tensor,
    plan: Tensor,
    max_degree: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (T, B, M, D, C) → gradients of y0, W and b, the last one (M, C) or (0,)."""
    grad, y0, times = unit_stride(grad), unit_stride(y0), times.contiguous()
    batch, modes, components, channels = y0.shape
    num_times, rows = times.shape[1], batch * components
    programs = min(ceil_div(rows, BLOCK_R), ceil_div(MAX_PROGRAMS, modes))
    grad_y0 = y0.new_empty(y0.shape)
    shares = y0.new_empty(programs, modes, channels, channels)
    slope_shares = y0.new_empty((programs, modes, channels) if slope is not None else (0, 0))
    if grad.numel() == 0:
        return grad_y0.zero_(), weight.new_zeros(weight.shape), slope_shares.sum(0).zero_()
    block_c = dot_block(channels)
    tiles = 2 * max_degree + 1 + MAX_STARTS
    workspace = y0.new_empty(programs, modes, tiles, BLOCK_R, block_c)
    with on_device_of(y0):
        _propagate_exact_bwd_kernel[(programs, modes)](
            grad, y0, weight, None if slope is None else slope.contiguous(), times, plan,
            grad_y0, shares, slope_shares, workspace,
            *grad.stride()[:4], *y0.stride()[:3], *weight.stride(),
            rows, modes, components, channels, num_times, max_degree, MAX_STARTS,
            HAS_BIAS=slope is not None, BLOCK_R=BLOCK_R, BLOCK_T=BWD_BLOCK_T, BLOCK_C=block_c,
            PRECISION=dot_precision(y0.dtype), ACC=acc_type(y0.dtype), MAX_STEPS=MAX_STEPS,
            num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_y0, shares.sum(0), slope_shares.sum(0)


def _block_t(num_times: int) -> int:
    return min(next_power_of_2(max(num_times, 1)), MAX_BLOCK_T)


def aot_cases() -> list[AotCase]:
    """Feature width 64, with and without a forcing; coordinates (C = 2); fp64."""
    cases = [
        case
        for channels, dtype, has_bias in (
            (64, "fp32", False),
            (64, "fp32", True),
            (2, "fp32", False),
            (64, "fp64", True),
        )
        for case in _aot_cases(channels, dtype, has_bias)
    ]
    sizes = ("num_rows", "num_modes", "num_components", "num_times")
    narrow = [case for case in cases if "C=2" in case.name]
    return [*cases, *of_ones(narrow, *sizes)]


def _aot_cases(channels: int, dtype: str, has_bias: bool) -> list[AotCase]:
    torch_dtype = torch.float64 if dtype == "fp64" else torch.float32

    def case(kernel: Any, direction: str, tensors: str, integers: str, **more: Any) -> AotCase:
        pointers = {f"{t}_ptr": f"*{dtype}" for t in tensors.split()} | {"plan_ptr": "*i32"}
        if direction == "fwd":
            pointers["status_ptr"] = "*i32"
        reason = None
        if dtype == "fp64":
            reason = "for checking only: no fp64 tensor products on sm_100"
        elif direction == "bwd" and channels == 64:
            reason = (
                "up to 24 bytes of addresses a thread on sm_80; reading one time at once would "
                "avoid it and write partial sums four times as often"
            )
        absent = {} if has_bias else {"bias_ptr": None}
        return AotCase(
            kernel=kernel,
            name=f"propagate_exact_{direction} {dtype} C={channels}"
            + (" affine" if has_bias else ""),
            signature={
                **{name: kind for name, kind in pointers.items() if name not in absent},
                **dict.fromkeys(integers.split(), "i32"),
            },
            constexprs={
                **absent, **more, "stride_wo": 1, "HAS_BIAS": has_bias, "BLOCK_R": BLOCK_R,
                "BLOCK_C": dot_block(channels), "PRECISION": dot_precision(torch_dtype),
                "ACC": acc_type(torch_dtype), "MAX_STEPS": MAX_STEPS,
            },
            num_warps=NUM_WARPS,
            divisible_by_16=tuple(i for i in integers.split() if i[:6] == "stride")
            if channels % 16 == 0
            else (),
            allowed_spills_reason=reason,
        )  # fmt: skip

    strides = "stride_yb stride_ym stride_yd stride_wm stride_wi"
    sizes = "num_rows num_modes num_components num_channels num_times"
    return [
        case(
            _propagate_exact_fwd_kernel, "fwd", "y0 weight bias times out", f"{strides} {sizes}",
            BLOCK_T=MAX_BLOCK_T,
        ),
        case(
            _propagate_exact_bwd_kernel, "bwd",
            "grad y0 weight bias times grad_y0 grad_weight grad_bias workspace",
            f"stride_gt stride_gb stride_gm stride_gd {strides} {sizes} max_degree max_starts",
            BLOCK_T=BWD_BLOCK_T,
        ),
    ]  # fmt: skip
