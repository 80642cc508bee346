"""Batches of graphs and their Laplacians."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfnode_fast.spectra import Graphs, graph_laplacian, graph_spectrum
from graph_shapes import batch_of, laplacian, path, random, ring, star

ADJACENCY = [ring(5), random(7, 0), torch.zeros(3, 3, dtype=torch.float64), star(4), path(1)]


def dense(a: torch.Tensor, kind: str) -> np.ndarray:
    """The definition, one matrix at a time; nodes without edges have zero rows."""
    a = a.numpy()
    degree = a.sum(1)
    with np.errstate(divide="ignore"):
        inverse = np.where(degree > 0, 1 / degree, 0)
    if kind == "combinatorial":
        return np.diag(degree) - a
    identity = np.diag((degree > 0).astype(float))
    if kind == "random_walk":
        return identity - inverse[:, None] * a
    return identity - np.sqrt(inverse)[:, None] * a * np.sqrt(inverse)[None]


@pytest.mark.parametrize("kind", ["combinatorial", "symmetric", "random_walk"])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_graph_has_its_own_matrix(kind, weighted):
    scale = [a * (1 + torch.arange(len(a)) + torch.arange(len(a))[:, None]) for a in ADJACENCY]
    chosen = scale if weighted else ADJACENCY
    found = graph_laplacian(batch_of(chosen, weighted=weighted), kind)
    assert found.shape == (5, 7, 7)
    for matrix, a in zip(found, chosen, strict=True):
        n = len(a)
        np.testing.assert_allclose(matrix[:n, :n], dense(a, kind), atol=1e-14)
        assert not matrix[n:].any()
        assert not matrix[:, n:].any()


@pytest.mark.parametrize("kind", ["combinatorial", "symmetric", "random_walk"])
@pytest.mark.parametrize("weighted", [False, True])
def test_graphs_without_edges(kind, weighted):
    graphs = batch_of([torch.zeros(n, n) for n in (3, 1, 0)], weighted=weighted)
    assert torch.equal(graph_laplacian(graphs, kind), torch.zeros(3, 3, 3, dtype=torch.float64))
    assert graph_spectrum(graphs, kind).w.shape == (3, 3)


def test_repeated_edges_count_once_unless_weighted():
    row, col, ptr = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, 2])
    once = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(graph_laplacian(Graphs(row, col, ptr))[0], once)
    weights = torch.tensor([0.5, 0.25, 0.25, 0.5])
    torch.testing.assert_close(graph_laplacian(Graphs(row, col, ptr, weights))[0], 0.75 * once)
    for graphs in (Graphs(row, col, ptr), Graphs(row, col, ptr, 3 * weights)):
        torch.testing.assert_close(graph_laplacian(graphs, weights=weights)[0], 0.75 * once)
    with pytest.raises(ValueError, match="`weights` must be equal in both directions"):
        graph_laplacian(Graphs(row, col, ptr), weights=torch.tensor([0.5, 0.25, 0.25, 1.0]))


def test_gradient_in_the_weights():
    graphs = batch_of([star(4), torch.zeros(2, 2).double(), ring(3)], weighted=True)
    for kind in ("combinatorial", "symmetric", "random_walk"):

        def matrices(half, kind=kind):
            symmetric = half[torch.minimum(graphs.row, graphs.col) + torch.maximum(
                graphs.row, graphs.col)]  # fmt: skip
            return graph_laplacian(Graphs(graphs.row, graphs.col, graphs.ptr, symmetric), kind)

        leaf = torch.rand(20, dtype=torch.float64).add_(0.5).requires_grad_()
        assert torch.autograd.gradcheck(matrices, leaf)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": torch.tensor([0.0, 1.0])}, "`row` must be int64"),
        ({"col": torch.tensor([1])}, "`col` must be as long as row"),
        ({"col": torch.tensor([1, 1])}, "must differ, got a loop"),
        ({"row": torch.tensor([0, 0]), "col": torch.tensor([1, 1])}, "without its reverse"),
        ({"row": torch.tensor([0, 9])}, "must be in 0"),
        ({"ptr": torch.tensor([0, 1, 2])}, "an edge across two"),
        ({"ptr": torch.tensor([1, 2])}, "must ascend from 0"),
        ({"ptr": torch.tensor([], dtype=torch.int64)}, "must have B"),
        ({"weights": torch.tensor([1.0])}, "`weights` must be floating point"),
        ({"weights": torch.tensor([1.0, 2.0])}, "equal in both directions"),
        ({"weights": torch.tensor([-1.0, -1.0])}, "not negative"),
    ],
)
def test_bad_graphs_are_refused(change, message):
    good = {
        "row": torch.tensor([0, 1]), "col": torch.tensor([1, 0]), "ptr": torch.tensor([0, 2]),
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        Graphs(**(good | change))


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of"):
        graph_laplacian(batch_of([ring(3)]), "normalised")
    with pytest.raises(TypeError, match="`dtype` must be"):
        graph_laplacian(batch_of([ring(3)]), dtype=torch.float16)


def test_selecting_graphs():
    graphs = batch_of(ADJACENCY, weighted=True)
    picked = graph_laplacian(graphs.select(torch.tensor([3, 0])))
    torch.testing.assert_close(picked[0, :4, :4], laplacian(star(4)))
    torch.testing.assert_close(picked[1], laplacian(ring(5)))
