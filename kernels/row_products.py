"""Products of rows with a weight, and the weights' gradients: what graph layers do node by node.

    row_linear  out[r, j N + n] = Σ_k a[first_row + r, k] W[n, j K + k] + bias[n]
    row_outer   partial[s, n, k] = Σ_{r in share s} g[r, n] a[r, k]

`row_linear`: a program owns a run of rows and a tile of columns of one of the J blocks of W, which
lie beside each other in memory: [W_a h, W_b h] of a first edge linear are one launch. `row_outer`:
a program owns one tile of the gradient and one share of the rows, which it walks in order; shares
are summed in order afterwards. Their number is bounded by that of the multiprocessors.

Per row at K = N = 96: 0.8 kB for 18 kflop, 24 flops a byte. No atomics. 64-bit addresses.
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import dot, load_columns, product_tile, store_tile
from gfnode_fast.kernels.integers import BATCH_SIZES


@triton.jit(do_not_specialize=BATCH_SIZES)
def _row_linear_kernel(
    a_ptr,
    w_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    first_row,
    stride_n,
    stride_k,
    num_n,
    num_k,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    block = tl.program_id(1)
    n = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = row < num_rows
    a_ptr += first_row.to(tl.int64) * num_k
    w_ptr += block * num_k * stride_k
    out = product_tile(
        a_ptr, row * num_k, mask, w_ptr, n, stride_n, stride_k, num_n, num_k, BLOCK_C, MODE
    )
    if bias_ptr is not None:
        out += load_columns(bias_ptr, n, num_n)
    store_tile(out_ptr, (row * NUM_BLOCKS + block) * num_n, n, mask, num_n, out)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _row_outer_kernel(
    g_ptr,
    a_ptr,
    partial_ptr,
    num_rows,
    rows_per_share,
    first_g,
    first_a,
    stride_gr,
    stride_ar,
    stride_share,
    num_n,
    num_k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    MODE: tl.constexpr,
):
    share = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = share * rows_per_share
    last = tl.minimum(first + rows_per_share, num_rows)
    g_ptr += first_g.to(tl.int64) * stride_gr
    a_ptr += first_a.to(tl.int64) * stride_ar
    acc = tl.zeros((BLOCK_N, BLOCK_K), a_ptr.dtype.element_ty)
    for start in range(first, last, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R).to(tl.int64)
        mask_r = r < last
        mask_g = mask_r[None, :] & (n < num_n)[:, None]
        mask_a = mask_r[:, None] & (k < num_k)[None, :]
        g = tl.load(g_ptr + r[None, :] * stride_gr + n[:, None], mask=mask_g, other=0.0)
        a = tl.load(a_ptr + r[:, None] * stride_ar + k[None, :], mask=mask_a, other=0.0)
        acc += dot(g, a, MODE)
    to = partial_ptr + share * stride_share + n[:, None] * num_k + k[None, :]
    tl.store(to, acc, mask=(n < num_n)[:, None] & (k < num_k)[None, :])
