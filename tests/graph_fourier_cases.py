"""Eigenvectors, signals and the definition, for the tests of the graph Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.graph_fourier import inverse_graph_fourier
from op_checks import DEVICE, randn

# Relative to the largest value; measured: fp64 4e-16, fp32 3e-7, fp16 6e-4, bf16 5e-3.
TOLERANCE = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


SIZES = (5, 1, 3)  # molecules of different size, one of one atom, which has fewer than M = 2 modes


def offsets(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0)


def eigenvectors(num_atoms: int, seed: int) -> Tensor:
    noise = randn(num_atoms, num_atoms, seed=seed)
    return torch.linalg.eigh(noise + noise.T)[1]


def batch_of(sizes: tuple[int, ...], ragged: bool, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """(eigvecs, ptr): (B, N, N) and None, or (ΣN²,) and offsets."""
    each = [eigenvectors(n, seed).to(dtype) for seed, n in enumerate(sizes)]
    if not ragged:
        return torch.stack(each), None
    return torch.cat([u.flatten() for u in each]), offsets(sizes)


def rows(sizes: tuple[int, ...], ragged: bool, *width: int, **options: Any) -> Tensor:
    if ragged:
        return randn(sum(sizes), *width, **options)
    return randn(len(sizes), sizes[0], *width, **options)


def molecules(eigvecs: Tensor, ptr: Tensor | None) -> list[tuple[Any, Tensor]]:
    """(where its atoms are, U) of each molecule."""
    if ptr is None:
        return [(b, u) for b, u in enumerate(eigvecs)]
    sizes = ptr.diff().tolist()
    entries = eigvecs.split([n * n for n in sizes])
    return [(slice(ptr[b], ptr[b + 1]), entries[b].view(n, n)) for b, n in enumerate(sizes)]


def forward_oracle(signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor | None) -> Tensor:
    """The definition, a molecule at a time."""
    modes = []
    for where, u in molecules(eigvecs, ptr):
        projected = (u.T @ signal[where])[:num_modes]
        modes.append(torch.nn.functional.pad(projected, (0, 0, 0, num_modes - len(projected))))
    return torch.stack(modes)


def inverse_oracle(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    activation: str | None,
    ptr: Tensor | None,
) -> Tensor:
    out = []
    for b, (where, u) in enumerate(molecules(eigvecs, ptr)):
        kept = min(modes.shape[2], u.shape[0])
        signal = torch.einsum("nm,tmc->tnc", u[:, :kept], modes[:, b, :kept])
        signal = torch.nn.functional.silu(signal) if activation == "silu" else signal
        signal = signal if residual is None else signal + residual[where]
        if centroid is not None:
            added = torch.zeros_like(signal[0])
            added[:, ::2] = centroid[where]
            signal = signal + added
        out.append(signal)
    return torch.stack(out, dim=1) if ptr is None else torch.cat(out, dim=1)


EPILOGUES = {
    "plain": (None, False, False),
    "features": ("silu", True, False),
    "coordinates": ("silu", True, True),
    "centroid alone": (None, False, True),
}


def inverse_case(
    sizes: tuple[int, ...],
    ragged: bool,
    epilogue: str,
    channels: int = 6,
    num_modes: int = 2,
    dtype: torch.dtype = torch.float64,
    times: int = 2,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Differentiable inputs (modes, eigvecs, residual?, centroid?) and the other arguments."""
    activation, has_residual, has_centroid = EPILOGUES[epilogue]
    eigvecs, ptr = batch_of(sizes, ragged, dtype)
    inputs = [randn(times, len(sizes), num_modes, channels, dtype=dtype, seed=1), eigvecs]
    if has_residual:
        inputs.append(rows(sizes, ragged, channels, dtype=dtype, seed=2))
    if has_centroid:
        inputs.append(rows(sizes, ragged, channels // 2, dtype=dtype, seed=3))
    total = sum(sizes) if ragged else None
    return inputs, {"activation": activation, "ptr": ptr, "total_atoms": total}


def call_inverse(epilogue: str, backend: str, options: dict[str, Any]) -> Any:
    _, has_residual, _ = EPILOGUES[epilogue]

    def call(modes: Tensor, eigvecs: Tensor, *added: Tensor) -> Tensor:
        residual = added[0] if has_residual else None
        centroid = added[-1] if len(added) > has_residual else None
        if backend == "oracle":
            return inverse_oracle(
                modes, eigvecs, residual, centroid, options["activation"], options["ptr"]
            )
        return inverse_graph_fourier(
            modes, eigvecs, residual=residual, centroid=centroid, backend=backend, **options
        )

    return call
