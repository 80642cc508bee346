"""Functions of symmetric matrices, f(A) = V g(w) Vᵀ, with a gradient for repeated eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gfnode_fast._once import refuse_tangents
from gfnode_fast.ops.eigh import SAME_EIGENVALUE, eigh_batched

ROUNDING = 8.0  # of a difference of two values of g, in units of its last digit


def matrix_function(
    A: Tensor,
    g: Callable[[Tensor], Tensor],
    sizes: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """f(A) = V diag(g(w)) Vᵀ for symmetric A = V diag(w) Vᵀ: heat kernels, spectral filters.

    Args:
        A: (..., n, n) float32 or float64; the lower triangles are read.
        g: differentiable and elementwise: eigenvalues (..., n) to as many values, of A's dtype.
            It may hold parameters; they get their gradient.
        sizes: (...) int64 or int32, as in `eigh_batched`: the matrices are the leading
            sizes × sizes blocks, and the result is zero outside them.
        backend: of `eigh_batched`.

    Returns:
        (..., n, n) symmetric. NaN for a matrix with an entry that is not finite.

    Raises:
        TypeError, ValueError: an argument that `eigh_batched` refuses; a `g` of another shape,
            dtype or device, or (seen on the CPU, outside of torch.compile, where A needs a
            gradient) one that is not elementwise.
        RuntimeError: as `eigh_batched`; a second derivative where A requires a gradient.

    Notes:
        ∂L/∂A = V (K ∘ Vᵀ ∂L/∂f V) Vᵀ, symmetrised, K_ij = (g(w_j) - g(w_i)) / (w_j - w_i), and
        g'(w_i) where the two are equal. So it is right whatever the basis inside an eigenspace,
        for repeated and for close eigenvalues: K_ij is the mean of g'(w_i) and g'(w_j) where
        |w_j - w_i| <= 8 n ε max|w|, and wherever the quotient differs from that mean by no more
        than its own rounding, 8 ε (|g(w_i)| + |g(w_j)| + max|w| |mean|) / |w_j - w_i|. The error
        is then at most twice that rounding, whatever scale g varies on; the mean's own is
        (w_j - w_i)² g''' / 12. Deterministic. Once differentiable.

        Source: Daleckii and Krein, 1965; Higham, "Functions of Matrices", 2008, theorem 3.11.
    """
    w, V = eigh_batched(A.detach() if isinstance(A, Tensor) else A, sizes, backend=backend)
    refuse_tangents("matrix_function", A)
    if sizes is not None:  # outside, g is not asked for values that it may not have
        inside = torch.arange(w.shape[-1], device=w.device) < sizes.unsqueeze(-1)
        w = torch.where(inside, w, torch.where(sizes.unsqueeze(-1) > 0, w[..., :1], 1.0))

    def checked(w: Tensor) -> Tensor:
        values = g(w)
        _check(values, w)
        return values

    if not (A.requires_grad and torch.is_grad_enabled()):
        return _assembled(V, checked(w))
    values, pull = torch.func.vjp(checked, w)  # type: ignore[misc]  # three with has_aux
    (slope,) = pull(torch.ones_like(values))
    if w.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_elementwise(pull, slope)
    f: Tensor = _MatrixFunction.apply(A, values, w, V, slope)  # type: ignore[no-untyped-call]
    return f


def _check(values: Tensor, w: Tensor) -> None:
    if not isinstance(values, Tensor):
        raise TypeError(
            f"matrix_function: `g` must return a tensor, got {type(values).__name__}; compute with "
            "torch"
        )
    if values.dtype != w.dtype:
        raise TypeError(
            f"matrix_function: `g` must return {w.dtype} like `A`, got {values.dtype}; convert it"
        )
    if values.shape != w.shape or values.device != w.device:
        raise ValueError(
            f"matrix_function: `g` must return {tuple(w.shape)} on {w.device} like the "
            f"eigenvalues, got {tuple(values.shape)} on {values.device}; return a value for each"
        )


def _check_elementwise(pull: Callable[[Tensor], tuple[Tensor]], slope: Tensor) -> None:
    """The Jacobian of an elementwise function is diagonal: a ramp gives ramp times slope."""
    ramp = torch.linspace(1, 2, slope.numel(), dtype=slope.dtype).view_as(slope)
    expected = ramp * slope
    finite = expected.isfinite()
    error = torch.where(finite, pull(ramp)[0] - expected, 0.0).abs()
    scale = torch.where(finite, expected, 0.0).abs()
    if slope.numel() and error.max() > torch.finfo(slope.dtype).eps ** 0.5 * scale.max():
        raise ValueError(
            "matrix_function: `g` must be elementwise, got a function in which one eigenvalue's "
            "value depends on another eigenvalue; detach what it takes from the others"
        )


def _assembled(V: Tensor, values: Tensor) -> Tensor:
    return (V * values.unsqueeze(-2)) @ V.mT


class _MatrixFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A: Tensor, values: Tensor, w: Tensor, V: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(values, w, V, slope)
        return _assembled(V, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_A, grad_values = _Gradient.apply(grad, *ctx.saved_tensors)  # type: ignore[no-untyped-call]
        return grad_A, grad_values, None, None, None


class _Gradient(torch.autograd.Function):
    """The gradients of A and of g's values, which have none of their own."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, values: Tensor, w: Tensor, V: Tensor, slope: Tensor
    ) -> tuple[Tensor, Tensor]:
        inner = V.mT @ (0.5 * (grad + grad.mT)) @ V
        grad_A = V @ (_divided_differences(w, values, slope) * inner) @ V.mT
        return 0.5 * (grad_A + grad_A.mT), inner.diagonal(dim1=-2, dim2=-1).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "matrix_function: has no second derivative where `A` requires a gradient; "
            "differentiate once, or pass A.detach() for derivatives in the parameters of `g`"
        )


def _divided_differences(w: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    """(..., n) → (..., n, n); see the notes of `matrix_function`."""
    eps = torch.finfo(w.dtype).eps
    run = w.unsqueeze(-2) - w.unsqueeze(-1)
    rise = values.unsqueeze(-2) - values.unsqueeze(-1)
    mean = 0.5 * (slope.unsqueeze(-2) + slope.unsqueeze(-1))
    largest = w.abs().amax(-1)[..., None, None]
    size = values.abs().unsqueeze(-2) + values.abs().unsqueeze(-1) + largest * mean.abs()
    agree = (rise - run * mean).abs() <= ROUNDING * eps * size
    same = run.abs() <= SAME_EIGENVALUE * w.shape[-1] * eps * largest
    near = same | (agree & mean.isfinite())
    return torch.where(near, mean, rise / torch.where(near, 1.0, run))
