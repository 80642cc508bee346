"""The graph Fourier transforms in torch: batched products, for molecules of one size at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def project(signal: Tensor, eigvecs: Tensor, num_modes: int) -> Tensor:
    """(B, N, C) → (B, M, C)."""
    return torch.bmm(eigvecs[:, :, :num_modes].transpose(1, 2), signal)


class _Synthesise(torch.autograd.Function):
    """Σ_m U[b, n, m] modes[t, b, m], one time after the other: a batched product over all of them
    would need T copies of U, and so would autograd's gradient of the loop.
    """

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
        grad_modes = grad_eigvecs = None
        if ctx.needs_input_grad[0]:
            grad_modes, _ = synthesise_bwd(grad, modes, eigvecs, None, wants_added=False)
        if ctx.needs_input_grad[1]:
            grad_eigvecs = eigvecs_bwd(grad, modes, eigvecs, None)
        return grad_modes, grad_eigvecs


def synthesise(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    activation: str | None,
) -> Tensor:
    """(T, B, M, C) → (T, B, N, C)."""
    out: Tensor = _Synthesise.apply(modes, eigvecs)  # type: ignore[no-untyped-call]
    if activation == "silu":
        out = F.silu(out)
    if residual is not None:
        out = out + residual
    if centroid is not None:
        positions = torch.stack((centroid, torch.zeros_like(centroid)), dim=-1)
        out = out + positions.flatten(-2)
    return out


def synthesise_bwd(
    grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None, wants_added: bool
) -> tuple[Tensor, Tensor]:
    """grad (T, B, N, C) → gradients of the modes and of what was added, (B, N, C) or (0,)."""
    adjoint = eigvecs[:, :, : modes.shape[2]].transpose(1, 2)
    grad_modes = torch.empty_like(modes, memory_format=torch.contiguous_format)
    for t in range(len(grad)):
        pulled = _pull_activation(grad[t], modes[t], eigvecs, activation)
        torch.bmm(adjoint, pulled, out=grad_modes[t])
    return grad_modes, grad.sum(0) if wants_added else grad.new_empty(0)


def eigvecs_bwd(grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None) -> Tensor:
    """The gradient (B, N, N) of the eigenvectors in the synthesis; grad (T, B, N, C)."""
    grad_eigvecs = torch.zeros_like(eigvecs, memory_format=torch.contiguous_format)
    for t in range(len(grad)):
        pulled = _pull_activation(grad[t], modes[t], eigvecs, activation)
        grad_eigvecs[:, :, : modes.shape[2]] += torch.bmm(pulled, modes[t].transpose(1, 2))
    return grad_eigvecs


def _pull_activation(
    grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None
) -> Tensor:
    if activation is None:
        return grad
    argument = torch.bmm(eigvecs[:, :, : modes.shape[1]], modes)
    pulled: Tensor = torch.ops.aten.silu_backward(grad, argument)
    return pulled


def _by_size(ptr: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Per N: it, molecules of N atoms (b,), their atoms (b, N), their entries of U (b, N, N)."""
    sizes = ptr.diff()
    squares = sizes.square()
    first_entry = squares.cumsum(0) - squares
    for size in sizes.unique().tolist():
        if size == 0:
            continue
        molecules = (sizes == size).nonzero().squeeze(1)
        atoms = ptr[molecules, None] + torch.arange(size, device=ptr.device)
        entries = first_entry[molecules, None] + torch.arange(size * size, device=ptr.device)
        yield size, molecules, atoms, entries.unflatten(1, (size, size))


def project_ragged(signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor) -> Tensor:
    """(ΣN, C) → (B, M, C), zero where a molecule has fewer than M atoms."""
    modes = signal.new_zeros(ptr.shape[0] - 1, num_modes, signal.shape[1])
    for size, molecules, atoms, entries in _by_size(ptr):
        kept = min(num_modes, size)
        modes[molecules, :kept] = project(signal[atoms], eigvecs[entries], kept)
    return modes


def synthesise_ragged(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    activation: str | None,
    ptr: Tensor,
    total_atoms: int,
) -> Tensor:
    """(T, B, M, C) → (T, ΣN, C)."""
    out = modes.new_empty(modes.shape[0], total_atoms, modes.shape[3])
    for size, molecules, atoms, entries in _by_size(ptr):
        out[:, atoms] = synthesise(
            modes[:, molecules, :size],
            eigvecs[entries],
            None if residual is None else residual[atoms],
            None if centroid is None else centroid[atoms],
            activation,
        )
    return out


def synthesise_ragged_bwd(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor,
    wants_added: bool,
) -> tuple[Tensor, Tensor]:
    """grad (T, ΣN, C) → gradients of the modes and, (ΣN, C) or (0,), of what was added."""
    grad_modes = modes.new_zeros(modes.shape)
    for size, molecules, atoms, entries in _by_size(ptr):
        grad_modes[:, molecules, :size], _ = synthesise_bwd(
            grad[:, atoms], modes[:, molecules, :size], eigvecs[entries], activation, False
        )
    return grad_modes, grad.sum(0) if wants_added else grad.new_empty(0)


def eigvecs_ragged_bwd(
    grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None, ptr: Tensor
) -> Tensor:
    """The gradient (ΣN²,) of the eigenvectors in the synthesis; grad (T, ΣN, C)."""
    grad_eigvecs = torch.zeros_like(eigvecs, memory_format=torch.contiguous_format)
    for size, molecules, atoms, entries in _by_size(ptr):
        grad_eigvecs[entries] = eigvecs_bwd(
            grad[:, atoms], modes[:, molecules, :size], eigvecs[entries], activation
        )
    return grad_eigvecs
