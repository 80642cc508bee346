"""The compiled inverse graph Fourier transform of a solve, with what the model does next.

    out[t, b, n] = [signal[b, n] + act(Σ_m U[b, n, m] values[b, t, :, m]), beside[t, b]]

for molecules of one size, or of different size one after the other, with offsets `ptr`.

Registered as `gfnode_fast::synthesis`, float32 on the CPU. Ownership and cost:
csrc/cpu/synthesis.h. Its gradient forms the activation's argument again; nothing of the output's
size is kept. Once differentiable; a second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gfnode_fast._extension import REBUILD, why_no_extension
from gfnode_fast._once import refuse_tangents
from gfnode_fast.ops.graph_layers_cpp import ACTIVATIONS

_registered = False


def why_not_compiled() -> str | None:
    """None when the compiled kernel is there, else what is missing."""
    global _registered
    if problem := why_no_extension():
        return problem
    if not hasattr(torch.ops.gfnode_fast, "synthesis"):
        return f"the extension was built without it; {REBUILD}"
    if not _registered:
        _register()
        _registered = True
    return None


why_not_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see graph_layers_cpp


def serves(
    values: Tensor,
    eigvecs: Tensor,
    signal: Tensor,
    activation: Callable[[Tensor], Tensor],
    beside: Tensor | None = None,
) -> bool:
    """Whether `synthesise_solved` has these arguments."""
    return (
        type(activation) in ACTIVATIONS
        and all(t.dtype == torch.float32 and t.is_cpu for t in (values, eigvecs, signal))
        and not eigvecs.requires_grad
        and (beside is None or (beside.dtype == torch.float32 and not beside.requires_grad))
        and why_not_compiled() is None
    )


def synthesise_solved(
    values: Tensor,
    eigvecs: Tensor,
    signal: Tensor,
    activation: Callable[[Tensor], Tensor],
    beside: Tensor | None = None,
    ptr: Tensor | None = None,
) -> Tensor:
    """values (B, T, D, M, C), eigvecs (B, N, N), signal (B, N, D, C) → (T, B, N, D, C); with
    `beside` (T, B, W), of D = 1, → (T, B, N, 1, C + W); with `ptr` (B+1,) as in `propagate`,
    eigvecs (ΣN²,), signal (ΣN, D, C) → (T, ΣN, D, C).
    """
    if beside is None:
        beside = values.new_empty(values.shape[1], values.shape[0], 0)
    refuse_tangents("propagate", values, eigvecs, signal, beside)
    out: Tensor = torch.ops.gfnode_fast.synthesis(
        values.contiguous(),
        eigvecs.contiguous(),
        signal.flatten(-2).contiguous(),
        beside.contiguous(),
        ACTIVATIONS[type(activation)],  # type: ignore[index]
        None if ptr is None else ptr.contiguous(),
    )
    shaped: Tensor = out.unflatten(-1, (signal.shape[-2], -1))
    return shaped


def _register() -> None:
    op = "gfnode_fast::synthesis"
    torch.library.register_fake(op, _fake)
    torch.library.register_fake(f"{op}_backward", _backward_fake)
    torch.library.register_autograd(op, _backward, setup_context=_context)
    torch.library.register_autograd(f"{op}_backward", _no_second_derivative)


def _fake(
    values: Tensor,
    eigvecs: Tensor,
    signal: Tensor,
    beside: Tensor,
    activation: int,
    ptr: Tensor | None = None,
) -> Tensor:
    width = signal.shape[-1] + beside.shape[2]
    return values.new_empty(values.shape[1], *signal.shape[:-1], width)


def _backward_fake(
    grad: Tensor,
    values: Tensor,
    eigvecs: Tensor,
    signal: Tensor,
    beside: Tensor,
    activation: int,
    ptr: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), values.new_empty(signal.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ptr = inputs
    ctx.save_for_backward(*tensors, ptr)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, ptr = ctx.saved_tensors
    values, signal = torch.ops.gfnode_fast.synthesis_backward(
        grad.contiguous(), *tensors, ctx.activation, ptr
    )
    return values, None, signal, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "synthesis: `activation` must be applied outside `propagate` for a second derivative, got "
        "it inside; leave it out and apply it to the result"
    )
