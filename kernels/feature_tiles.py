"""Rows of features in memory, worked on in column tiles: products, activations, sums.

A program keeps what lies between two products of a row of MLPs in memory of its own, a few tens of
kilobytes that stay in the caches, and takes each product tile by tile in a loop of its own. So no
width needs to be a power of 2 (96 is three tiles of 32), none is limited, and registers hold one
tile whatever the width. Held in registers as a tuple of tiles instead, 96 columns spill on every
target, and Triton repeats products in several warps when one follows the other.

A barrier must stand between what some threads write and others read: after each phase that fills
such memory.

Products take MODE: "tf32x3" (three tf32 products, fp32-faithful), "ieee" (float64), "tf32" and
"bf16" (operands rounded to nearest, sums in fp32). "tf32 emulated" and "bf16 emulated" round the
same way in integer arithmetic, for Triton's interpreter, which knows neither. The reduced modes
take SiLU with one special-function operation, tanh.approx (error 2^-11).
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(ptr, at, c, mask_r, num_c):
    """Columns c of rows that begin `at` elements after `ptr`."""
    mask = mask_r[:, None] & (c < num_c)[None, :]
    return tl.load(ptr + at[:, None] + c[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, at, c, mask_r, num_c, value):
    """What `load_tile` reads."""
    mask = mask_r[:, None] & (c < num_c)[None, :]
    tl.store(ptr + at[:, None] + c[None, :], value, mask=mask)


@triton.jit
def load_columns(ptr, c, num_c):
    """Columns c of a vector, as a row."""
    return tl.load(ptr + c, mask=c < num_c, other=0.0)[None, :]


@triton.jit
def add_column_sums(ptr, c, num_c, tile):
    """Add to a vector that is this program's own."""
    sums = tl.sum(tile, axis=0)
    tl.store(ptr + c, tl.load(ptr + c, mask=c < num_c, other=0.0) + sums, mask=c < num_c)


@triton.jit
def _round_tf32(x, MODE: tl.constexpr):
    if MODE == "tf32":
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    bits = x.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def _round_bf16(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, MODE: tl.constexpr):
    """A product in the mode asked for."""
    if MODE == "bf16":
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif MODE == "bf16 emulated":
        return tl.dot(_round_bf16(a), _round_bf16(b), input_precision="ieee")
    elif MODE == "tf32" or MODE == "tf32 emulated":
        return tl.dot(_round_tf32(a, MODE), _round_tf32(b, MODE), input_precision="tf32")
    else:
        return tl.dot(a, b, input_precision=MODE, out_dtype=a.dtype)


@triton.jit
def split_tile(x, part, low, MODE: tl.constexpr):
    """What tf32 holds of x, and in the columns whose part is `low` what it leaves.

    Where [x, x, x] has parts 0, 1, 2, with `low` 1 in one operand and 2 in the other, their product
    is fp32-faithful in one product of tf32, without its rounding of fp32 in any mode.
    """
    if MODE == "ieee":
        return tl.where(part == 0, x, 0.0).to(x.dtype)
    else:
        high = _round_tf32(x, "tf32 emulated")
        return tl.where(part == low, x - high, tl.where(part < 3, high, 0.0))


@triton.jit
def dot_of_parts(a, b, MODE: tl.constexpr):
    """The product of two tiles from `split_tile`."""
    precision: tl.constexpr = "ieee" if MODE == "ieee" else "tf32"
    return tl.dot(a, b, input_precision=precision, out_dtype=a.dtype)


@triton.jit
def product_tile(
    a_ptr,
    at,
    mask_r,
    w_ptr,
    n,
    stride_n,
    stride_k,
    num_n,
    num_k,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Σ_k a[r, k] W[n, k] for the columns n; rows r begin `at`, W has any strides."""
    acc = tl.zeros((at.shape[0], n.shape[0]), a_ptr.dtype.element_ty)
    for start in range(0, num_k, BLOCK_C):
        k = start + tl.arange(0, BLOCK_C)
        a = load_tile(a_ptr, at, k, mask_r, num_k)
        mask = (k < num_k)[:, None] & (n < num_n)[None, :]
        w_at = n[None, :] * stride_n + k[:, None] * stride_k
        acc += dot(a, tl.load(w_ptr + w_at, mask=mask, other=0.0), MODE)
    return acc


@triton.jit
def linear_tile(
    a_ptr, at, mask_r, w_ptr, stride_n, bias_ptr, n, num_n, num_k, BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """`product_tile` of W with dense rows, and the bias."""
    z = product_tile(a_ptr, at, mask_r, w_ptr, n, stride_n, 1, num_n, num_k, BLOCK_C, MODE)
    return z + load_columns(bias_ptr, n, num_n)


@triton.jit
def add_outer(
    sums_ptr,
    g_ptr,
    g_at,
    num_n,
    a_ptr,
    a_at,
    num_k,
    mask_r,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Add Σ_r g[r, n] a[r, k] to a dense (num_n, num_k) matrix that is this program's own."""
    for n_start in range(0, num_n, BLOCK_C):
        n = n_start + tl.arange(0, BLOCK_C)
        mask = (n < num_n)[:, None] & mask_r[None, :]
        g = tl.load(g_ptr + g_at[None, :] + n[:, None], mask=mask, other=0.0)
        for k_start in range(0, num_k, BLOCK_C):
            k = k_start + tl.arange(0, BLOCK_C)
            a = load_tile(a_ptr, a_at, k, mask_r, num_k)
            to = sums_ptr + n[:, None] * num_k + k[None, :]
            inside = (n < num_n)[:, None] & (k < num_k)[None, :]
            tl.store(to, tl.load(to, mask=inside, other=0.0) + dot(g, a, MODE), mask=inside)


@triton.jit
def _sigmoid(x, MODE: tl.constexpr):
    if MODE == "tf32" or MODE == "bf16":
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1
        )
        return 0.5 * t + 0.5
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _tanh(x, MODE: tl.constexpr):
    if MODE == "tf32" or MODE == "bf16":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    near = 0.02 if x.dtype == tl.float64 else 0.2
    square = x * x
    small = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    decay = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < near, small, tl.where(x < 0, -large, large))


@triton.jit
def activate(z, SILU: tl.constexpr, MODE: tl.constexpr):
    """SiLU or tanh."""
    if SILU:
        return z * _sigmoid(z, MODE)
    else:
        return _tanh(z, MODE)


@triton.jit
def activate_with_slope(z, SILU: tl.constexpr, MODE: tl.constexpr):
    """act(z) and act'(z)."""
    if SILU:
        s = _sigmoid(z, MODE)
        return z * s, s * (1.0 + z * (1.0 - s))
    else:
        t = _tanh(z, MODE)
        return t, 1.0 - t * t
