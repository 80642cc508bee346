"""The published step control on the device: decisions that every program of a launch takes alike.

The error norm is one sum over the whole batch, so a step needs a barrier over the grid. A barrier
inside one launch would have all programs resident and waiting on atomics; the end of a launch is a
barrier too, and is captured in a CUDA graph as it is. So: one launch an attempt. Its programs each
begin by summing the partial norms of the attempt before, in one order, and decide alike whether it
is accepted; then they step from the state kept for that case. Program 0 writes the decision down.
The number of launches is fixed: those after the end find the solve done and return.

Partial norms are float64, (attempts + 3, programs): three rows of the initial step, then one an
attempt. No atomics; every sum has a fixed order, the same in all programs.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.integers import BATCH_SIZES

# A record: time, step size, accepted steps, status, whether attempt 0 was accepted, attempts made.
RECORD = 8
RUNNING, DONE, NOT_FINITE, UNDERFLOW = 0, 1, 2, 3

RECORD_ = tl.constexpr(RECORD)
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
def _trial_size(partial_ptr, num_partials, num_entries):
    """h0, and the norms d0 of y and d1 of its slope, in units of the tolerance."""
    d0 = _rms(partial_ptr, num_partials, num_entries)
    d1 = _rms(partial_ptr + num_partials, num_partials, num_entries)
    h0 = tl.where((d0 < TINY_NORM) | (d1 < TINY_NORM), TINY_STEP, 0.01 * d0 / d1)
    return h0, d0, d1


@triton.jit
def _first_step(partial_ptr, num_partials, num_entries, order):
    """Hairer, Norsett, Wanner I, II.4, from the norms of y, f0 and (f1 - f0) / h0."""
    h0, d0, d1 = _trial_size(partial_ptr, num_partials, num_entries)
    d2 = _rms(partial_ptr + 2 * num_partials, num_partials, num_entries)
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
    """What attempt number `attempt` has to do; program 0 of the launch writes it down.

    Returns time, size, number of accepted steps, status, whether the attempt before was accepted,
    and that one's time and size.
    """
    writes = (tl.program_id(0) == 0) & (tl.program_id(1) == 0)
    last = tl.load(last_ptr)
    time = tl.full((), 0.0, tl.float64)
    before_time = time
    before_size = time
    accepted = tl.full((), 0, tl.int32)
    made = accepted
    status = tl.full((), RUNNING_, tl.int32)
    first_accepted = tl.full((), 0, tl.int32)
    just_accepted = first_accepted
    if attempt == 0:
        size, finite = _first_step(partial_ptr, num_partials, num_entries, order)
        if not finite:
            status = tl.full((), NOT_FINITE_, tl.int32)
    else:
        before = record_ptr + (attempt - 1) * RECORD_
        before_time = tl.load(before)
        before_size = tl.load(before + 1)
        time = before_time
        size = before_size
        accepted = tl.load(before + 2).to(tl.int32)
        status = tl.load(before + 3).to(tl.int32)
        first_accepted = tl.load(before + 4).to(tl.int32)
        made = tl.load(before + 5).to(tl.int32)
        if status == RUNNING_:
            made += 1
            # the first three rows of partial sums are those of the initial step
            ratio = _rms(partial_ptr + (attempt + 2) * num_partials, num_partials, num_entries)
            if ratio < float("inf"):
                if ratio <= 1:
                    if writes:
                        tl.store(steps_ptr + 2 * accepted, time)
                        tl.store(steps_ptr + 2 * accepted + 1, size)
                    just_accepted = tl.full((), 1, tl.int32)
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
        tl.store(to + 5, made.to(tl.float64))
    return time, size, accepted, status, just_accepted, before_time, before_size


@triton.jit(do_not_specialize=BATCH_SIZES)
def _joint_decide_kernel(
    last_ptr, record_ptr, steps_ptr, partial_ptr, attempt, num_partials, num_entries, order
):
    """The decision on the last attempt."""
    _decide(attempt, record_ptr, steps_ptr, partial_ptr, last_ptr, num_partials, num_entries, order)


@triton.jit
def _tolerance(settings_ptr, size_of_state, mask):
    """atol + rtol |y| in float64, 1 outside the mask; settings are rtol and atol."""
    rtol = tl.load(settings_ptr)
    tolerance = tl.load(settings_ptr + 1) + rtol * size_of_state.to(tl.float64)
    return tl.where(mask, tolerance, 1.0)


@triton.jit
def _sum_of_squares(x):
    x = x.to(tl.float64)
    return tl.sum(tl.sum(x * x, axis=1), axis=0)


@triton.jit
def _mark_bad_rows(bad_ptr, row, mask_r, y):
    """Stores 1 for each row of y that is not finite; NaN and infinities fail both comparisons."""
    finite = (y > -float("inf")) & (y < float("inf"))
    bad = tl.max(tl.where(finite, 0, 1), axis=1)
    tl.store(bad_ptr + row, bad, mask=mask_r & (bad > 0))
