"""Laplacians of a batch of graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from gfnode_fast.spectra.graphs import Graphs

Kind = Literal["combinatorial", "symmetric", "random_walk"]


def graph_laplacian(
    graphs: Graphs,
    kind: Kind = "combinatorial",
    weights: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Laplacians of a batch of graphs of different size.

    Args:
        graphs: B graphs. Unweighted: an edge counts once however often it is listed, as in the
            published adjacency. Weighted: the weights of repeated edges add up.
        kind: "combinatorial" D - A; "symmetric" I - D^-1/2 A D^-1/2; "random_walk" I - D^-1 A (not
            symmetric). Nodes without edges have zero rows.
        weights: (E,) weights of the edges in place of those of `graphs`, under the same conditions.
            None: those of `graphs`, or 1 each where it has none.
        dtype: of the result, float32 or float64.

    Returns:
        (B, n, n) on the graphs' device, n the size of the largest graph; beyond a graph's own size
        its matrix is zero. Differentiable in the weights.

    Raises:
        TypeError, ValueError: another kind or dtype; weights that `Graphs` refuses.

    Notes:
        Deterministic: no atomics on a floating-point sum.
    """
    check_kind("graph_laplacian", kind)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"graph_laplacian: `dtype` must be torch.float32 or torch.float64, got {dtype}"
        )
    if weights is not None:
        graphs = replace(graphs, weights=weights)
    adjacency = adjacency_matrices(graphs, dtype)
    degree = adjacency.sum(dim=2)
    if kind == "combinatorial":
        return degree.diag_embed() - adjacency
    has_edges = degree > 0
    inverse = torch.where(has_edges, degree, 1).reciprocal() * has_edges
    if kind == "random_walk":
        return has_edges.to(dtype).diag_embed() - inverse[:, :, None] * adjacency
    # nodes without edges: derivative 0 instead of the root's infinity
    root = torch.where(has_edges, inverse, 1).sqrt() * has_edges
    return has_edges.to(dtype).diag_embed() - root[:, :, None] * adjacency * root[:, None, :]


def check_kind(op: str, kind: str) -> None:
    """Raise for an unknown kind."""
    if kind not in get_args(Kind):
        raise ValueError(
            f"{op}: `kind` must be one of {', '.join(get_args(Kind))}, got {kind!r}; choose one"
        )


def adjacency_matrices(graphs: Graphs, dtype: torch.dtype) -> Tensor:
    """(B, n, n) with the weights of the edges, zero beyond a graph's own size."""
    n = graphs.largest
    graph = graphs.graph_of(graphs.row)
    begin = graphs.ptr[graph]
    place = (graph * n + graphs.row - begin) * n + graphs.col - begin
    flat = torch.zeros(len(graphs) * n * n, dtype=dtype, device=graphs.row.device)
    if graphs.weights is None:
        flat[place] = 1
    elif len(place):  # segment_reduce takes no empty tensor
        order = place.argsort(stable=True)
        place, counts = place[order].unique_consecutive(return_counts=True)
        weights = graphs.weights.to(dtype)[order]
        flat = flat.index_put((place,), torch.segment_reduce(weights, "sum", lengths=counts))
    return flat.view(len(graphs), n, n)
