"""Eigendecompositions of a batch of small symmetric matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def eigh_batched(A: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Ascending eigenvalues (B, n) and eigenvectors (B, n, n); zero beyond `sizes`."""
    if sizes is None:
        w, V = torch.linalg.eigh(A)
        return w, V
    w, V = A.new_zeros(A.shape[:2]), torch.zeros_like(A)
    for n in sizes.unique().tolist():
        which = sizes == n
        w[which, :n], V[which, :n, :n] = torch.linalg.eigh(A[which, :n, :n])
    return w, V
