"""Graph Fourier transform onto the first M Laplacian eigenvectors, and back.

    modes[b, m] = Σ_n U[b, n, m] signal[b, n]          m < M
    signal[t, b, n] = Σ_m U[b, n, m] modes[t, b, m]

Discarded modes are never formed and U is never expanded to T copies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _check(op: str, eigvecs: Tensor, num_modes: int) -> None:
    if eigvecs.dim() != 3 or eigvecs.shape[1] != eigvecs.shape[2]:
        raise ValueError(
            f"{op}: `eigvecs` must be (B, N, N), got {tuple(eigvecs.shape)}; pass one square "
            "matrix of eigenvectors in columns per molecule"
        )
    if not 1 <= num_modes <= eigvecs.shape[1]:
        raise ValueError(
            f"{op}: `num_modes` must be between 1 and {eigvecs.shape[1]}, the number of atoms, got "
            f"{num_modes}; lower it"
        )


def _check_operand(
    op: str, name: str, value: Tensor, shape: str, matches: bool, of: Tensor
) -> None:
    if not matches:
        raise ValueError(
            f"{op}: `{name}` must be {shape} for eigvecs {tuple(of.shape)}, got "
            f"{tuple(value.shape)}; reshape it"
        )
    if value.dtype != of.dtype:
        raise TypeError(
            f"{op}: `{name}` must be {of.dtype} like eigvecs, got {value.dtype}; convert "
            "one of them"
        )
    if value.device != of.device:
        raise ValueError(
            f"{op}: `{name}` must be on {of.device} like eigvecs, got {value.device}; move it"
        )


def graph_fourier(signal: Tensor, eigvecs: Tensor, num_modes: int) -> Tensor:
    """Project a signal onto the first `num_modes` eigenvectors.

    Args:
        signal: (B, N, C).
        eigvecs: (B, N, N), eigenvectors in columns, ascending eigenvalue.
        num_modes: M.

    Returns:
        (B, M, C).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not match.

    Notes:
        Deterministic; differentiable any number of times.
    """
    _check("graph_fourier", eigvecs, num_modes)
    matches = signal.dim() == 3 and signal.shape[:2] == eigvecs.shape[:2]
    _check_operand("graph_fourier", "signal", signal, "(B, N, C)", matches, eigvecs)
    return torch.bmm(eigvecs[:, :, :num_modes].transpose(1, 2), signal)


class _InverseGraphFourier(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, modes: Tensor, eigvecs: Tensor) -> Tensor:
        ctx.save_for_backward(modes, eigvecs)
        kept = eigvecs[:, :, : modes.shape[2]]
        times, batch, _, channels = modes.shape
        out = modes.new_empty(times, batch, eigvecs.shape[1], channels)
        for t in range(times):
            torch.bmm(kept, modes[t], out=out[t])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        modes, eigvecs = ctx.saved_tensors
        num_modes = modes.shape[2]
        adjoint = eigvecs[:, :, :num_modes].transpose(1, 2)
        grad_modes = grad_eigvecs = None
        if ctx.needs_input_grad[0]:
            grad_modes = torch.empty_like(modes, memory_format=torch.contiguous_format)
            for t in range(len(grad)):
                torch.bmm(adjoint, grad[t], out=grad_modes[t])
        if ctx.needs_input_grad[1]:
            grad_eigvecs = torch.zeros_like(eigvecs)
            for t in range(len(grad)):
                grad_eigvecs[:, :, :num_modes] += torch.bmm(grad[t], modes[t].transpose(1, 2))
        return grad_modes, grad_eigvecs


def inverse_graph_fourier(modes: Tensor, eigvecs: Tensor) -> Tensor:
    """Synthesise a signal at T times from its first M modes.

    Args:
        modes: (T, B, M, C).
        eigvecs: (B, N, N), eigenvectors in columns, ascending eigenvalue.

    Returns:
        (T, B, N, C).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not match.

    Notes:
        Deterministic; once differentiable.
    """
    matches = modes.dim() == 4 and modes.shape[1] == eigvecs.shape[0]
    _check("inverse_graph_fourier", eigvecs, modes.shape[2] if matches else 1)
    _check_operand("inverse_graph_fourier", "modes", modes, "(T, B, M, C)", matches, eigvecs)
    out: Tensor = _InverseGraphFourier.apply(modes, eigvecs)  # type: ignore[no-untyped-call]
    return out
