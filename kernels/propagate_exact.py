"""Linear and affine dynamics at each molecule's own times, the whole solve in one launch.

    dy/ds = y W_m + s b_m,  y(0) = y0         y(t + x h) = Σ_k x^k/k! P_k
    P_0 = y(t),  P_1 = P_0 hW + t h b,  P_2 = P_1 hW + h² b,  P_{k+1} = P_k hW,  k <= K

Degree K and number n = 1/h of steps per unit of time are read from device memory, so no launch
waits for the host and none is compiled again when weights grow. One step serves trained norms; K
products serve all times of a row.

A program owns BLOCK_R rows (a molecule, or one Cartesian component of it) of one mode and T_b <=
BLOCK_T of its times. hW stays resident, the state and all times' sums stay in registers. Backward:
a program walks a bounded share of the row tiles, always the same; takes the states at the starts of
steps and the P_k again, into its own slots of a workspace that fits a level-2 cache; pulls the
times back by K products; sums grad W and grad b in registers and writes them once. A second launch
adds the programs' shares: no atomics, the order of every sum is fixed, and values do not depend on
batch mates, bit for bit.

A row of a mode at C = 64, T = 8, K = 5, fp32: forward moves 256 B in and 2 kB out for 41 kflop (+5
in sums), backward 2.3 kB in and 256 B out for 41 recomputing, 41 pulling back and 41 for grad W.
That is 18 and 48 flops a byte: products go to the tensor cores, three tf32 ones for one of fp32.

Status, per row and mode: 1 where a value is not finite, 2 where a time is not positive or needs
more than MAX_STEPS steps, whose values are NaN. An arrived row is set to zero, so that later steps,
taken for its tile mates, cannot overflow. Limits: fp32 and fp64, C <= 64; beyond MAX_STARTS steps
backward walks again from the last start kept. Addresses are 64-bit. Tuned on: none yet; not yet run
on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.linear_dynamics import (
    _load_slope,
    _load_square,
    _next_power,
    _slope_share,
    _value_offsets,
)


@triton.jit
def _zero_arrived(state, last, step):
    return tl.where((last > step)[:, None], state, 0.0)


@triton.jit
def _end_of_step(
    state, last, weight, slope, step, degree, HAS_SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """State at a step's end."""
    p = _zero_arrived(state, last, step)
    end = p
    factor = tl.full((), 1.0, ACC)
    for k in range(1, degree + 1):
        p = _next_power(p, weight, slope, k, step, 1, HAS_SLOPE, PRECISION, ACC)
        factor = factor / k
        end += factor * p
    return end


@triton.jit
def _row_times(
    times_ptr, row, mask_r, num_components, first_time, num_times, substeps, BLOCK_T, ACC
):
    """Times (BLOCK_T, BLOCK_R) of rows in units of a step, 0 beyond the last."""
    t = first_time + tl.arange(0, BLOCK_T)
    at = (row // num_components)[None, :] * num_times + t[:, None]
    mask = (t < num_times)[:, None] & mask_r[None, :]
    s = tl.load(times_ptr + at, mask=mask, other=0.0).to(ACC)
    return s * substeps, mask


@triton.jit
def _num_steps(last, MAX_STEPS: tl.constexpr):
    """Steps that a tile takes; a time that is not finite or too late asks for none."""
    return tl.ceil(tl.max(tl.where(last <= MAX_STEPS, last, 0.0), axis=0)).to(tl.int32)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _propagate_exact_fwd_kernel(
    y0_ptr,
    weight_ptr,
    slope_ptr,
    times_ptr,
    plan_ptr,
    out_ptr,
    status_ptr,
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
    num_times,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mode = tl.program_id(1).to(tl.int64)
    first_time = tl.program_id(2) * BLOCK_T
    c = tl.arange(0, BLOCK_C)
    mask_r = row < num_rows
    mask_c = c < num_channels
    mask_y = mask_r[:, None] & mask_c[None, :]
    degree = tl.load(plan_ptr)
    substeps = tl.load(plan_ptr + 1).to(ACC)
    size = 1.0 / substeps
    weight = weight_ptr + mode * stride_wm
    weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels) * size
    slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC) * size * size
    x, mask_t = _row_times(
        times_ptr, row, mask_r, num_components, first_time, num_times, substeps, BLOCK_T, ACC
    )
    last = tl.max(x, axis=0)
    at = (row // num_components) * stride_yb + mode * stride_ym
    at += (row % num_components) * stride_yd
    state = tl.load(y0_ptr + at[:, None] + c[None, :], mask=mask_y, other=0.0)
    acc = tl.zeros((BLOCK_T, BLOCK_R, BLOCK_C), ACC)
    for step in range(0, _num_steps(last, MAX_STEPS)):
        p = _zero_arrived(state, last, step)
        inside = (x > step) & (x <= step + 1)
        share = tl.where(inside, 1.0, 0.0).to(ACC)
        acc += share[:, :, None] * p[None, :, :]
        end = p
        factor = tl.full((), 1.0, ACC)
        for k in range(1, degree + 1):
            p = _next_power(p, weight, slope, k, step, 1, HAS_SLOPE, PRECISION, ACC)
            share = share * (x - step) / k
            acc += share[:, :, None] * p[None, :, :]
            factor = factor / k
            end += factor * p
        state = end
    good_time = (x > 0) & (x <= MAX_STEPS)
    acc = tl.where(good_time[:, :, None], acc, float("nan"))
    to = _value_offsets(
        first_time, row, mode, num_rows, num_modes, num_components, num_channels, BLOCK_T
    )
    mask = mask_t[:, :, None] & mask_c[None, None, :]
    tl.store(out_ptr + to[:, :, None] + c[None, None, :], acc, mask=mask)
    # NaN and infinities fail both comparisons
    finite = (acc > -float("inf")) & (acc < float("inf"))
    bad_value = tl.max(tl.max(tl.where(mask & ~finite, 1, 0), axis=2), axis=0)
    bad_time = tl.max(tl.where(mask_t & ~good_time, 2, 0), axis=0)
    chunk = tl.program_id(2).to(tl.int64) * num_rows
    status = status_ptr + (chunk + row) * num_modes + mode
    tl.store(status, tl.maximum(bad_value, bad_time), mask=mask_r)


@triton.jit
def _last_time(
    times_ptr, row, mask_r, num_components, num_times, substeps,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A row's last time in units of a step."""
    last = tl.zeros((BLOCK_R,), ACC)
    for first_time in range(0, num_times, BLOCK_T):
        x, _ = _row_times(
            times_ptr, row, mask_r, num_components, first_time, num_times, substeps, BLOCK_T, ACC
        )
        last = tl.maximum(last, tl.max(x, axis=0))
    return last


@triton.jit
def _pull_values(
    grad_ptr, stride_gt, from_row, c, mask_c, times_ptr, row, mask_r, num_components, num_times,
    substeps, step, degree, pulled_ptr, TILE: tl.constexpr, BLOCK_T: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores, for k = 0 ... K, what the times inside a step give P_k: Σ_t x^k/k! grad_t."""
    for first_time in range(0, num_times, BLOCK_T):
        x, mask_t = _row_times(
            times_ptr, row, mask_r, num_components, first_time, num_times, substeps, BLOCK_T, ACC
        )
        t = (first_time + tl.arange(0, BLOCK_T)).to(tl.int64)
        at = (t[:, None] * stride_gt + from_row[None, :])[:, :, None] + c[None, None, :]
        mask = mask_t[:, :, None] & mask_c[None, None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
        share = tl.where((x > step) & (x <= step + 1), 1.0, 0.0).to(ACC)
        for k in range(0, degree + 1):
            pulled = tl.sum(share[:, :, None] * grad, axis=0)
            to = pulled_ptr + k * TILE
            if first_time > 0:
                pulled += tl.load(to)
            tl.store(to, pulled)
            share = share * (x - step) / (k + 1)
        tl.debug_barrier()  # other threads may add to what these have stored


@triton.jit(do_not_specialize=BATCH_SIZES)
def _propagate_exact_bwd_kernel(
    grad_ptr,
    y0_ptr,
    weight_ptr,
    slope_ptr,
    times_ptr,
    plan_ptr,
    grad_y0_ptr,
    grad_weight_ptr,
    grad_slope_ptr,
    workspace_ptr,
    stride_gt,
    stride_gb,
    stride_gm,
    stride_gd,
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
    num_times,
    max_degree,
    max_starts,
    HAS_SLOPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    mode = tl.program_id(1).to(tl.int64)
    slot = program * num_modes + mode
    c = tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    mask_c = c < num_channels
    degree = tl.load(plan_ptr)
    substeps = tl.load(plan_ptr + 1).to(ACC)
    size = 1.0 / substeps
    weight_ptr += mode * stride_wm
    weight = _load_square(weight_ptr, c, stride_wi, c, stride_wo, num_channels) * size
    slope = _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE, ACC) * size * size
    # a program's tiles: P_0 ... P_{K-1}, what the values give P_0 ... P_K, states at steps' starts
    TILE: tl.constexpr = BLOCK_R * BLOCK_C
    workspace_ptr += slot * (2 * max_degree + 1 + max_starts) * TILE
    derivatives_ptr = workspace_ptr + r[:, None] * BLOCK_C + c[None, :]
    pulled_ptr = derivatives_ptr + max_degree * TILE
    starts_ptr = pulled_ptr + (max_degree + 1) * TILE
    grad_weight = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    grad_slope = tl.zeros((BLOCK_C,), ACC)
    for first_row in range(program * BLOCK_R, num_rows, tl.num_programs(0) * BLOCK_R):
        row = first_row + r
        mask_r = row < num_rows
        mask_y = mask_r[:, None] & mask_c[None, :]
        molecule = row // num_components
        component = row % num_components
        last = _last_time(
            times_ptr, row, mask_r, num_components, num_times, substeps, BLOCK_R, BLOCK_T, ACC
        )
        at = molecule * stride_yb + mode * stride_ym + component * stride_yd
        state = tl.load(y0_ptr + at[:, None] + c[None, :], mask=mask_y, other=0.0)
        steps = _num_steps(last, MAX_STEPS)
        tl.debug_barrier()  # other threads may still read the slots of the tile before
        tl.store(starts_ptr, state)
        for step in range(1, tl.minimum(steps, max_starts)):
            state = _end_of_step(
                state, last, weight, slope, step - 1, degree, HAS_SLOPE, PRECISION, ACC
            )
            tl.store(starts_ptr + step * TILE, state)
        from_row = molecule * stride_gb + mode * stride_gm + component * stride_gd
        lam = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for back in range(0, steps):
            step = steps - 1 - back
            kept = tl.minimum(step, max_starts - 1)
            tl.debug_barrier()
            p = tl.load(starts_ptr + kept * TILE)
            for i in range(kept, step):
                p = _end_of_step(p, last, weight, slope, i, degree, HAS_SLOPE, PRECISION, ACC)
            p = _zero_arrived(p, last, step)
            factor = tl.full((), 1.0, ACC)
            for k in range(1, degree + 1):
                tl.store(derivatives_ptr + (k - 1) * TILE, p)
                p = _next_power(p, weight, slope, k, step, 1, HAS_SLOPE, PRECISION, ACC)
                factor = factor / k
            _pull_values(
                grad_ptr, stride_gt, from_row, c, mask_c, times_ptr, row, mask_r, num_components,
                num_times, substeps, step, degree, pulled_ptr, TILE, BLOCK_T, ACC,
            )  # fmt: skip
            # loaded here: held together with W all along, it would spill
            adjoint = _load_square(weight_ptr, c, stride_wo, c, stride_wi, num_channels) * size
            # the step's end is Σ_k P_k/k!, so its gradient joins that of the values
            pulled = tl.load(pulled_ptr + degree * TILE) + factor * lam
            for j in range(0, degree):
                k = degree - j
                p = tl.load(derivatives_ptr + (k - 1) * TILE)
                grad_weight += tl.dot(tl.trans(p), pulled, input_precision=PRECISION, out_dtype=ACC)
                if HAS_SLOPE:
                    share = _slope_share(k, step, 1).to(ACC)
                    grad_slope += share * tl.sum(pulled, axis=0)
                pulled = tl.dot(pulled, adjoint, input_precision=PRECISION, out_dtype=ACC)
                factor = factor * k
                pulled += tl.load(pulled_ptr + (k - 1) * TILE) + factor * lam
            lam = _zero_arrived(pulled, last, step)
        to = (molecule * num_modes + mode) * num_components + component
        to = grad_y0_ptr + (to * num_channels)[:, None] + c[None, :]
        tl.store(to, lam, mask=mask_y)
    to = grad_weight_ptr + (slot * num_channels + c[:, None]) * num_channels + c[None, :]
    mask_w = mask_c[:, None] & mask_c[None, :]
    grad_weight = grad_weight * size
    tl.store(to, grad_weight, mask=mask_w)
    if HAS_SLOPE:
        to = grad_slope_ptr + slot * num_channels + c
        grad_slope = grad_slope * size * size
        tl.store(to, grad_slope, mask=mask_c)
