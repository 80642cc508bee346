"""Linear and affine dynamics under joint step control: the published adaptive solve, no host.

For dy/ds = y W_m + s b_m each stage of an explicit method is a polynomial in hW, so with v_0 = y
and v_k = h (v_{k-1} W + (t for k = 1, h for k = 2) b) the step's end, its error estimate and its
dense output are

    y_1 = Σ_k e_k v_k,   error = Σ_k r_k v_k,   y(t + x h) = Σ_k p_k(x) v_k,   p_k quartic, k <= K

with constants of the tableau; K = 7 for dopri5. One launch an attempt
(`gfnode_fast.kernels.joint_control`).

A program owns BLOCK_R rows of one mode, all channels. A row of a mode, C = 64, dopri5, three
attempts, fp32: 1.5 kB for 172 kflop. Limits: fp32 and fp64, C <= 64, methods whose last stage is
the step's end. Addresses are 64-bit. Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.joint_control import (
    RUNNING_,
    _decide,
    _mark_bad_rows,
    _sum_of_squares,
    _tolerance,
)
from gfnode_fast.kernels.joint_values import _of_end, _of_error
from gfnode_fast.kernels.linear_dynamics import _load_slope, _load_square, _next_power


@triton.jit(do_not_specialize=BATCH_SIZES)
def _joint_init_kernel(
    y0_ptr,
    weight_ptr,
    slope_ptr,
    settings_ptr,
    starts_ptr,
    partial_ptr,
    bad_ptr,
    stride_yb,
    stride_ym,
    stride_yd,
    stride_wm,
    stride_wi,
    stride_wo,
    num_rows,
    num_modes,
    num_components,
    num_channels,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Keeps y0 as the first start (R, M, C) and sums the squares of the initial step's norms."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mode = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask_r = row < num_rows
    mask = mask_r[:, None] & (c < num_channels)[None, :]
    at = (row // num_components) * stride_yb + mode * stride_ym
    at += (row % num_components) * stride_yd
    y = tl.load(y0_ptr + at[:, None] + c[None, :], mask=mask, other=0.0)
    to = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
    tl.store(starts_ptr + to, y, mask=mask)
    weight = weight_ptr + mode * stride_wm
    weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels)
    slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC)
    tolerance = _tolerance(settings_ptr, tl.abs(y), mask).to(ACC)
    num_partials = tl.num_programs(0) * num_modes
    slot = partial_ptr + tl.program_id(0) * num_modes + tl.program_id(1)
    # y, its slope at s = 0, and its second derivative y W W + b
    for power in tl.static_range(3):
        tl.store(slot + power * num_partials, _sum_of_squares(tl.where(mask, y, 0.0) / tolerance))
        if power < 2:
            y = _next_power(y, weight, slope, power + 1, 0.0, 1.0, HAS_SLOPE, PRECISION, ACC)
    _mark_bad_rows(bad_ptr, row, mask_r, y)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _joint_attempt_kernel(
    weight_ptr,
    slope_ptr,
    table_ptr,
    settings_ptr,
    last_ptr,
    record_ptr,
    steps_ptr,
    starts_ptr,
    partial_ptr,
    bad_ptr,
    attempt,
    num_partials,
    num_entries,
    order,
    degree,
    stride_wm,
    stride_wi,
    stride_wo,
    num_rows,
    num_modes,
    num_channels,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Decides on the attempt before, steps, keeps the end for when it is accepted."""
    time, size, accepted, status, _, _, _ = _decide(
        attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order
    )
    if status == RUNNING_:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mode = tl.program_id(1).to(tl.int64)
        c = tl.arange(0, BLOCK_C)
        mask_r = row < num_rows
        mask = mask_r[:, None] & (c < num_channels)[None, :]
        at = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
        span = num_entries.to(tl.int64)
        start = tl.load(starts_ptr + accepted * span + at, mask=mask, other=0.0)
        weight = weight_ptr + mode * stride_wm
        weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels)
        slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC)
        v = start
        end = start
        error = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for k in range(1, degree + 1):
            v = _next_power(v, weight, slope, k, time, size, HAS_SLOPE, PRECISION, ACC)
            v = v * size.to(ACC)
            end += _of_end(table_ptr, k, ACC) * v
            error += _of_error(table_ptr, k, ACC) * v
        tl.store(starts_ptr + (accepted + 1) * span + at, end, mask=mask)
        _mark_bad_rows(bad_ptr, row, mask_r, end)
        tolerance = _tolerance(settings_ptr, tl.maximum(tl.abs(start), tl.abs(end)), mask)
        slot = (attempt + 3) * num_partials + tl.program_id(0) * num_modes + tl.program_id(1)
        error = tl.where(mask, error, 0.0)  # the slope also enters rows beyond the last
        tl.store(partial_ptr + slot, _sum_of_squares(error.to(tl.float64) / tolerance))
