"""Dense output of a joint solve of linear dynamics at each molecule's own times, and its backward.

    y(t_j + x h_j) = Σ_k p_k(x) v_k,   v_0 = y_j,   v_k = h_j (v_{k-1} W + share_k b)       k <= K

over the accepted steps j that `gfnode_fast.kernels.propagate_joint` leaves: their times t_j, sizes
h_j and states y_j, the p_k from the same table. A program owns BLOCK_R rows of one mode and,
forward, BLOCK_T of their times, whose sums stay in registers. Backward: a program walks a bounded
share of the row tiles, takes the v_k of a step again into its own tiles of a workspace, pulls all
times and the step's end back by K products, and sums grad W in registers. It also gives the
derivative with respect to the first step's size h, from which the published gradient goes on
through the initial step: later sizes are constants, but later starts move with h.

A row of a mode, C = 64, T = 8, dopri5, two steps, fp32: forward 2.5 kB for 115 kflop, backward
2.8 kB for 340. No atomics; every sum has a fixed order. Limits: fp32 and fp64, C <= 64. Addresses
are 64-bit. Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.joint_values import _abscissae, _of_end, _share, _share_slope
from gfnode_fast.kernels.linear_dynamics import (
    _load_slope,
    _load_square,
    _next_power,
    _slope_share,
    _value_offsets,
)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _joint_read_fwd_kernel(
    starts_ptr,
    weight_ptr,
    slope_ptr,
    table_ptr,
    times_ptr,
    record_ptr,
    steps_ptr,
    out_ptr,
    degree,
    stride_wm,
    stride_wi,
    stride_wo,
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
    """`record_ptr` is the last record. Values (T, B, M, D, C); NaN where no step leads."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mode = tl.program_id(1).to(tl.int64)
    first_time = tl.program_id(2) * BLOCK_T
    c = tl.arange(0, BLOCK_C)
    mask_r = row < num_rows
    mask_c = c < num_channels
    mask_y = mask_r[:, None] & mask_c[None, :]
    weight = weight_ptr + mode * stride_wm
    weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels)
    slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC)
    at = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
    span = num_rows.to(tl.int64) * num_modes * num_channels
    acc = tl.zeros((BLOCK_T, BLOCK_R, BLOCK_C), ACC)
    reached = tl.zeros((BLOCK_T, BLOCK_R), tl.int1)
    for step in range(0, tl.load(record_ptr + 2).to(tl.int32)):
        begin = tl.load(steps_ptr + 2 * step)
        size = tl.load(steps_ptr + 2 * step + 1)
        x, inside, _ = _abscissae(
            times_ptr, row, mask_r, num_components, first_time, num_times, begin, begin + size,
            BLOCK_T,
        )  # fmt: skip
        reached = reached | inside
        v = tl.load(starts_ptr + step * span + at, mask=mask_y, other=0.0)
        acc += _share(table_ptr, 0, x, inside).to(ACC)[:, :, None] * v[None, :, :]
        for k in range(1, degree + 1):
            v = _next_power(v, weight, slope, k, begin, size, HAS_SLOPE, PRECISION, ACC)
            v = v * size.to(ACC)
            acc += _share(table_ptr, k, x, inside).to(ACC)[:, :, None] * v[None, :, :]
    acc = tl.where(reached[:, :, None], acc, float("nan"))
    to = _value_offsets(
        first_time, row, mode, num_rows, num_modes, num_components, num_channels, BLOCK_T
    )
    t = first_time + tl.arange(0, BLOCK_T)
    mask = ((t < num_times)[:, None] & mask_r[None, :])[:, :, None] & mask_c[None, None, :]
    tl.store(out_ptr + to[:, :, None] + c[None, None, :], acc, mask=mask)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _joint_read_bwd_kernel(
    grad_ptr,
    starts_ptr,
    weight_ptr,
    slope_ptr,
    table_ptr,
    times_ptr,
    record_ptr,
    steps_ptr,
    grad_y0_ptr,
    grad_weight_ptr,
    grad_slope_ptr,
    grad_size_ptr,
    workspace_ptr,
    degree,
    stride_gt,
    stride_gb,
    stride_gm,
    stride_gd,
    stride_wm,
    stride_wi,
    stride_wo,
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
    """Shares of grad W and of the derivative with respect to the first step's size, per program;
    adds to zeros in the shares of grad b.
    """
    program = tl.program_id(0).to(tl.int64)
    mode = tl.program_id(1).to(tl.int64)
    slot = program * num_modes + mode
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    mask_c = c < num_channels
    weight_ptr += mode * stride_wm
    weight = _load_square(weight_ptr, c, stride_wi, c, stride_wo, num_channels)
    # a program's tiles: v_0 ... v_K, and what the values give v_0 ... v_K
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    v_ptr = workspace_ptr + slot * 2 * (degree + 1) * TILE + r[:, None] * BLOCK_C + c[None, :]
    pulled_ptr = v_ptr + (degree + 1) * TILE
    accepted = tl.load(record_ptr + 2).to(tl.int32)
    span = num_rows.to(tl.int64) * num_modes * num_channels
    grad_weight = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    grad_size = tl.zeros((BLOCK_R,), tl.float64)
    for first_row in range(program * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        row = first_row + r
        mask_r = row < num_rows
        mask_y = mask_r[:, None] & mask_c[None, :]
        molecule = row // num_components
        component = row % num_components
        at = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
        from_row = molecule * stride_gb + mode * stride_gm + component * stride_gd
        lam = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for back in range(0, accepted):
            step = accepted - 1 - back
            begin = tl.load(steps_ptr + 2 * step)
            size = tl.load(steps_ptr + 2 * step + 1)
            tl.debug_barrier()  # other threads may still read the tiles of the step before
            v = tl.load(starts_ptr + step * span + at, mask=mask_y, other=0.0)
            tl.store(v_ptr, v)
            slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC)
            for k in range(1, degree + 1):
                v = _next_power(v, weight, slope, k, begin, size, HAS_SLOPE, PRECISION, ACC)
                v = v * size.to(ACC)
                tl.store(v_ptr + k * TILE, v)
            tl.debug_barrier()
            for first_time in range(0, num_times, BLOCK_T):
                x, inside, mask_t = _abscissae(
                    times_ptr, row, mask_r, num_components, first_time, num_times, begin,
                    begin + size, BLOCK_T,
                )  # fmt: skip
                t = (first_time + tl.arange(0, BLOCK_T)).to(tl.int64)
                from_grad = (t[:, None] * stride_gt + from_row[None, :])[:, :, None]
                mask = mask_t[:, :, None] & mask_c[None, None, :]
                grad = tl.load(grad_ptr + from_grad + c[None, None, :], mask=mask, other=0.0)
                # the first step's end moves with its size, later steps' starts do
                moves = tl.where(step == 0, -x / size, -1.0 / size)
                for k in range(0, degree + 1):
                    share = _share(table_ptr, k, x, inside).to(ACC)
                    pulled = tl.sum(share[:, :, None] * grad, axis=0)
                    if first_time > 0:
                        pulled += tl.load(pulled_ptr + k * TILE)
                    tl.store(pulled_ptr + k * TILE, pulled)
                    rate = (_share_slope(table_ptr, k, x, inside) * moves).to(ACC)
                    moved = tl.sum(rate[:, :, None] * grad, axis=0)
                    v = tl.load(v_ptr + k * TILE)
                    grad_size += tl.sum(moved * v, axis=1).to(tl.float64)
                tl.debug_barrier()  # other threads may add to what these have stored
            adjoint = _load_square(weight_ptr, c, stride_wo, c, stride_wi, num_channels)
            carried = tl.zeros((BLOCK_R, BLOCK_C), ACC)
            for j in range(0, degree):
                k = degree - j
                given = tl.load(pulled_ptr + k * TILE)
                given += _of_end(table_ptr, k, ACC) * lam
                if step == 0:
                    v = tl.load(v_ptr + k * TILE)
                    grad_size += tl.sum(given * v, axis=1).to(tl.float64) * k / size
                carried = (carried + given) * size.to(ACC)
                if HAS_SLOPE:
                    if k <= 2:  # kept in memory: in registers all along, it would spill
                        by_channel = _slope_share(k, begin, size).to(ACC) * tl.sum(carried, axis=0)
                        to = grad_slope_ptr + slot * num_channels + c
                        by_channel += tl.load(to, mask=mask_c, other=0.0)
                        tl.debug_barrier()
                        tl.store(to, by_channel, mask=mask_c)
                        tl.debug_barrier()  # other threads may add to what these have stored
                    if (k == 1) & (step > 0):  # a later step's start moves with the first size
                        slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC)
                        grad_size += tl.sum(carried * slope[None, :], axis=1).to(tl.float64)
                v = tl.load(v_ptr + (k - 1) * TILE)
                grad_weight += tl.dot(
                    tl.trans(v), carried, input_precision=PRECISION, out_dtype=ACC
                )
                carried = tl.dot(carried, adjoint, input_precision=PRECISION, out_dtype=ACC)
            lam = carried + tl.load(pulled_ptr) + lam
        to = (molecule * num_modes + mode) * num_components + component
        to = grad_y0_ptr + (to * num_channels)[:, None] + c[None, :]
        tl.store(to, lam, mask=mask_y)
    to = grad_weight_ptr + (slot * num_channels + c[:, None]) * num_channels + c[None, :]
    tl.store(to, grad_weight, mask=mask_c[:, None] & mask_c[None, :])
    tl.store(grad_size_ptr + slot, tl.sum(grad_size, axis=0))
