"""Symmetric matrices that are hard for eigensolvers, and LAPACK's measures of what was solved."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
# LAPACK's own bound for xSYEV's tests is 10 as well; measured: residual 1.5, orthonormality 2.8.
BOUND = 10.0
# Relative to the largest |w|, in units of n ε; measured: 0.9.
EIGENVALUES = 5.0


def laplacian(n: int, edges: list[tuple[int, int]]) -> Tensor:
    A = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges:
        A[i, j] = A[j, i] = -1
    return A - torch.diag(A.sum(0))


def from_spectrum(w: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(len(w), len(w), generator=generator, dtype=torch.float64))[0]
    A = (Q * w) @ Q.T
    return (A + A.T) / 2


def random(n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(*batch, n, n, generator=generator, dtype=torch.float64)
    return A + A.mT


def graded(n: int) -> Tensor:
    """Entries from 1 down to 1e-20."""
    scale = torch.logspace(0, -10, n, dtype=torch.float64)
    return random(n) * scale * scale[:, None]


KINDS: dict[str, Callable[[int], Tensor]] = {
    "random": random,
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "diagonal": lambda n: torch.diag(torch.arange(n, 0, -1, dtype=torch.float64)),
    "complete": lambda n: laplacian(n, [(i, j) for i in range(n) for j in range(i)]),
    "path": lambda n: laplacian(n, [(i, i + 1) for i in range(n - 1)]),
    "ring": lambda n: laplacian(n, [(i, (i + 1) % n) for i in range(n)] if n > 2 else []),
    "star": lambda n: laplacian(n, [(0, i) for i in range(1, n)]),
    "disconnected": lambda n: laplacian(n, [(i, i + 3) for i in range(n - 3)]),
    "repeated": lambda n: from_spectrum((torch.arange(n) // 3).double()),
    "clustered": lambda n: from_spectrum(1 + 1e-6 * (torch.arange(n) - 1).clamp_min(0).double()),
    "graded": graded,
    "graded from below": lambda n: graded(n).flip(0, 1),
    "wilkinson": lambda n: (
        torch.diag((torch.arange(n).double() - (n - 1) / 2).abs())
        + torch.diag(torch.ones(max(n - 1, 0), dtype=torch.float64), 1)[:n, :n]
        + torch.diag(torch.ones(max(n - 1, 0), dtype=torch.float64), -1)[:n, :n]
    ),
}  # fmt: skip


NORMS = {"huge": {DTYPES[0]: 1e37, DTYPES[1]: 1e300}, "tiny": {DTYPES[0]: 1e-36, DTYPES[1]: 1e-300}}


def matrix(kind: str, n: int, dtype: torch.dtype) -> Tensor:
    if kind in NORMS:
        return random(n).to(dtype) * NORMS[kind][dtype]
    return KINDS[kind](n).to(dtype)


def measures(A: Tensor, w: Tensor, V: Tensor) -> tuple[float, float]:
    """|A V - V Λ| / (n |A| ε) and |VᵀV - 1| / (n ε), 1-norms, the largest of a batch."""
    n = A.shape[-1]
    if A.numel() == 0:
        return 0.0, 0.0
    eps = torch.finfo(A.dtype).eps
    A, w, V = A.double(), w.double(), V.double()
    norm = torch.linalg.matrix_norm(A, 1)
    scale = torch.where(norm > 0, norm, 1.0)[..., None, None]
    A, w = A / scale, w / scale.squeeze(-1)
    residual = torch.linalg.matrix_norm(A @ V - V * w.unsqueeze(-2), 1) / (n * eps)
    eye = torch.eye(n, dtype=torch.float64)
    return residual.max().item(), (
        torch.linalg.matrix_norm(V.mT @ V - eye, 1) / (n * eps)
    ).max().item()


def check(A: Tensor, w: Tensor, V: Tensor) -> None:
    assert w.shape == A.shape[:-1]
    assert V.shape == A.shape
    assert w.dtype == V.dtype == A.dtype
    residual, loss = measures(A, w, V)
    assert residual <= BOUND, residual
    assert loss <= BOUND, loss
    if A.numel():
        assert (w.diff(dim=-1) >= 0).all()
        expected = torch.linalg.eigvalsh(A.double())
        error = (w.double() - expected).abs().amax(-1)
        scale = expected.abs().amax(-1) * A.shape[-1] * torch.finfo(A.dtype).eps
        assert (error <= EIGENVALUES * scale).all(), (error / scale).max()


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int64)
