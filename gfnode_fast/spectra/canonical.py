"""The same eigenvectors on every machine: signs, and bases of repeated eigenvalues."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.spectra.order import canonical_order, clusters

SAME_EIGENVALUE = 1e-8  # relative to the norm: eigenvalues closer than this are one eigenspace
SAME_ENTRY = 1e-6  # of matrix entries, relative to the norm, and of squared components


def eigenspaces(w: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Number the eigenspaces.

    Args:
        w: (B, n) ascending eigenvalues.
        sizes: (B,) eigenvalues that count, the first of each row; None for all.

    Returns:
        (B, n) int64, from 0 in every row, equal for eigenvalues within 1e-8 of the norm; -1 beyond
        the size.
    """
    inside = _inside(w, sizes)
    values = torch.where(inside, w, 0).double()
    norm = values.abs().amax(dim=1) if w.shape[1] else values.sum(dim=1)
    steps = (values.diff(dim=1) > SAME_EIGENVALUE * norm[:, None]).to(torch.int64)
    spaces = torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0)) if w.shape[1] else steps
    return torch.where(inside, spaces, -1)


def canonical_basis(w: Tensor, V: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Eigenvectors that do not depend on who computed them, nor on how nodes are numbered.

    Inside an eigenspace with projector P, vectors are P's columns at pivots, made orthonormal
    (pivoted Cholesky decomposition): the pivot is the node with the largest remaining diagonal
    entry, and among nearly equal ones the first in the graph's canonical order. For a simple
    eigenvalue that makes the largest component positive.

    Args:
        w: (B, n) or (n,) ascending eigenvalues of symmetric matrices.
        V: (B, n, n) or (n, n) float64 orthonormal eigenvectors, column k to w[k].
        sizes: (B,) size of each matrix where they differ; beyond it `w` is ignored and the result
            zero.

    Returns:
        Eigenvectors of the same eigenvalues, shaped like V, float64.

    Raises:
        TypeError, ValueError: V is not float64, or shapes do not match.

    Notes:
        Equal to 1e-10 between solvers where the gaps between eigenspaces exceed 1e-5 of the norm;
        eigenvalues within 1e-8 of the norm count as one eigenspace. Renumbering the nodes permutes
        the rows of the result, up to an automorphism of the weighted graph: where such a symmetry
        moves eigenvectors (all repeated eigenvalues that it enforces, and vectors that it maps to
        their negative), no rule can tell the numberings apart; see `canonical_order` for the one
        other exception. Deterministic. Without gradient. O(B n³), and `canonical_order`.

    Source: projectors as invariants of eigenspaces: Ma et al., Laplacian Canonization, 2023.
    """
    if V.dtype != torch.float64:
        raise TypeError(
            f"canonical_basis: `V` must be float64, got {V.dtype}; solve in float64 and round the "
            "result"
        )
    if V.dim() == 2 and w.dim() == 1:
        return canonical_basis(w[None], V[None], sizes)[0]
    if V.dim() != 3 or V.shape[1] != V.shape[2] or w.shape != V.shape[:2]:
        raise ValueError(
            f"canonical_basis: `V` must be (B, n, n) and `w` (B, n), got {tuple(V.shape)} and "
            f"{tuple(w.shape)}"
        )
    if sizes is not None and sizes.shape != w.shape[:1]:
        raise ValueError(f"canonical_basis: `sizes` must be ({len(w)},), got {tuple(sizes.shape)}")
    with torch.no_grad():
        return _canonical(w.double(), V, _inside(w, sizes), eigenspaces(w, sizes))


def _inside(w: Tensor, sizes: Tensor | None) -> Tensor:
    place = torch.arange(w.shape[1], device=w.device)
    return (place < (w.shape[1] if sizes is None else sizes[:, None])).expand(w.shape)


def _canonical(w: Tensor, V: Tensor, inside: Tensor, spaces: Tensor) -> Tensor:
    batch, n = w.shape
    if batch == 0 or n == 0:
        return V.clone()
    V = torch.where(inside[:, None, :] & inside[:, :, None], V, 0)
    w = torch.where(inside, w, 0)
    matrix = (V * w[:, None, :]) @ V.mT
    # Beyond a graph's size no value that its own matrix does not have.
    matrix = torch.where(inside[:, None, :] & inside[:, :, None], matrix, matrix[:, :1, :1])
    gap = SAME_ENTRY * w.abs().amax(dim=1)
    codes = clusters(matrix.flatten(1), gap).view_as(matrix)
    codes = torch.maximum(codes, codes.mT)
    place = canonical_order(codes, inside.sum(dim=1)).argsort(dim=1)

    # A simple eigenvalue's vector needs no other: all at once, each as a batch entry of its own.
    each = V.mT.reshape(batch * n, n, 1)
    of_each = (rows.repeat_interleave(n, dim=0) for rows in (place, inside))
    basis = _next_vector(each, each[:, :, :0], *of_each).view(batch, n, n).mT
    numbers = torch.where(inside, spaces, n)
    first = torch.searchsorted(numbers, numbers)
    end = torch.searchsorted(numbers, numbers, right=True)
    repeated = inside & (end - first > 1)
    basis = torch.where((inside & ~repeated)[:, None, :], basis, 0).contiguous()
    column = torch.arange(n, device=w.device)
    # The first and last column, over the batch, of the eigenspaces that have column k.
    lows = torch.where(repeated, first, column).amin(dim=0).tolist()
    ends = torch.where(repeated, end, column + 1).amax(dim=0).tolist()
    for k in repeated.any(dim=0).nonzero().flatten().tolist():
        same = (spaces == spaces[:, k, None])[:, None, :]
        low, high = lows[k], ends[k]
        own, done = V[:, :, low:high] * same[:, :, low:high], basis[:, :, low:k] * same[:, :, low:k]
        vector = _next_vector(own, done, place, inside)
        basis[:, :, k] = torch.where(inside[:, k, None], vector, 0)
    return basis


def _next_vector(own: Tensor, done: Tensor, place: Tensor, inside: Tensor) -> Tensor:
    """(B, n): the canonical vector of an eigenspace after others.

    Args:
        own: (B, n, m) any basis of the eigenspace, in columns; zero columns do not matter.
        done: (B, n, j) its canonical vectors so far.
        place: (B, n) of each node in the canonical order.
        inside: (B, n) which nodes there are.
    """
    remaining = own.square().sum(dim=2) - done.square().sum(dim=2)
    is_largest = remaining > remaining.amax(dim=1, keepdim=True) - SAME_ENTRY
    pivot = torch.where(is_largest & inside, place, place.shape[1]).argmin(dim=1)
    row = pivot[:, None, None]
    column = own @ own.gather(1, row.expand(-1, 1, own.shape[2])).mT
    column = column - done @ done.gather(1, row.expand(-1, 1, done.shape[2])).mT
    # Once more against what is there: rounding has grown by the pivot's reciprocal root.
    column = column - done @ (done.mT @ column)
    vector: Tensor = (column / column.square().sum(dim=1, keepdim=True).sqrt()).squeeze(2)
    return vector
