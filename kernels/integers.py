"""Integers in kernels."""

import triton
import triton.language as tl


@triton.jit
def as_int64(n):
    """A size in 64 bits; Triton hands a size of 1 over as a constant, which has no `.to`."""
    return tl.full((), 0, tl.int64) + n
