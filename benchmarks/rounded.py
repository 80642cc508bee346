"""Matrix products with rounded operands: what tensor cores do in tf32 and bf16, on any device.

The operands are rounded to the nearest value of the mode, products and sums keep the tensors' own
dtype. Not imitated: the order of the sums, and the approximate SiLU of the reduced modes on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gfnode_fast.ops import graph_layers_torch

REDUCED = ("tf32", "bf16")


def rounded(x: Tensor, precision: str) -> Tensor:
    """To the nearest value of the mode, in the dtype of x."""
    if precision == "bf16":
        return x.bfloat16().to(x.dtype)
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.dtype)


class RoundedLinear(torch.autograd.Function):
    """A linear map whose products, backward too, see rounded operands."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, precision: str) -> Tensor:
        a, weight = rounded(a, precision), rounded(weight, precision)
        ctx.save_for_backward(a, weight)
        ctx.precision = precision
        return a @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, weight = ctx.saved_tensors
        grad = rounded(grad, ctx.precision)
        return grad @ weight, grad.flatten(0, -2).T @ a.flatten(0, -2), None


class _Functional:
    """`torch.nn.functional` with a rounded `linear`."""

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def linear(self, a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Scalars of an MLP, and edge features (E, D), are sums, not products of matrices.
        if weight.shape[0] == 1 or a.dim() == 2:
            return F.linear(a, weight, bias)
        out: Tensor = RoundedLinear.apply(a, weight, self._precision)
        return out if bias is None else out + bias

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)


@contextmanager
def rounded_graph_layers(precision: str) -> Iterator[None]:
    """Graph layers with backend="torch" round the operands that the Triton kernels round.

    Raises:
        ValueError: a precision that is not one of REDUCED.
    """
    if precision not in REDUCED:
        raise ValueError(
            f"rounded_graph_layers: `precision` must be one of {', '.join(REDUCED)}, got "
            f"{precision!r}; correct the name"
        )
    exact = graph_layers_torch.F
    graph_layers_torch.F = _Functional(precision)
    try:
        yield
    finally:
        graph_layers_torch.F = exact
