"""Attention across modes under joint step control: the published adaptive solve, no host.

Dynamics: `gfnode_fast.kernels.attention_dynamics`; steps: `joint_control`, one launch an attempt;
values: `joint_values`. The launch after an accepted attempt also reads the times inside its step,
from the stages that the attempt left, so nothing is computed twice.

A program owns BLOCK_R rows, all modes and all channels. The stages of a step, K + 1 states, stay in
a workspace of the program's own: for dopri5, M = 2, C = 64 that is 74 kB, and all of a batch of
4096 molecules 19 MB, which fits a level-2 cache. An attempt on a row with M = 2, C = 64, dopri5,
fp32: 240 kflop; 1 kB of state from memory, 30 kB of stages from the cache. Products go to the
tensor cores as three tf32 ones each.

No atomics; every sum has a fixed order. Limits: fp32 and fp64, C <= 64, M <= 16 (time grows with
M²), methods whose last stage is the step's end. Addresses are 64-bit. Tuned on: none yet; not yet
run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.attention_dynamics import _evaluate, _fill_stages
from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.joint_control import (
    RUNNING_,
    _decide,
    _mark_bad_rows,
    _sum_of_squares,
    _tolerance,
    _trial_size,
)
from gfnode_fast.kernels.joint_values import _abscissae, _of_end, _of_error, _share


@triton.jit(do_not_specialize=BATCH_SIZES)
def _attention_init_kernel(
    y0_ptr,
    key_ptr,
    query_bias_ptr,
    weight_ptr,
    bias_ptr,
    settings_ptr,
    starts_ptr,
    partial_ptr,
    bad_ptr,
    workspace_ptr,
    stride_yb,
    stride_ym,
    stride_yd,
    num_tiles,
    num_entries,
    num_rows,
    num_modes,
    num_components,
    num_channels,
    SECOND: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """The initial step's norms, of y and its slope f0; SECOND: of (g(h0, y + h0 f0) - f0) / h0.

    The first launch keeps y0 as the first start (R, M, C) and leaves y and f0 in the workspace.
    """
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    row = program * BLOCK_R + r
    mask_r = row < num_rows
    mask_y = mask_r[:, None] & (c < num_channels)[None, :]
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    point_ptr = workspace_ptr + program * 3 * num_modes * TILE
    point_ptr += r[:, None] * BLOCK_C + c[None, :]
    slope_ptr = point_ptr + num_modes * TILE
    second_ptr = slope_ptr + num_modes * TILE
    y_ptr = starts_ptr + row[:, None] * num_modes * num_channels + c[None, :]
    first_square = tl.full((), 0.0, tl.float64)
    second_square = first_square
    if SECOND:
        h0, _, _ = _trial_size(partial_ptr, num_tiles, num_entries)
        for m in range(0, num_modes):
            y = tl.load(y_ptr + m * num_channels, mask=mask_y, other=0.0)
            f0 = tl.load(slope_ptr + m * TILE, mask=mask_y, other=0.0)
            tl.store(point_ptr + m * TILE, y + h0.to(ACC) * f0, mask=mask_y)
        tl.debug_barrier()  # other threads read the tiles
        _evaluate(
            point_ptr, second_ptr, tl.full((), 1.0, ACC), h0, key_ptr, query_bias_ptr, weight_ptr,
            bias_ptr, c, mask_y, num_modes, num_channels, HAS_SLOPE, TILE, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        for m in range(0, num_modes):
            y = tl.load(y_ptr + m * num_channels, mask=mask_y, other=0.0)
            tolerance = _tolerance(settings_ptr, tl.abs(y), mask_y).to(ACC)
            change = tl.load(second_ptr + m * TILE, mask=mask_y, other=0.0)
            change -= tl.load(slope_ptr + m * TILE, mask=mask_y, other=0.0)
            first_square += _sum_of_squares(change / tolerance / h0.to(ACC))
        tl.store(partial_ptr + 2 * num_tiles + program, first_square)
    else:
        at = (row // num_components) * stride_yb + (row % num_components) * stride_yd
        for m in range(0, num_modes):
            from_y0 = y0_ptr + at[:, None] + m * (at * 0 + stride_ym)[:, None] + c[None, :]
            y = tl.load(from_y0, mask=mask_y, other=0.0)
            tl.store(y_ptr + m * num_channels, y, mask=mask_y)
            tl.store(point_ptr + m * TILE, y, mask=mask_y)
        tl.debug_barrier()
        _evaluate(
            point_ptr, slope_ptr, tl.full((), 1.0, ACC), tl.full((), 0.0, tl.float64), key_ptr,
            query_bias_ptr, weight_ptr, bias_ptr, c, mask_y, num_modes, num_channels, HAS_SLOPE,
            TILE, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
        for m in range(0, num_modes):
            y = tl.load(point_ptr + m * TILE, mask=mask_y, other=0.0)
            tolerance = _tolerance(settings_ptr, tl.abs(y), mask_y).to(ACC)
            f0 = tl.load(slope_ptr + m * TILE, mask=mask_y, other=0.0)
            first_square += _sum_of_squares(y / tolerance)
            second_square += _sum_of_squares(f0 / tolerance)
            _mark_bad_rows(bad_ptr, row, mask_r, f0 + y)
        tl.store(partial_ptr + program, first_square)
        tl.store(partial_ptr + num_tiles + program, second_square)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _attention_attempt_kernel(
    key_ptr,
    query_bias_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    stages_ptr,
    settings_ptr,
    times_ptr,
    last_ptr,
    record_ptr,
    steps_ptr,
    starts_ptr,
    partial_ptr,
    bad_ptr,
    out_ptr,
    workspace_ptr,
    attempt,
    max_attempts,
    num_partials,
    num_entries,
    order,
    degree,
    num_rows,
    num_modes,
    num_components,
    num_channels,
    num_times,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Decides on the attempt before and reads its times, steps, keeps the end for when it is
    accepted. Values (T, B, M, D, C).
    """
    time, size, accepted, status, just_accepted, begin, before_size = _decide(
        attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order
    )
    program = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    row = program * BLOCK_R + r
    mask_r = row < num_rows
    mask_c = c < num_channels
    mask_y = mask_r[:, None] & mask_c[None, :]
    # v_0 ... v_K and the point of a stage, a tile a mode
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    v_ptr = workspace_ptr + program * (degree + 2) * num_modes * TILE
    v_ptr += r[:, None] * BLOCK_C + c[None, :]
    if just_accepted == 1:
        molecule = row // num_components
        component = row % num_components
        batch = num_rows.to(tl.int64) // num_components
        for first_time in range(0, num_times, BLOCK_T):
            x, inside, mask_t = _abscissae(
                times_ptr, row, mask_r, num_components, first_time, num_times, begin,
                begin + before_size, BLOCK_T,
            )  # fmt: skip
            t = first_time + tl.arange(0, BLOCK_T)
            to = (t[:, None] * batch + molecule[None, :]) * num_modes
            mask = (mask_t & inside)[:, :, None] & mask_c[None, None, :]
            for m in range(0, num_modes):
                acc = tl.zeros((BLOCK_T, BLOCK_R, BLOCK_C), ACC)
                for k in range(0, degree + 1):
                    v = tl.load(v_ptr + (k * num_modes + m) * TILE, mask=mask_y, other=0.0)
                    acc += _share(table_ptr, k, x, inside).to(ACC)[:, :, None] * v[None, :, :]
                at = ((to + m) * num_components + component[None, :]) * num_channels
                tl.store(out_ptr + at[:, :, None] + c[None, None, :], acc, mask=mask)
        tl.debug_barrier()  # the tiles are about to be overwritten
    if (status == RUNNING_) & (attempt < max_attempts):
        at = row[:, None] * num_modes * num_channels + c[None, :]
        span = num_entries.to(tl.int64)
        _fill_stages(
            starts_ptr + accepted * span + at, v_ptr, v_ptr + (degree + 1) * num_modes * TILE,
            stages_ptr, degree, time, size, key_ptr, query_bias_ptr, weight_ptr, bias_ptr, c,
            mask_y, num_modes, num_channels, HAS_SLOPE, TILE, PRECISION, ACC,
        )  # fmt: skip
        square = tl.full((), 0.0, tl.float64)
        for m in range(0, num_modes):
            start = tl.load(v_ptr + m * TILE, mask=mask_y, other=0.0)
            end = start
            error = tl.zeros((BLOCK_R, BLOCK_C), ACC)
            for k in range(1, degree + 1):
                v = tl.load(v_ptr + (k * num_modes + m) * TILE, mask=mask_y, other=0.0)
                end += _of_end(table_ptr, k, ACC) * v
                error += _of_error(table_ptr, k, ACC) * v
            to = starts_ptr + (accepted + 1) * span + at + m * num_channels
            tl.store(to, end, mask=mask_y)
            _mark_bad_rows(bad_ptr, row, mask_r, end)
            tolerance = _tolerance(settings_ptr, tl.maximum(tl.abs(start), tl.abs(end)), mask_y)
            square += _sum_of_squares(error.to(tl.float64) / tolerance)
        tl.store(partial_ptr + (attempt + 3) * num_partials + program, square)
