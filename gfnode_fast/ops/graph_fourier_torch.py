"""The graph Fourier transforms in torch: batched products, for molecules of one size at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.transfers import to_device


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


def side_by_side(signal: Tensor, beside: Tensor | None, ptr: Tensor | None = None) -> Tensor:
    """(T, B, N, C), or (T, ΣN, C) with `ptr`, and (T, B, W), given to each of a molecule's atoms
    → C + W channels.
    """
    if beside is None:
        return signal
    return torch.cat((signal, to_atoms(beside, signal.shape, ptr)), dim=-1)


def to_atoms(beside: Tensor, shape: torch.Size, ptr: Tensor | None) -> Tensor:
    """(T, B, W) to each of a molecule's atoms: (T, B, N, W), or (T, ΣN, W) with `ptr`; `shape` is
    that of the atoms' signal.
    """
    if ptr is None:
        return beside.unsqueeze(2).expand(*shape[:3], -1)
    sizes = to_device(ptr, beside.device).diff()
    return beside.repeat_interleave(sizes, dim=1, output_size=shape[1])


class _SumBeside(torch.autograd.Function):
    """[signal + activated, beside], written once."""

    @staticmethod
    def forward(ctx: Any, signal: Tensor, activated: Tensor, beside: Tensor) -> Tensor:
        ctx.channels = channels = activated.shape[-1]
        out = activated.new_empty(*activated.shape[:-1], channels + beside.shape[-1])
        torch.add(signal, activated, out=out[..., :channels])
        out[..., channels:] = beside
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        of_beside = grad[..., ctx.channels :] if ctx.needs_input_grad[2] else None
        grad = grad[..., : ctx.channels]
        return grad.sum(0), grad, of_beside


def sum_beside(signal: Tensor, activated: Tensor, beside: Tensor, ptr: Tensor | None) -> Tensor:
    """signal (B, N, C), activated (T, B, N, C), beside (T, B, W) → (T, B, N, C + W); with `ptr`
    ΣN for B, N.
    """
    if torch.compiler.is_compiling():  # which writes once by itself, and takes no `out=` view
        return side_by_side(signal + activated, beside, ptr)
    beside = to_atoms(beside, activated.shape, ptr)
    out: Tensor = _SumBeside.apply(signal, activated, beside)  # type: ignore[no-untyped-call]
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


Where = slice | Tensor


def _by_size(ptr: Tensor, device: torch.device) -> Iterator[tuple[int, Where, Where, Where]]:
    """Per N: it, the b molecules of N atoms, their b N atoms, their b N² entries of U.

    Slices where the molecules stand beside each other. With `ptr` on the host nothing waits.
    """
    sizes = ptr.diff()
    squares = sizes.square()
    first_entry = squares.cumsum(0) - squares
    for size in sizes.unique().tolist():
        if size == 0:
            continue
        molecules = (sizes == size).nonzero().squeeze(1)
        if ptr.device.type == "cpu":
            first, count = int(molecules[0]), len(molecules)
            if int(molecules[-1]) == first + count - 1:
                atom, entry = int(ptr[first]), int(first_entry[first])
                yield (
                    size,
                    slice(first, first + count),
                    slice(atom, atom + count * size),
                    slice(entry, entry + count * size * size),
                )
                continue
        atoms = ptr[molecules, None] + torch.arange(size, device=ptr.device)
        entries = first_entry[molecules, None] + torch.arange(size * size, device=ptr.device)
        yield size, *(to_device(i.flatten(), device) for i in (molecules, atoms, entries))


def project_ragged(signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor) -> Tensor:
    """(ΣN, C) → (B, M, C), zero where a molecule has fewer than M atoms."""
    modes = signal.new_zeros(ptr.shape[0] - 1, num_modes, signal.shape[1])
    for size, molecules, atoms, entries in _by_size(ptr, signal.device):
        kept = min(num_modes, size)
        by_molecule = signal[atoms].unflatten(0, (-1, size))
        modes[molecules, :kept] = project(by_molecule, _square(eigvecs[entries], size), kept)
    return modes


def _square(entries: Tensor, size: int) -> Tensor:
    """(b N²,) → (b, N, N)."""
    return entries.view(-1, size, size)


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
    for size, molecules, atoms, entries in _by_size(ptr, modes.device):
        out[:, atoms] = synthesise(
            modes[:, molecules, :size],
            _square(eigvecs[entries], size),
            None if residual is None else residual[atoms].unflatten(0, (-1, size)),
            None if centroid is None else centroid[atoms].unflatten(0, (-1, size)),
            activation,
        ).flatten(1, 2)
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
    for size, molecules, atoms, entries in _by_size(ptr, modes.device):
        by_molecule = grad[:, atoms].unflatten(1, (-1, size))
        square = _square(eigvecs[entries], size)
        grad_modes[:, molecules, :size], _ = synthesise_bwd(
            by_molecule, modes[:, molecules, :size], square, activation, False
        )
    return grad_modes, grad.sum(0) if wants_added else grad.new_empty(0)


def eigvecs_ragged_bwd(
    grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None, ptr: Tensor
) -> Tensor:
    """The gradient (ΣN²,) of the eigenvectors in the synthesis; grad (T, ΣN, C)."""
    grad_eigvecs = torch.zeros_like(eigvecs, memory_format=torch.contiguous_format)
    for size, molecules, atoms, entries in _by_size(ptr, modes.device):
        by_molecule = grad[:, atoms].unflatten(1, (-1, size))
        square = _square(eigvecs[entries], size)
        grad_eigvecs[entries] = eigvecs_bwd(
            by_molecule, modes[:, molecules, :size], square, activation
        ).flatten()
    return grad_eigvecs
