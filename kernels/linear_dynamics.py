"""What the solves of linear and affine dynamics share: W, b and the next power of W, and where the
values stand.

    dy/ds = y W + s b,  from time t with step h:
    v_0 = y(t),  v_1 = h (v_0 W + t b),  v_2 = h (v_1 W + h b),  v_k = h v_{k-1} W for k > 2

are the scaled derivatives h^k y^(k)(t): time is one more entry of the state, with slope 1.
"""

import triton
import triton.language as tl


@triton.jit
def _load_square(ptr, i, stride_i, o, stride_o, size):
    mask = (i < size)[:, None] & (o < size)[None, :]
    return tl.load(ptr + i[:, None] * stride_i + o[None, :] * stride_o, mask=mask, other=0.0)


@triton.jit
def _load_slope(slope_ptr, mode, c, num_channels, HAS_SLOPE: tl.constexpr, ACC: tl.constexpr):
    if HAS_SLOPE:
        return tl.load(slope_ptr + mode * num_channels + c, mask=c < num_channels, other=0.0)
    else:
        return tl.zeros_like(c).to(ACC)


@triton.jit
def _value_offsets(
    first_time, row, mode, num_rows, num_modes, num_components, num_channels, BLOCK_T: tl.constexpr
):
    """Where a mode's values of rows (BLOCK_T, BLOCK_R) begin in (T, B, M, D, C)."""
    t = first_time + tl.arange(0, BLOCK_T)
    batch = num_rows.to(tl.int64) // num_components
    to = (t[:, None] * batch + (row // num_components)[None, :]) * num_modes + mode
    return (to * num_components + (row % num_components)[None, :]) * num_channels


@triton.jit
def _slope_share(k, begin, size):
    """How often h b enters v_k: t times for k = 1, h times for k = 2."""
    return tl.where(k == 1, begin, tl.where(k == 2, size, 0))


@triton.jit
def _next_power(
    v, weight, slope, k, begin, size,
    HAS_SLOPE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """v_k / h from v_{k-1}."""
    v = tl.dot(v, weight, input_precision=PRECISION, out_dtype=ACC)
    if HAS_SLOPE:
        v += _slope_share(k, begin, size).to(ACC) * slope[None, :]
    return v
