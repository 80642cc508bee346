"""Linear dynamics dy/ds = y W_m under joint step control: the published adaptive solve, no host.

For a linear right-hand side each stage of an explicit method is a polynomial in hW, so with
v_0 = y, v_k = v_{k-1} hW the step's end, its error estimate and its dense output are

    y_1 = Σ_k e_k v_k,   error = Σ_k r_k v_k,   y(t + x h) = Σ_k p_k(x) v_k,   p_k quartic, k <= K

with constants of the tableau (`polynomial_table`); K = 7 for dopri5. The error norm is one sum over
the whole batch, so a step needs a barrier over the grid. A barrier inside one launch would have all
programs resident and waiting on atomics; the end of a launch is a barrier too, and is captured in a
CUDA graph as it is. So: one launch an attempt. Its programs each begin by summing the partial norms
of the attempt before, in one order, and decide alike whether it is accepted; then they step from
the state kept for that case. Program 0 writes the decision down. The number of launches is fixed:
those after the end find the solve done and return.

A program owns BLOCK_R rows of one mode, all channels. A row of a mode, C = 64, dopri5, three
attempts, fp32: 1.5 kB for 172 kflop. No atomics; every sum has a fixed order, the same in all
programs. Limits: fp32 and fp64, C <= 64, methods whose last stage is the step's end. Addresses are
64-bit. Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.propagate_exact import _load_square

# A record: time, step size, number of accepted steps, status, whether attempt 0 was accepted.
RECORD = 8
RUNNING, DONE, NOT_FINITE, UNDERFLOW = 0, 1, 2, 3
# A row of the table: p_k's five coefficients, e_k, r_k.
TABLE = 8

RECORD_ = tl.constexpr(RECORD)
TABLE_ = tl.constexpr(TABLE)
RUNNING_ = tl.constexpr(RUNNING)
DONE_ = tl.constexpr(DONE)
NOT_FINITE_ = tl.constexpr(NOT_FINITE)
UNDERFLOW_ = tl.constexpr(UNDERFLOW)
SAFETY = tl.constexpr(0.9)
MAX_GROWTH = tl.constexpr(10.0)
MIN_GROWTH = tl.constexpr(0.2)
TINY_NORM = tl.constexpr(1e-5)
TINY_STEP = tl.constexpr(1e-6)
BLOCK_P = tl.constexpr(1024)


@triton.jit
def _rms(partial_ptr, num_partials, num_entries):
    acc = tl.zeros((BLOCK_P,), tl.float64)
    for first in range(0, num_partials, BLOCK_P):
        i = first + tl.arange(0, BLOCK_P)
        acc += tl.load(partial_ptr + i, mask=i < num_partials, other=0.0)
    return tl.sqrt(tl.sum(acc, axis=0) / num_entries)


@triton.jit
def _power(x, exponent):
    """x ** exponent for x > 0."""
    return tl.exp2(exponent * tl.log2(x))


@triton.jit
def _first_step(partial_ptr, num_partials, num_entries, order):
    """Hairer, Norsett, Wanner I, II.4, from the norms of y, yW and yWW; (f1 - f0)/h0 is yWW."""
    d0 = _rms(partial_ptr, num_partials, num_entries)
    d1 = _rms(partial_ptr + num_partials, num_partials, num_entries)
    d2 = _rms(partial_ptr + 2 * num_partials, num_partials, num_entries)
    h0 = tl.where((d0 < TINY_NORM) | (d1 < TINY_NORM), TINY_STEP, 0.01 * d0 / d1)
    largest = tl.maximum(d1, d2)
    still = (d1 <= 1e-15) & (d2 <= 1e-15)
    h1 = tl.where(
        still,
        tl.maximum(tl.full((), TINY_STEP, tl.float64), h0 * 1e-3),
        _power(0.01 / tl.where(still, 1.0, largest), 1.0 / order.to(tl.float64)),
    )
    finite = (d0 + d1 + d2) < float("inf")
    return tl.where(finite, tl.minimum(100 * h0, h1), 0.0), finite


@triton.jit
def _decide(
    attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order
):
    """What attempt number `attempt` has to do; program 0 of the launch writes it down."""
    is_first = attempt == 0
    writes = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    last = tl.load(last_ptr)
    time = tl.full((), 0.0, tl.float64)
    accepted = tl.full((), 0, tl.int32)
    status = tl.full((), RUNNING_, tl.int32)
    first_accepted = tl.full((), 0, tl.int32)
    if is_first:
        size, finite = _first_step(partial_ptr, num_partials, num_entries, order)
        if not finite:
            status = tl.full((), NOT_FINITE_, tl.int32)
    else:
        before = record_ptr + (attempt - 1) * RECORD_
        time = tl.load(before)
        size = tl.load(before + 1)
        accepted = tl.load(before + 2).to(tl.int32)
        status = tl.load(before + 3).to(tl.int32)
        first_accepted = tl.load(before + 4).to(tl.int32)
        if status == RUNNING_:
            # the first three rows of partial sums are those of the initial step
            ratio = _rms(partial_ptr + (attempt + 2) * num_partials, num_partials, num_entries)
            if ratio < float("inf"):
                if ratio <= 1:
                    if writes:
                        tl.store(steps_ptr + 2 * accepted, time)
                        tl.store(steps_ptr + 2 * accepted + 1, size)
                    first_accepted = tl.where(attempt == 1, 1, first_accepted)
                    accepted += 1
                    time += size
                floor = tl.where(ratio < 1, 1.0, MIN_GROWTH)
                growth = SAFETY * _power(tl.maximum(ratio, 1e-300), -1.0 / order.to(tl.float64))
                size = size * tl.minimum(MAX_GROWTH, tl.maximum(growth, floor))
            else:
                status = tl.full((), NOT_FINITE_, tl.int32)
    if status == RUNNING_:
        if time >= last:
            status = tl.full((), DONE_, tl.int32)
        elif not (time + size > time):
            status = tl.full((), UNDERFLOW_, tl.int32)
    if writes:
        to = record_ptr + attempt * RECORD_
        tl.store(to, time)
        tl.store(to + 1, size)
        tl.store(to + 2, accepted.to(tl.float64))
        tl.store(to + 3, status.to(tl.float64))
        tl.store(to + 4, first_accepted.to(tl.float64))
    return size, accepted, status


@triton.jit
def _joint_init_kernel(
    y0_ptr,
    weight_ptr,
    settings_ptr,
    starts_ptr,
    partial_ptr,
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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Keeps y0 as the first start (R, M, C) and sums the squares of the initial step's norms."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mode = tl.program_id(1).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    mask = (row < num_rows)[:, None] & (c < num_channels)[None, :]
    at = (row // num_components) * stride_yb + mode * stride_ym
    at += (row % num_components) * stride_yd
    y = tl.load(y0_ptr + at[:, None] + c[None, :], mask=mask, other=0.0)
    to = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
    tl.store(starts_ptr + to, y, mask=mask)
    weight = weight_ptr + mode * stride_wm
    weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels)
    tolerance = tl.load(settings_ptr + 1) + tl.load(settings_ptr) * tl.abs(y).to(tl.float64)
    tolerance = tl.where(mask, tolerance, 1.0).to(ACC)
    num_partials = tl.num_programs(0) * num_modes
    slot = partial_ptr + tl.program_id(0) * num_modes + tl.program_id(1)
    for power in tl.static_range(3):
        scaled = (y / tolerance).to(tl.float64)
        tl.store(slot + power * num_partials, tl.sum(tl.sum(scaled * scaled, axis=1), axis=0))
        y = tl.dot(y, weight, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _joint_attempt_kernel(
    weight_ptr,
    table_ptr,
    settings_ptr,
    last_ptr,
    record_ptr,
    steps_ptr,
    starts_ptr,
    partial_ptr,
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
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Decides on the attempt before, steps, keeps the end for when it is accepted."""
    size, accepted, status = _decide(
        attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order
    )
    if status == RUNNING_:
        row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        mode = tl.program_id(1).to(tl.int64)
        c = tl.arange(0, BLOCK_C)
        mask = (row < num_rows)[:, None] & (c < num_channels)[None, :]
        at = (row[:, None] * num_modes + mode) * num_channels + c[None, :]
        span = num_entries.to(tl.int64)
        start = tl.load(starts_ptr + accepted * span + at, mask=mask, other=0.0)
        weight = weight_ptr + mode * stride_wm
        weight = _load_square(weight, c, stride_wi, c, stride_wo, num_channels)
        v = start
        end = start
        error = tl.zeros((BLOCK_R, BLOCK_C), ACC)
        for k in range(1, degree + 1):
            v = tl.dot(v, weight, input_precision=PRECISION, out_dtype=ACC) * size.to(ACC)
            end += tl.load(table_ptr + k * TABLE_ + 5).to(ACC) * v
            error += tl.load(table_ptr + k * TABLE_ + 6).to(ACC) * v
        tl.store(starts_ptr + (accepted + 1) * span + at, end, mask=mask)
        larger = tl.maximum(tl.abs(start), tl.abs(end)).to(tl.float64)
        tolerance = tl.load(settings_ptr + 1) + tl.load(settings_ptr) * larger
        scaled = error.to(tl.float64) / tl.where(mask, tolerance, 1.0)
        slot = (attempt + 3) * num_partials + tl.program_id(0) * num_modes + tl.program_id(1)
        tl.store(partial_ptr + slot, tl.sum(tl.sum(scaled * scaled, axis=1), axis=0))


@triton.jit
def _joint_decide_kernel(
    last_ptr, record_ptr, steps_ptr, partial_ptr, attempt, num_partials, num_entries, order
):
    """The decision on the last attempt."""
    _decide(attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order)
