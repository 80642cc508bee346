"""Launchers of the exact propagation: y0 (B, M, D, C) → values (T, B, M, D, C)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gfnode_fast.kernels.launch import (
    ceil_div,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.propagate_exact import (
    _propagate_exact_bwd_kernel,
    _propagate_exact_fwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase
from gfnode_fast.kernels.solve_launch import BLOCK_R, NUM_WARPS, solve_case, solve_cases, tile

MAX_BLOCK_T = 8  # times of a forward tile, all held in registers
BWD_BLOCK_T = 4  # times whose gradients are read at once; 8 would spill
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
            **tile(channels, y0.dtype, slope is not None), BLOCK_T=block_t, MAX_STEPS=MAX_STEPS,
            num_warps=NUM_WARPS,
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
    options = tile(channels, y0.dtype, slope is not None)
    tiles = 2 * max_degree + 1 + MAX_STARTS
    workspace = y0.new_empty(programs, modes, tiles, BLOCK_R, options["BLOCK_C"])
    with on_device_of(y0):
        _propagate_exact_bwd_kernel[(programs, modes)](
            grad, y0, weight, None if slope is None else slope.contiguous(), times, plan,
            grad_y0, shares, slope_shares, workspace,
            *grad.stride()[:4], *y0.stride()[:3], *weight.stride(),
            rows, modes, components, channels, num_times, max_degree, MAX_STARTS,
            **options, BLOCK_T=BWD_BLOCK_T, MAX_STEPS=MAX_STEPS, num_warps=NUM_WARPS,
        )  # fmt: skip
    return grad_y0, shares.sum(0), slope_shares.sum(0)


def _block_t(num_times: int) -> int:
    return min(next_power_of_2(max(num_times, 1)), MAX_BLOCK_T)


def aot_cases() -> list[AotCase]:
    """As `solve_cases`."""
    return solve_cases(_aot_cases, False)


def _aot_cases(channels: int, dtype: str, has_slope: bool) -> list[AotCase]:
    case = functools.partial(
        solve_case, channels=channels, dtype=dtype, has_slope=has_slope,
        types={"plan": "*i32", "status": "*i32"}, absent=None if has_slope else "slope",
        stride_wo=1, MAX_STEPS=MAX_STEPS,
    )  # fmt: skip
    strides = "stride_yb stride_ym stride_yd stride_wm stride_wi"
    sizes = "num_rows num_modes num_components num_channels num_times"
    return [
        case(
            _propagate_exact_fwd_kernel, "propagate_exact_fwd",
            "y0 weight slope times plan out status", f"{strides} {sizes}", BLOCK_T=MAX_BLOCK_T,
        ),
        case(
            _propagate_exact_bwd_kernel, "propagate_exact_bwd",
            "grad y0 weight slope times plan grad_y0 grad_weight grad_slope workspace",
            f"stride_gt stride_gb stride_gm stride_gd {strides} {sizes} max_degree max_starts",
            BLOCK_T=BWD_BLOCK_T,
            spills="8 bytes of addresses a thread on sm_80; reading one time at once would "
            "avoid it and write partial sums four times as often",
        ),
    ]  # fmt: skip
