"""Dense output of accepted steps at each row's own times, for any explicit method.

    y(t + x h) = Σ_k p_k(x) v_k,   y(t + h) = Σ_k e_k v_k,   error = Σ_k r_k v_k,   k <= K

with p_k quartic. v_0 is the step's start; v_k is h times stage k - 1, or, for linear dynamics,
where stages are polynomials in hW, the k-th scaled derivative. Row k of the table holds p_k's five
coefficients, e_k, r_k and 0, in float64.
"""

import triton
import triton.language as tl

TABLE = 8
TABLE_ = tl.constexpr(TABLE)


@triton.jit
def _abscissae(times_ptr, row, mask_r, num_components, first_time, num_times, begin, end, BLOCK_T):
    """x (BLOCK_T, BLOCK_R) in float64, 0 outside the step, and the mask of the times inside."""
    t = first_time + tl.arange(0, BLOCK_T)
    at = (row // num_components)[None, :] * num_times + t[:, None]
    mask = (t < num_times)[:, None] & mask_r[None, :]
    s = tl.load(times_ptr + at, mask=mask, other=-1.0)
    inside = (s > begin) & (s <= end)
    return tl.where(inside, (s - begin) / (end - begin), 0.0), inside, mask


@triton.jit
def _share(table_ptr, k, x, inside):
    """p_k(x), 0 outside the step."""
    row = table_ptr + k * TABLE_
    p = tl.load(row + 3) + x * tl.load(row + 4)
    p = tl.load(row + 1) + x * (tl.load(row + 2) + x * p)
    return tl.where(inside, tl.load(row) + x * p, 0.0)


@triton.jit
def _share_slope(table_ptr, k, x, inside):
    """p_k'(x), 0 outside the step."""
    row = table_ptr + k * TABLE_
    p = 3 * tl.load(row + 3) + x * 4 * tl.load(row + 4)
    return tl.where(inside, tl.load(row + 1) + x * (2 * tl.load(row + 2) + x * p), 0.0)


@triton.jit
def _of_end(table_ptr, k, ACC: tl.constexpr):
    """e_k."""
    return tl.load(table_ptr + k * TABLE_ + 5).to(ACC)


@triton.jit
def _of_error(table_ptr, k, ACC: tl.constexpr):
    """r_k."""
    return tl.load(table_ptr + k * TABLE_ + 6).to(ACC)
