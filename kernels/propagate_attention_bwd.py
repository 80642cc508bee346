"""Backward of the joint attention solve, by replay.

    v_k = h g(t + α_k h, p_k),   p_k = v_0 + Σ_j β_kj v_j,   y(t + x h) = Σ_k p_k(x) v_k

A program walks a bounded share of the row tiles. For each accepted step, last one first, it takes
the stages v again into its workspace, pulls back the values inside the step and the step's end onto
all v_k, then the evaluations one by one: each pulls its gradient through W, the softmax and P onto
its point p_k and from there onto the v before it. Gradients of parameters are added to the
program's own shares in memory, which the launcher sums: no atomics, the order of every sum is
fixed.

It also gives the derivative with respect to the first step's size h, from which the published
gradient goes on through the initial step: later sizes are constants, but later starts move with h.

A step of a row with M = 2, C = 64, dopri5, fp32: 280 kflop for the stages and 840 for their
adjoint; 2 kB from memory and about 0.3 MB a row from the level-2 cache, half of it the shares.
Limits as `propagate_attention`. Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.attention_dynamics import (
    STAGE_ROW_,
    _at_time,
    _fill_point,
    _fill_stages,
    _stage_time,
)
from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.joint_values import _abscissae, _of_end, _share, _share_slope
from gfnode_fast.kernels.mode_rhs import _attend, _load_matrix, _pull_attention, _query


@triton.jit
def _add_row(ptr, value, c, mask_c):
    tl.store(ptr + c, tl.load(ptr + c, mask=mask_c, other=0.0) + value, mask=mask_c)


@triton.jit
def _add_product(ptr, left, right, c, num_channels, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """Adds leftᵀ right to a dense C x C matrix."""
    mask = (c < num_channels)[:, None] & (c < num_channels)[None, :]
    to = ptr + c[:, None] * num_channels + c[None, :]
    product = tl.dot(tl.trans(left), right, input_precision=PRECISION, out_dtype=ACC)
    tl.store(to, tl.load(to, mask=mask, other=0.0) + product, mask=mask)


@triton.jit
def _pull_evaluation(
    point_ptr, grad_ptr, grad_point_ptr, factor, s, key_ptr, query_bias_ptr, weight_ptr, bias_ptr,
    grad_key_ptr, grad_query_bias_ptr, grad_weight_ptr, grad_bias_ptr, c, mask_y, num_modes,
    num_channels,
    HAS_SLOPE: tl.constexpr, BLOCK_R: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the point for that of factor · g(s, point), adds those of the
    parameters, returns that of s, row by row.
    """
    mask_c = c < num_channels
    query_bias = _at_time(query_bias_ptr, num_channels, s, c, mask_c, HAS_SLOPE, ACC)
    square = num_channels * num_channels
    row_of_slopes = num_modes * num_channels
    grad_s = tl.zeros((BLOCK_R,), tl.float64)
    for m in range(0, num_modes):
        u = _query(
            point_ptr + m * TILE, mask_y, key_ptr, num_channels, 1, query_bias, c, num_channels,
            PRECISION,
        )  # fmt: skip
        a, normaliser = _attend(u, point_ptr, TILE, mask_y, num_modes)
        grad = tl.load(grad_ptr + m * TILE, mask=mask_y, other=0.0) * factor.to(ACC)
        _add_product(grad_weight_ptr + m * square, a, grad, c, num_channels, PRECISION, ACC)
        summed = tl.sum(grad, axis=0)
        _add_row(grad_bias_ptr + m * num_channels, summed, c, mask_c)
        w = _load_matrix(weight_ptr + m * square, c, 1, num_channels, c, num_channels, num_channels)
        grad_a = tl.dot(grad, w, input_precision=PRECISION, out_dtype=ACC)
        grad_u = _pull_attention(
            grad_a, u, a, normaliser, point_ptr, TILE, grad_point_ptr, TILE, mask_y, m, num_modes
        )
        point = tl.load(point_ptr + m * TILE, mask=mask_y, other=0.0)
        _add_product(grad_key_ptr, point, grad_u, c, num_channels, PRECISION, ACC)
        of_query = tl.sum(grad_u, axis=0)
        _add_row(grad_query_bias_ptr, of_query, c, mask_c)
        if HAS_SLOPE:
            time = s.to(ACC)
            to = grad_bias_ptr + row_of_slopes + m * num_channels
            _add_row(to, time * summed, c, mask_c)
            _add_row(grad_query_bias_ptr + num_channels, time * of_query, c, mask_c)
            slope = bias_ptr + row_of_slopes + m * num_channels
            slope = tl.load(slope + c, mask=mask_c, other=0.0)
            grad_s += tl.sum(grad * slope[None, :], axis=1).to(tl.float64)
            slope = tl.load(query_bias_ptr + num_channels + c, mask=mask_c, other=0.0)
            grad_s += tl.sum(grad_u * slope[None, :], axis=1).to(tl.float64)
        tl.debug_barrier()  # other threads may add to what these have stored
        key = _load_matrix(key_ptr, c, 1, num_channels, c, num_channels, num_channels)
        to = grad_point_ptr + m * TILE
        grad_point = tl.load(to, mask=mask_y, other=0.0)
        grad_point += tl.dot(grad_u, key, input_precision=PRECISION, out_dtype=ACC)
        tl.debug_barrier()
        tl.store(to, grad_point, mask=mask_y)
        tl.debug_barrier()
    return grad_s


@triton.jit(do_not_specialize=BATCH_SIZES)
def _attention_bwd_kernel(
    grad_ptr,
    starts_ptr,
    key_ptr,
    query_bias_ptr,
    weight_ptr,
    bias_ptr,
    table_ptr,
    stages_ptr,
    times_ptr,
    record_ptr,
    steps_ptr,
    grad_y0_ptr,
    grad_key_ptr,
    grad_query_bias_ptr,
    grad_weight_ptr,
    grad_bias_ptr,
    grad_size_ptr,
    workspace_ptr,
    degree,
    stride_gt,
    stride_gb,
    stride_gm,
    stride_gd,
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
    """Adds to zeros in the program's shares; stores grad_y0 and the derivative by h."""
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    mask_c = c < num_channels
    NUM_TIMES: tl.constexpr = 2 if HAS_SLOPE else 1  # rows of biases: constant and slope
    square = num_channels * num_channels
    grad_key_ptr += program * square
    grad_query_bias_ptr += program * NUM_TIMES * num_channels
    grad_weight_ptr += program * num_modes * square
    grad_bias_ptr += program * NUM_TIMES * num_modes * num_channels
    # v_0 ... v_K; their gradients; a point, its gradient, the gradient of a step's end
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    states = (degree + 1) * num_modes * TILE
    v_ptr = workspace_ptr + program * (2 * states + 3 * num_modes * TILE)
    v_ptr += r[:, None] * BLOCK_C + c[None, :]
    grad_v_ptr = v_ptr + states
    point_ptr = grad_v_ptr + states
    grad_point_ptr = point_ptr + num_modes * TILE
    lam_ptr = grad_point_ptr + num_modes * TILE
    accepted = tl.load(record_ptr + 2).to(tl.int32)
    span = num_rows.to(tl.int64) * num_modes * num_channels
    grad_size = tl.zeros((BLOCK_R,), tl.float64)
    for first_row in range(program * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        row = first_row + r
        mask_r = row < num_rows
        mask_y = mask_r[:, None] & mask_c[None, :]
        molecule = row // num_components
        component = row % num_components
        at = row[:, None] * num_modes * num_channels + c[None, :]
        from_row = molecule * stride_gb + component * stride_gd
        for m in range(0, num_modes):
            tl.store(lam_ptr + m * TILE, tl.zeros((BLOCK_R, BLOCK_C), ACC), mask=mask_y)
        for back in range(0, accepted):
            step = accepted - 1 - back
            begin = tl.load(steps_ptr + 2 * step)
            size = tl.load(steps_ptr + 2 * step + 1)
            tl.debug_barrier()  # other threads may still read the tiles of the step before
            _fill_stages(
                starts_ptr + step * span + at, v_ptr, point_ptr, stages_ptr, degree, begin, size,
                key_ptr, query_bias_ptr, weight_ptr, bias_ptr, c, mask_y, num_modes, num_channels,
                HAS_SLOPE, TILE, PRECISION, ACC,
            )  # fmt: skip
            for m in range(0, num_modes):
                lam = tl.load(lam_ptr + m * TILE, mask=mask_y, other=0.0)
                for k in range(0, degree + 1):
                    to = grad_v_ptr + (k * num_modes + m) * TILE
                    tl.store(to, _of_end(table_ptr, k, ACC) * lam, mask=mask_y)
            tl.debug_barrier()
            for first_time in range(0, num_times, BLOCK_T):
                x, inside, mask_t = _abscissae(
                    times_ptr, row, mask_r, num_components, first_time, num_times, begin,
                    begin + size, BLOCK_T,
                )  # fmt: skip
                # the first step's end moves with its size, later steps' starts do
                moves = tl.where(step == 0, -x / size, -1.0 / size)
                t = (first_time + tl.arange(0, BLOCK_T)).to(tl.int64)
                from_grad = grad_ptr + t[:, None] * stride_gt + from_row[None, :]
                mask = mask_t[:, :, None] & mask_c[None, None, :]
                for m in range(0, num_modes):
                    from_mode = from_grad + m * (from_row * 0 + stride_gm)[None, :]
                    grad = tl.load(from_mode[:, :, None] + c[None, None, :], mask=mask, other=0.0)
                    for k in range(0, degree + 1):
                        tile = (k * num_modes + m) * TILE
                        share = _share(table_ptr, k, x, inside).to(ACC)
                        pulled = tl.sum(share[:, :, None] * grad, axis=0)
                        pulled += tl.load(grad_v_ptr + tile, mask=mask_y, other=0.0)
                        tl.store(grad_v_ptr + tile, pulled, mask=mask_y)
                        rate = (_share_slope(table_ptr, k, x, inside) * moves).to(ACC)
                        moved = tl.sum(rate[:, :, None] * grad, axis=0)
                        v = tl.load(v_ptr + tile, mask=mask_y, other=0.0)
                        grad_size += tl.sum(moved * v, axis=1).to(tl.float64)
                tl.debug_barrier()  # other threads may add to what these have stored
            for i in range(0, degree):
                stage = degree - 1 - i
                of_stage = (stage + 1) * num_modes * TILE
                _fill_point(v_ptr, point_ptr, stages_ptr, stage, mask_y, num_modes, TILE, ACC)
                grad_s = _pull_evaluation(
                    point_ptr, grad_v_ptr + of_stage, grad_point_ptr, size,
                    _stage_time(stages_ptr, stage, begin, size), key_ptr, query_bias_ptr,
                    weight_ptr, bias_ptr, grad_key_ptr, grad_query_bias_ptr, grad_weight_ptr,
                    grad_bias_ptr, c, mask_y, num_modes, num_channels, HAS_SLOPE, BLOCK_R, TILE,
                    PRECISION, ACC,
                )  # fmt: skip
                if step == 0:
                    grad_size += grad_s * _stage_time(stages_ptr, stage, 0.0, 1.0)
                    for m in range(0, num_modes):  # v_k is h times an evaluation
                        grad = tl.load(grad_v_ptr + of_stage + m * TILE, mask=mask_y, other=0.0)
                        v = tl.load(v_ptr + of_stage + m * TILE, mask=mask_y, other=0.0)
                        grad_size += tl.sum(grad * v, axis=1).to(tl.float64) / size
                else:
                    grad_size += grad_s
                for m in range(0, num_modes):
                    grad = tl.load(grad_point_ptr + m * TILE, mask=mask_y, other=0.0)
                    to = grad_v_ptr + m * TILE
                    tl.store(to, tl.load(to, mask=mask_y, other=0.0) + grad, mask=mask_y)
                    for j in range(0, stage):
                        to = grad_v_ptr + ((j + 1) * num_modes + m) * TILE
                        share = tl.load(stages_ptr + stage * STAGE_ROW_ + j).to(ACC) * grad
                        share += tl.load(to, mask=mask_y, other=0.0)
                        tl.store(to, share, mask=mask_y)
                tl.debug_barrier()
            for m in range(0, num_modes):
                lam = tl.load(grad_v_ptr + m * TILE, mask=mask_y, other=0.0)
                tl.store(lam_ptr + m * TILE, lam, mask=mask_y)
            tl.debug_barrier()
        for m in range(0, num_modes):
            lam = tl.load(lam_ptr + m * TILE, mask=mask_y, other=0.0)
            to = ((molecule * num_modes + m) * num_components + component) * num_channels
            tl.store(grad_y0_ptr + to[:, None] + c[None, :], lam, mask=mask_y)
        tl.debug_barrier()
    tl.store(grad_size_ptr + program, tl.sum(grad_size, axis=0))
