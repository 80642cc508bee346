"""Autograd functions that are differentiated once, and refuse more however it is asked for.

`torch.autograd.function.once_differentiable` refuses only where autograd is sent to every leaf and
the loss is not linear in the result: `torch.autograd.grad(first, inputs)` does not reach its error
and leaves out, unseen, what went through the function.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

Backward = Callable[..., Any]


class _Refused(torch.autograd.Function):
    """Gradients as they are, on a path to everything that they depend on, which raises."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "propagate: `backend` must be 'reference' for a second derivative, got another; its "
            "solves and inverse transform are differentiated once: use backend='reference'"
        )


def once_differentiable(backward: Backward) -> Backward:
    """Decorate the backward of an autograd function whose gradients have none of their own.

    Forward must save every input that may require a gradient, itself and not a copy: through
    `ctx.saved_tensors` the second derivative that is to be refused is found.

    Raises:
        RuntimeError: a second derivative, in the pass that would compute it.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return found
        given = [g for g in found if isinstance(g, Tensor)]
        sources = (*grads, *ctx.saved_tensors)
        refused = iter(_Refused.apply(len(given), *given, *sources))  # type: ignore[no-untyped-call]
        return tuple(next(refused) if isinstance(g, Tensor) else g for g in found)

    return once


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise where forward-mode differentiation would lose what it has come with: operators that are
    registered with a backward alone drop it unseen.

    Raises:
        RuntimeError: a tensor that carries a tangent, of torch.func.jvp or a dual level.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{op}: `inputs` must be plain tensors, got one with a tangent of forward-mode "
            "differentiation; use backward"
        )
