"""Tests of the emulated GPU itself, run by tests/test_compiled_kernels.py with `-p on_ptx`."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from ptx_state import Fault


@triton.jit
def _rotate_kernel(x_ptr, out_ptr, n, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, 2.0 * tl.load(x_ptr + i, mask=i < n), mask=i < n)
    if BARRIER:
        tl.debug_barrier()
    turned = tl.load(out_ptr + (i + 77) % n, mask=i < n)
    tl.debug_barrier()
    tl.store(out_ptr + i, turned, mask=i < n)


@triton.jit
def _claim_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0))


@triton.jit
def _product_kernel(a_ptr, b_ptr, out_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + i * BLOCK + j), tl.load(b_ptr + i * BLOCK + j)
    product = tl.dot(a, b, input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty)
    tl.store(out_ptr + i * BLOCK + j, product)


def test_a_missing_barrier_is_a_fault() -> None:
    x, out = torch.randn(200), torch.full((200,), float("nan"))
    _rotate_kernel[(1,)](x, out, 200, BARRIER=True, BLOCK=256)
    assert torch.equal(out, 2 * x.roll(-77))
    with pytest.raises(Fault, match="order of warps"):
        _rotate_kernel[(1,)](x, out, 200, BARRIER=False, BLOCK=256)


def test_programs_that_share_memory_are_a_fault() -> None:
    with pytest.raises(Fault, match="order of warps or of programs"):
        _claim_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


def test_a_byte_outside_is_a_fault() -> None:
    x, out = torch.randn(8), torch.zeros(8)
    with pytest.raises(Fault, match="outside global memory"):
        _rotate_kernel[(1,)](x, out, 9, BARRIER=True, BLOCK=16)


@pytest.mark.parametrize(
    ("dtype", "precision", "error"),
    [
        (torch.float64, "ieee", 1e-15),
        (torch.float32, "ieee", 1e-6),
        (torch.float32, "tf32x3", 1e-6),
        (torch.float32, "tf32", 1e-3),
        (torch.bfloat16, "tf32", 1e-6),  # exact products of what bf16 holds
    ],
)
def test_products(dtype: torch.dtype, precision: str, error: float) -> None:
    a, b = torch.randn(2, 32, 32).to(dtype)
    out = torch.empty(32, 32, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    _product_kernel[(1,)](a, b, out, PRECISION=precision, BLOCK=32)
    exact = a.double() @ b.double()
    assert (out.double() - exact).norm() / exact.norm() < error
    assert precision != "tf32" or dtype != torch.float32 or not torch.equal(out, a @ b)
