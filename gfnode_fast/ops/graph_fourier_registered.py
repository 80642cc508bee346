"""The graph Fourier transforms as operators of `torch.ops.gfnode_fast`: schema, fake, autograd.

Arguments have been checked by `gfnode_fast.ops.graph_fourier`, but for values that only a running
operator may read. Atoms of all molecules share one axis here, (T, ΣN, C), whatever their sizes;
`ptr` is None where all molecules have the eigenvectors' N.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops import graph_fourier_torch as on_torch
from gfnode_fast.ops.dispatch import require_triton
from gfnode_fast.solvers.transfers import to_device

LARGEST_TRITON_M = 128


def _check_offsets(op: str, ptr: Tensor | None, total: int, eigvecs: Tensor) -> None:
    """Values of `ptr`, where reading them waits for no device."""
    if ptr is None or ptr.device.type != "cpu":
        return
    sizes = ptr.diff()
    if ptr[0] != 0 or ptr[-1] != total or bool((sizes < 0).any()):
        raise ValueError(
            f"{op}: `ptr` must ascend from 0 to {total}, the number of atoms, got "
            f"{ptr.tolist()}; pass cumulative numbers of atoms"
        )
    if (entries := int(sizes.square().sum())) != eigvecs.shape[0]:
        raise ValueError(
            f"{op}: `eigvecs` must have {entries} entries, the sum of N² over the molecules, got "
            f"{eigvecs.shape[0]}; pass all N eigenvectors of each molecule"
        )


def too_many_modes(num_modes: int) -> str | None:
    """Why the Triton kernels do not serve that many modes, or None."""
    if num_modes <= LARGEST_TRITON_M:
        return None
    return f"the Triton kernels serve at most {LARGEST_TRITON_M} modes, not {num_modes}"


def _uses_triton(op: str, backend: str, tensor: Tensor, num_modes: int) -> bool:
    if backend != "triton":
        return False
    require_triton(op, tensor)
    if num_modes > LARGEST_TRITON_M:
        raise ValueError(
            f"{op}: `num_modes` must be at most {LARGEST_TRITON_M} with backend='triton', got "
            f"{num_modes}; use backend='torch'"
        )
    return True


def _on_device(ptr: Tensor | None, tensor: Tensor) -> Tensor | None:
    return None if ptr is None else to_device(ptr, tensor.device).contiguous()


@torch.library.custom_op(
    "gfnode_fast::graph_fourier",
    mutates_args=(),
    schema="(Tensor signal, Tensor eigvecs, int num_modes, Tensor? ptr, str backend) -> Tensor",
)
def graph_fourier(
    signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor | None, backend: str
) -> Tensor:
    """signal (B, N, C), or (ΣN, C) with `ptr` → modes (B, M, C)."""
    _check_offsets("graph_fourier", ptr, signal.shape[0], eigvecs)
    if _uses_triton("graph_fourier", backend, signal, num_modes):
        from gfnode_fast.kernels.graph_fourier_launch import launch_graph_fourier_fwd

        return launch_graph_fourier_fwd(signal, eigvecs, num_modes, _on_device(ptr, signal))
    if ptr is None:
        return on_torch.project(signal, eigvecs, num_modes)
    return on_torch.project_ragged(signal, eigvecs, num_modes, ptr)


@graph_fourier.register_fake
def _(signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor | None, backend: str) -> Tensor:
    batch = eigvecs.shape[0] if ptr is None else ptr.shape[0] - 1
    return signal.new_empty(batch, num_modes, signal.shape[-1])


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, eigvecs, _, ptr, ctx.backend = inputs
    ctx.atoms_shape = signal.shape[:-1]
    ctx.save_for_backward(signal if ctx.needs_input_grad[1] else None, eigvecs, ptr)


def _pull_forward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    signal, eigvecs, ptr = ctx.saved_tensors
    grad_signal = grad_eigvecs = None
    if ctx.needs_input_grad[0]:
        rows = inverse_graph_fourier(
            grad.unsqueeze(0), eigvecs, None, None, None, None, ptr, ctx.atoms_shape.numel(),
            ctx.backend,
        )  # fmt: skip
        grad_signal = rows.reshape(*ctx.atoms_shape, grad.shape[2])
    if ctx.needs_input_grad[1]:
        rows = signal.reshape(1, ctx.atoms_shape.numel(), grad.shape[2])
        grad_eigvecs = graph_fourier_eigvecs_bwd(
            rows, grad.unsqueeze(0), eigvecs, None, ptr, ctx.backend
        )
    return grad_signal, grad_eigvecs, None, None, None


graph_fourier.register_autograd(_pull_forward, setup_context=_save_forward)


@torch.library.custom_op(
    "gfnode_fast::inverse_graph_fourier",
    mutates_args=(),
    schema="(Tensor modes, Tensor eigvecs, Tensor? residual, Tensor? centroid, Tensor? beside, "
    "str? activation, Tensor? ptr, SymInt total_atoms, str backend) -> Tensor",
)
def inverse_graph_fourier(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    beside: Tensor | None,
    activation: str | None,
    ptr: Tensor | None,
    total_atoms: int,
    backend: str,
) -> Tensor:
    """modes (T, B, M, C) → (T, ΣN, C), or (T, ΣN, C + W) with `beside` (T, B, W)."""
    _check_offsets("inverse_graph_fourier", ptr, total_atoms, eigvecs)
    if _uses_triton("inverse_graph_fourier", backend, modes, modes.shape[2]):
        from gfnode_fast.kernels.graph_fourier_launch import launch_inverse_graph_fourier_fwd

        return launch_inverse_graph_fourier_fwd(
            modes, eigvecs, residual, activation, centroid, beside, _on_device(ptr, modes),
            total_atoms,
        )  # fmt: skip
    if ptr is None:
        out = on_torch.synthesise(modes, eigvecs, residual, centroid, activation)
        return on_torch.side_by_side(out, beside).flatten(1, 2)
    out = on_torch.synthesise_ragged(
        modes, eigvecs, residual, centroid, activation, ptr, total_atoms
    )
    return on_torch.side_by_side(out, beside, ptr)


@inverse_graph_fourier.register_fake
def _(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    beside: Tensor | None,
    activation: str | None,
    ptr: Tensor | None,
    total_atoms: int,
    backend: str,
) -> Tensor:
    width = modes.shape[3] + (0 if beside is None else beside.shape[2])
    return modes.new_empty(modes.shape[0], total_atoms, width)


def _save_inverse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    modes, eigvecs, residual, centroid, _, ctx.activation, ptr, _, ctx.backend = inputs
    ctx.residual_shape = None if residual is None else residual.shape
    ctx.centroid_shape = None if centroid is None else centroid.shape
    ctx.save_for_backward(modes, eigvecs, ptr)


def _pull_inverse(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    modes, eigvecs, ptr = ctx.saved_tensors
    wants_modes, wants_eigvecs, wants_residual, wants_centroid = ctx.needs_input_grad[:4]
    wants_added = wants_residual or wants_centroid
    grad = grad[..., : modes.shape[3]]
    grad_modes = grad_eigvecs = grad_residual = grad_centroid = None
    if wants_modes or wants_added:
        grad_modes, added = inverse_graph_fourier_bwd(
            grad, modes, eigvecs, ctx.activation, ptr, wants_added, ctx.backend
        )
        if wants_residual:
            grad_residual = added.reshape(ctx.residual_shape)
        if wants_centroid:
            grad_centroid = added[:, ::2].reshape(ctx.centroid_shape)
    if wants_eigvecs:
        grad_eigvecs = graph_fourier_eigvecs_bwd(
            grad, modes, eigvecs, ctx.activation, ptr, ctx.backend
        )
    return grad_modes, grad_eigvecs, grad_residual, grad_centroid, None, None, None, None, None


inverse_graph_fourier.register_autograd(_pull_inverse, setup_context=_save_inverse)


@torch.library.custom_op(
    "gfnode_fast::inverse_graph_fourier_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor modes, Tensor eigvecs, str? activation, Tensor? ptr, "
    "bool wants_added, str backend) -> (Tensor, Tensor)",
)
def inverse_graph_fourier_bwd(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor | None,
    wants_added: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """grad (T, ΣN, C) → gradients of the modes and, (ΣN, C) or (0,), of what was added."""
    if backend == "triton":
        from gfnode_fast.kernels.graph_fourier_launch import launch_inverse_graph_fourier_bwd

        offsets = _on_device(ptr, modes)
        return launch_inverse_graph_fourier_bwd(
            grad, modes, eigvecs, activation, offsets, wants_added
        )
    if ptr is None:
        by_molecule = grad.unflatten(1, eigvecs.shape[:2])
        grad_modes, added = on_torch.synthesise_bwd(
            by_molecule, modes, eigvecs, activation, wants_added
        )
        return grad_modes, added.flatten(0, 1) if wants_added else added
    return on_torch.synthesise_ragged_bwd(grad, modes, eigvecs, activation, ptr, wants_added)


@inverse_graph_fourier_bwd.register_fake
def _(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor | None,
    wants_added: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return modes.new_empty(modes.shape), grad.new_empty(grad.shape[1:] if wants_added else (0,))


@torch.library.custom_op(
    "gfnode_fast::graph_fourier_eigvecs_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor modes, Tensor eigvecs, str? activation, Tensor? ptr, "
    "str backend) -> Tensor",
)
def graph_fourier_eigvecs_bwd(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor | None,
    backend: str,
) -> Tensor:
    """The gradient of the eigenvectors in the inverse; zero in the columns m >= M."""
    if backend == "triton":
        from gfnode_fast.kernels.graph_fourier_launch import launch_graph_fourier_eigvecs_bwd

        offsets = _on_device(ptr, modes)
        return launch_graph_fourier_eigvecs_bwd(grad, modes, eigvecs, activation, offsets)
    if ptr is None:
        by_molecule = grad.unflatten(1, eigvecs.shape[:2])
        return on_torch.eigvecs_bwd(by_molecule, modes, eigvecs, activation)
    return on_torch.eigvecs_ragged_bwd(grad, modes, eigvecs, activation, ptr)


@graph_fourier_eigvecs_bwd.register_fake
def _(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor | None,
    backend: str,
) -> Tensor:
    return eigvecs.new_empty(eigvecs.shape)
