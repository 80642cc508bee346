"""What every operation's tests share: comparison with a tolerance, gradients, operators' own
checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

BACKENDS = ("torch", "triton")
# Where tests of kernels make their tensors, and their mark: under GFNODE_REQUIRE_GPU=1 (conftest)
# the tests that otherwise run through the interpreter run on the GPU, and count as its tests.
REQUIRE_GPU = os.environ.get("GFNODE_REQUIRE_GPU", "0") == "1"
DEVICE = torch.device("cuda" if REQUIRE_GPU else "cpu")
OF_KERNELS = [pytest.mark.gpu] if REQUIRE_GPU else []
OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected magnitude, in float64; NaN counts as infinite."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    if expected.numel() == 0:
        return 0.0
    expected = expected.to(got.device)
    difference = (got.double() - expected.double()).abs().max()
    return (
        (difference / expected.double().abs().max().clamp_min(1e-300))
        .nan_to_num(nan=float("inf"))
        .item()
    )


def gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 7
) -> list[Tensor]:
    """Gradients of all inputs for one random cotangent."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    return list(torch.autograd.grad(out, leaves, cotangent, materialize_grads=True))


def opcheck(operator: Any, *args: Any) -> None:
    torch.library.opcheck(operator, args, test_utils=OPCHECKS)


def compiled_equals_eager(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    tolerance: float,
    compiler: str = "aot_eager",
) -> None:
    """Values and gradients under torch.compile(fullgraph=True) against eager.

    "inductor" as the compiler costs a call of g++ per graph; "aot_eager" traces forward and
    backward as it does and leaves out code generation, which opaque operators do not take part in.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert relative_error(compiled(*inputs), function(*inputs)) <= tolerance
    pairs = zip(gradients(compiled, inputs), gradients(function, inputs), strict=True)
    for got, expected in pairs:
        assert relative_error(got, expected) <= tolerance


def strided(x: Tensor) -> Tensor:
    """The same values with every dimension strided: a slice of a permuted buffer."""
    elsewhere = float("nan") if x.is_floating_point() else -1
    buffer = x.new_full([2 * n + 1 for n in reversed(x.shape)], elsewhere)
    view = buffer[tuple(slice(1, 2 * n + 1, 2) for n in reversed(x.shape))]
    view = view.permute(*reversed(range(x.dim())))
    view.copy_(x)
    return view
