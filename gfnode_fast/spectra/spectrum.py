"""Eigenvalues and eigenvectors of the Laplacians of a batch of graphs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gfnode_fast.ops.eigh import eigh_batched
from gfnode_fast.spectra.canonical import canonical_basis
from gfnode_fast.spectra.graphs import Graphs
from gfnode_fast.spectra.laplacian import Kind, adjacency_matrices, check_kind, graph_laplacian


class Spectrum(NamedTuple):
    """Spectra of B graphs, the largest of n nodes; zero beyond a graph's own size.

    Attributes:
        w: (B, n) eigenvalues, ascending.
        U: (B, n, n) eigenvectors, column k is mode k.
    """

    w: Tensor
    U: Tensor


def graph_spectrum(
    graphs: Graphs,
    kind: Kind = "combinatorial",
    *,
    canonical: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Spectrum:
    """Solve the Laplacians of a batch of graphs.

    Args:
        graphs: B graphs of any sizes.
        kind: as in `graph_laplacian`. For "random_walk", which is not symmetric, the eigenvectors
            are right ones, orthonormal in the degrees: Uᵀ D U = 1 (nodes without edges count as
            degree 1); they are the symmetric Laplacian's, each divided by the root of the degree.
        canonical: choose signs and bases by `canonical_basis`; else they are the solver's.
        dtype: of the result, float32 or float64. Solved in float64 either way.

    Raises:
        TypeError, ValueError: another kind or dtype.

    Notes:
        Deterministic. Without gradient: for gradients in edge weights take `graph_laplacian` with
        `ops.eigh_batched`, or `ops.matrix_function` for V g(w) Vᵀ.
    """
    check_kind("graph_spectrum", kind)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"graph_spectrum: `dtype` must be torch.float32 or torch.float64, got {dtype}"
        )
    with torch.no_grad():
        symmetric: Kind = "symmetric" if kind == "random_walk" else kind
        w, U = eigh_batched(graph_laplacian(graphs, symmetric), graphs.sizes)
        if canonical:
            U = canonical_basis(w, U, graphs.sizes)
        if kind == "random_walk":
            degree = adjacency_matrices(graphs, torch.float64).sum(dim=2)
            U = U / torch.where(degree > 0, degree, 1).sqrt()[:, :, None]
        return Spectrum(w.to(dtype), U.to(dtype))
