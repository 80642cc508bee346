"""The per-mode right-hand side dy/ds of rows y (R, M, C): M modes of C channels.

    no interaction  dy_m = y_m W_m + b_m
    attention       u_m = y_m P + q,  A = softmax_n(u_m · y_n),  dy_m = (Σ_n A_mn y_n) W_m + b_m
    concat          h = relu(Σ_m y_m V_m + c),  dy_m = h W_m + b_m

These are the published right-hand sides after their constant products have been taken together
(`gfnode_fast.ops.mode_rhs_folded`): queries and keys into P; values, output and post-attention
projections into W_m; the time embedding, equal for all modes, cancels in the softmax and is
otherwise a bias. The state stays C wide where the published one is C + Kt.

A program owns a run of rows (BLOCK_R of them), in `_mode_linear` of one mode, and all channels;
attention walks the modes with a running maximum, as flash attention walks blocks of keys, so that
M needs no power of 2. Backward of attention takes u and A again and adds into its own rows of
grad_y.
Gradients of weights are sums over all rows of products of state-sized tensors, which backward
leaves as a and grad_u (attention) or grad_h (concat) for batched matrix products outside.

A row, fp32, M = 2, C = 64: no interaction moves 1 kB for 16 kflop, attention 1 kB for 34 kflop
(the published order of products at width 96: 210), concat with 128 hidden 1 kB for 66 kflop.
16 flops a byte is what fp32 units sustain at memory speed, so products go to the tensor cores as
three tf32 products each (fp32-faithful); `input_precision` is always passed.

No atomics; every sum has a fixed order. Addresses are 64-bit. C = 2 is padded to the 16 that a
product needs. Limits: fp32 and fp64, C <= 64, hidden width <= 128, the last dimension of every
tensor but the weights dense; attention is meant for M <= 16, since its time grows with M².
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.integers import BATCH_SIZES


@triton.jit
def _load_rows(ptr, row, stride_r, channel, mask):
    return tl.load(ptr + row[:, None] * stride_r + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _load_matrix(ptr, i, stride_i, num_i, o, stride_o, num_o):
    mask = (i < num_i)[:, None] & (o < num_o)[None, :]
    return tl.load(ptr + i[:, None] * stride_i + o[None, :] * stride_o, mask=mask, other=0.0)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mode_linear_kernel(
    y_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_yr,
    stride_ym,
    stride_wm,
    stride_wi,
    stride_wo,
    num_rows,
    num_modes,
    num_in,
    num_out,
    HAS_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m = tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BLOCK_I)
    o = tl.arange(0, BLOCK_O)
    mask_r = row < num_rows
    y = _load_rows(
        y_ptr + m * stride_ym, row, stride_yr, i, mask_r[:, None] & (i < num_in)[None, :]
    )
    w = _load_matrix(weight_ptr + m * stride_wm, i, stride_wi, num_in, o, stride_wo, num_out)
    out = tl.dot(y, w, input_precision=PRECISION, out_dtype=y.dtype)
    if HAS_BIAS:
        out += tl.load(bias_ptr + m * num_out + o, mask=o < num_out, other=0.0)[None, :]
    at = (row[:, None] * num_modes + m) * num_out + o[None, :]
    tl.store(out_ptr + at, out, mask=mask_r[:, None] & (o < num_out)[None, :])


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mode_mlp_kernel(
    y_ptr,
    weight_in_ptr,
    bias_in_ptr,
    hidden_ptr,
    weight_out_ptr,
    bias_out_ptr,
    grad_hidden_ptr,
    out_ptr,
    stride_yr,
    stride_ym,
    stride_im,
    stride_ii,
    stride_io,
    stride_om,
    stride_oi,
    stride_oo,
    num_rows,
    num_modes,
    num_channels,
    num_hidden,
    BACKWARD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Forward, or its transpose: through all modes into the hidden layer and out of it again.

    Forward stores h; backward reads it for relu's derivative and stores its gradient.
    """
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    h = tl.arange(0, BLOCK_H)
    stride_ym = first_row * 0 + stride_ym  # 64-bit, like the addresses it makes
    mask_r = row < num_rows
    mask_y = mask_r[:, None] & (c < num_channels)[None, :]
    mask_h = mask_r[:, None] & (h < num_hidden)[None, :]
    hidden = tl.zeros((BLOCK_R, BLOCK_H), y_ptr.dtype.element_ty)
    for m in range(0, num_modes):
        y = _load_rows(y_ptr + m * stride_ym, row, stride_yr, c, mask_y)
        w = _load_matrix(
            weight_in_ptr + m * stride_im, c, stride_ii, num_channels, h, stride_io, num_hidden
        )
        hidden += tl.dot(y, w, input_precision=PRECISION, out_dtype=y.dtype)
    at = row[:, None] * num_hidden + h[None, :]
    if BACKWARD:
        hidden = tl.where(tl.load(hidden_ptr + at, mask=mask_h, other=0.0) > 0, hidden, 0.0)
        tl.store(grad_hidden_ptr + at, hidden, mask=mask_h)
    else:
        hidden += tl.load(bias_in_ptr + h, mask=h < num_hidden, other=0.0)[None, :]
        hidden = tl.maximum(hidden, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(hidden_ptr + at, hidden, mask=mask_h)
    for m in range(0, num_modes):
        w = _load_matrix(
            weight_out_ptr + m * stride_om, h, stride_oi, num_hidden, c, stride_oo, num_channels
        )
        out = tl.dot(hidden, w, input_precision=PRECISION, out_dtype=hidden.dtype)
        if not BACKWARD:
            bias = tl.load(bias_out_ptr + m * num_channels + c, mask=c < num_channels, other=0.0)
            out += bias[None, :]
        to = (row[:, None] * num_modes + m) * num_channels + c[None, :]
        tl.store(out_ptr + to, out, mask=mask_y)


@triton.jit
def _query(y_ptr, mask_y, key_ptr, stride_ki, stride_ko, query_bias, c, num_channels, PRECISION):
    """u = y P + q of one mode."""
    y = tl.load(y_ptr, mask=mask_y, other=0.0)
    key = _load_matrix(key_ptr, c, stride_ki, num_channels, c, stride_ko, num_channels)
    return tl.dot(y, key, input_precision=PRECISION, out_dtype=y.dtype) + query_bias[None, :]


@triton.jit
def _attend(u, y_ptr, stride_ym, mask_y, num_modes):
    """Σ_n softmax_n(u · y_n) y_n, and the softmax's logarithmic normaliser, a mode n at a time.

    `y_ptr` points to the tile of mode 0, `stride_ym` leads to the next mode's.
    """
    largest = tl.sum(u * tl.load(y_ptr, mask=mask_y, other=0.0), axis=1)
    total = tl.zeros_like(largest)
    acc = tl.zeros_like(u)
    for n in range(0, num_modes):
        y = tl.load(y_ptr + n * stride_ym, mask=mask_y, other=0.0)
        score = tl.sum(u * y, axis=1)
        larger = tl.maximum(largest, score)
        shrink = tl.exp(largest - larger)
        weight = tl.exp(score - larger)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + weight[:, None] * y
        largest = larger
    return acc / total[:, None], largest + tl.log(total)


@triton.jit
def _pull_attention(
    grad_a, u, a, normaliser, y_ptr, stride_ym, grad_y_ptr, stride_gm, mask_y, m, num_modes
):
    """The gradient of u_m; adds those of all y_n to `grad_y_ptr`, or stores them for m = 0."""
    along = tl.sum(grad_a * a, axis=1)
    grad_u = tl.zeros_like(u)
    for n in range(0, num_modes):
        y = tl.load(y_ptr + n * stride_ym, mask=mask_y, other=0.0)
        weight = tl.exp(tl.sum(u * y, axis=1) - normaliser)
        grad_score = weight * (tl.sum(grad_a * y, axis=1) - along)
        grad_u += grad_score[:, None] * y
        grad_y = weight[:, None] * grad_a + grad_score[:, None] * u
        to = grad_y_ptr + n * stride_gm
        if m > 0:
            grad_y += tl.load(to, mask=mask_y, other=0.0)
        tl.store(to, grad_y, mask=mask_y)
    return grad_u


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mode_attention_fwd_kernel(
    y_ptr,
    key_ptr,
    query_bias_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    stride_yr,
    stride_ym,
    stride_ki,
    stride_ko,
    stride_wm,
    stride_wi,
    stride_wo,
    num_rows,
    num_modes,
    num_channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    mask_c = c < num_channels
    mask_y = (row < num_rows)[:, None] & mask_c[None, :]
    y_ptr += row[:, None] * stride_yr + c[None, :]
    stride_ym = first_row * 0 + stride_ym  # 64-bit, like the addresses it makes
    query_bias = tl.load(query_bias_ptr + c, mask=mask_c, other=0.0)
    for m in range(0, num_modes):
        u = _query(
            y_ptr + m * stride_ym, mask_y, key_ptr, stride_ki, stride_ko, query_bias, c,
            num_channels, PRECISION,
        )  # fmt: skip
        a, _ = _attend(u, y_ptr, stride_ym, mask_y, num_modes)
        w = _load_matrix(
            weight_ptr + m * stride_wm, c, stride_wi, num_channels, c, stride_wo, num_channels
        )
        out = tl.dot(a, w, input_precision=PRECISION, out_dtype=a.dtype)
        out += tl.load(bias_ptr + m * num_channels + c, mask=mask_c, other=0.0)[None, :]
        at = (row[:, None] * num_modes + m) * num_channels + c[None, :]
        tl.store(out_ptr + at, out, mask=mask_y)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mode_attention_bwd_kernel(
    grad_ptr,
    y_ptr,
    key_ptr,
    query_bias_ptr,
    weight_ptr,
    mixed_ptr,
    grad_u_ptr,
    grad_y_ptr,
    stride_gr,
    stride_gm,
    stride_yr,
    stride_ym,
    stride_ki,
    stride_ko,
    stride_wm,
    stride_wi,
    stride_wo,
    num_rows,
    num_modes,
    num_channels,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores a_m = Σ_n A_mn y_n, the gradient of u_m and that of y, for `grad` of dy."""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_R
    row = first_row + tl.arange(0, BLOCK_R)
    c = tl.arange(0, BLOCK_C)
    mask_c = c < num_channels
    mask_y = (row < num_rows)[:, None] & mask_c[None, :]
    y_ptr += row[:, None] * stride_yr + c[None, :]
    grad_ptr += row[:, None] * stride_gr + c[None, :]
    stride_ym = first_row * 0 + stride_ym  # 64-bit, like the addresses it makes
    stride_gm = first_row * 0 + stride_gm
    query_bias = tl.load(query_bias_ptr + c, mask=mask_c, other=0.0)
    at = row[:, None] * num_modes * num_channels + c[None, :]
    for m in range(0, num_modes):
        u = _query(
            y_ptr + m * stride_ym, mask_y, key_ptr, stride_ki, stride_ko, query_bias, c,
            num_channels, PRECISION,
        )  # fmt: skip
        a, normaliser = _attend(u, y_ptr, stride_ym, mask_y, num_modes)
        grad = tl.load(grad_ptr + m * stride_gm, mask=mask_y, other=0.0)
        w = _load_matrix(
            weight_ptr + m * stride_wm, c, stride_wo, num_channels, c, stride_wi, num_channels
        )
        grad_a = tl.dot(grad, w, input_precision=PRECISION, out_dtype=grad.dtype)
        grad_u = _pull_attention(
            grad_a, u, a, normaliser, y_ptr, stride_ym, grad_y_ptr + at, num_channels, mask_y, m,
            num_modes,
        )  # fmt: skip
        tl.store(mixed_ptr + at + m * num_channels, a, mask=mask_y)
        tl.store(grad_u_ptr + at + m * num_channels, grad_u, mask=mask_y)
        tl.debug_barrier()  # threads may read what others have added
    for m in range(0, num_modes):
        grad_u = tl.load(grad_u_ptr + at + m * num_channels, mask=mask_y, other=0.0)
        key = _load_matrix(key_ptr, c, stride_ko, num_channels, c, stride_ki, num_channels)
        to = grad_y_ptr + at + m * num_channels
        grad_y = tl.load(to, mask=mask_y, other=0.0)
        grad_y += tl.dot(grad_u, key, input_precision=PRECISION, out_dtype=grad_u.dtype)
        tl.store(to, grad_y, mask=mask_y)
