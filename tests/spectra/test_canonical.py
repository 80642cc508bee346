"""The canonical basis does not depend on the solver, the batch or the numbering of nodes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch import Tensor

from gfnode_fast.data import build_graph, load_sample
from gfnode_fast.ops import eigh_batched
from gfnode_fast.spectra import (
    Graphs,
    canonical_basis,
    eigenspaces,
    graph_laplacian,
    graph_spectrum,
    spectral_gap_report,
)
from gfnode_fast.spectra import order as order_module
from graph_shapes import batch_of, benzene, complete, laplacian, path, random, ring, star

SHAPES = {
    "ring": ring(6), "benzene": benzene(), "complete": complete(5), "path": path(7),
    "star": star(8), "two triangles": torch.block_diag(ring(3), ring(3)),
    "random": random(13, 0), "sparse": random(11, 1, 0.15), "one": path(1),
    "no edges": torch.zeros(3, 3, dtype=torch.float64),
}  # fmt: skip


def rotated(w: Tensor, V: Tensor, seed: int = 0) -> Tensor:
    """Another basis of every eigenspace, as another solver might give it."""
    generator = torch.Generator().manual_seed(seed)
    V = V.clone()
    spaces = eigenspaces(w[None])[0]
    for space in spaces.unique():
        columns = (spaces == space).nonzero().flatten()
        square = torch.randn(len(columns), len(columns), generator=generator, dtype=V.dtype)
        V[:, columns] = V[:, columns] @ torch.linalg.qr(square).Q
    return V


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_an_eigenbasis_whatever_basis_came(name):
    matrix = laplacian(SHAPES[name])
    w, V = torch.linalg.eigh(matrix)
    U = canonical_basis(w, V)
    torch.testing.assert_close(matrix @ U, U * w, atol=1e-13, rtol=0)
    torch.testing.assert_close(U.T @ U, torch.eye(len(w), dtype=U.dtype), atol=1e-13, rtol=0)
    for seed in range(3):
        again = canonical_basis(w, rotated(w, V, seed))
        torch.testing.assert_close(again, U, atol=1e-10, rtol=0)


def automorphism(a: Tensor, b: Tensor, U: Tensor, W: Tensor) -> bool:
    """Whether some renumbering takes (b, W) to (a, U): rows of equal values, then the edges."""
    key = [tuple(np.round(row, 6) + 0.0) for row in W.numpy()]
    where = {k: i for i, k in enumerate(key)}
    if len(where) < len(key):
        return sorted(key) == sorted(tuple(np.round(row, 6) + 0.0) for row in U.numpy())
    place = [where.get(tuple(np.round(row, 6) + 0.0)) for row in U.numpy()]
    return None not in place and torch.equal(b[place][:, place], a)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_renumbering_permutes_rows_up_to_symmetry(name, seed):
    a = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(a), generator=generator)
    b = a[order][:, order]
    U = canonical_basis(*torch.linalg.eigh(laplacian(a)))
    W = canonical_basis(*torch.linalg.eigh(laplacian(b)))
    if name == "random":  # without symmetry: exactly the rows
        torch.testing.assert_close(W, U[order], atol=1e-10, rtol=0)
    assert automorphism(a, b, U, W)


@functools.cache
def aspirin() -> Tensor:
    """The sample's graph of 13 heavy atoms, bonds and two-bond pairs."""
    sample = load_sample("aspirin")
    return build_graph(sample.positions[0], sample.numbers).adjacency


@pytest.mark.parametrize("seed", range(6))
def test_renumbering_aspirin_permutes_rows_but_for_its_twins(seed: int) -> None:
    """Atoms 0 and 2 have the same neighbours, and 11 and 12: swapping them changes a sign."""
    a = aspirin()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(seed))
    b = a[order][:, order]
    U = canonical_basis(*torch.linalg.eigh(laplacian(a)))
    W = canonical_basis(*torch.linalg.eigh(laplacian(b)))
    twins = torch.tensor([3, 4])  # the modes of eigenvalue 4, one for each pair
    assert [rows.nonzero().flatten().tolist() for rows in (U[:, twins].T.abs() > 1e-6)] == [
        [0, 2], [11, 12],
    ]  # fmt: skip
    others = torch.tensor([k for k in range(13) if k not in twins])
    torch.testing.assert_close(W[:, others], U[order][:, others], atol=1e-10, rtol=0)
    torch.testing.assert_close(W[:, twins].abs(), U[order][:, twins].abs(), atol=1e-10, rtol=0)
    assert automorphism(a, b, U, W)
    assert spectral_gap_report(torch.linalg.eigvalsh(laplacian(b)), 4).cuts


def signed_roots(rows: list[list[int]]) -> Tensor:
    """sign(x) sqrt(|x| / 60)."""
    x = torch.tensor(rows, dtype=torch.float64)
    return x.sign() * (x.abs() / 60).sqrt()


WEIGHTED_PATH = torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), 1)
# Of a simple graph with weights, one of high symmetry, and one of three components.
PINNED = {
    "path of weights 1, 2, 0.5": (
        WEIGHTED_PATH + WEIGHTED_PATH.T,
        torch.tensor(
            [
                [0.5, -0.5229660138263, 0.6635043409612, -0.1904430043563],
                [0.5, -0.2472760645891, -0.3565682791956, 0.7494755567414],
                [0.5, -0.04425331178633, -0.5925102718978, -0.6300581100911],
                [0.5, 0.8144953902018, 0.2855742101322, 0.07102555770603],
            ],
            dtype=torch.float64,
        ),
    ),
    "benzene": (
        benzene(),
        signed_roots(
            [
                [10, 30, 0, 0, 20, 0],
                [10, 0, 30, 0, -5, 15],
                [10, 0, 0, 30, -5, -15],
                [10, -30, 0, 0, 20, 0],
                [10, 0, -30, 0, -5, 15],
                [10, 0, 0, -30, -5, -15],
            ]
        ),
    ),
    "path of three, an isolated node, a pair": (
        torch.block_diag(path(3), path(1), path(2)),
        signed_roots(
            [
                [0, 0, 20, 30, 0, -10],
                [0, 0, 20, 0, 0, 40],
                [0, 0, 20, -30, 0, -10],
                [60, 0, 0, 0, 0, 0],
                [0, 30, 0, 0, 30, 0],
                [0, 30, 0, 0, -30, 0],
            ]
        ),
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_same_basis_on_any_day(name: str) -> None:
    a, expected = PINNED[name]
    found = graph_spectrum(batch_of([a], weighted=True), dtype=torch.float64).U[0]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    w, V = torch.linalg.eigh(laplacian(a))
    for seed in range(3):
        found = canonical_basis(w, rotated(w, V, seed))
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_twins_are_ordered_as_by_trying_each(monkeypatch: pytest.MonkeyPatch):
    """The short way gives the order that individualisation and refinement give."""
    ethane = torch.zeros(8, 8, dtype=torch.float64)
    ethane[0, 1:5] = ethane[5:, 1] = 1
    methyls = torch.block_diag(star(4), ring(5), complete(3), star(4))
    methyls[0, 5] = methyls[12, 6] = 1
    shapes = [*SHAPES.values(), ethane + ethane.T, (methyls + methyls.T).clamp_max(1)]
    shapes += [random(9, seed, 0.2) for seed in range(8)]
    graphs = batch_of(shapes)
    codes = (graph_laplacian(graphs) + 20).long()
    fast = order_module.canonical_order(codes, graphs.sizes)
    calls = []

    def as_they_are(colours: Tensor, edges: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(shared)
        return colours, shared

    monkeypatch.setattr(order_module, "_without_twins", as_they_are)
    assert torch.equal(order_module.canonical_order(codes, graphs.sizes), fast)
    assert len(calls) > 1


def test_a_batch_is_its_graphs():
    graphs = batch_of(list(SHAPES.values()))
    spectrum = graph_spectrum(graphs, dtype=torch.float64)
    for k, a in enumerate(SHAPES.values()):
        n = len(a)
        alone = graph_spectrum(batch_of([a]), dtype=torch.float64)
        torch.testing.assert_close(spectrum.U[k, :n, :n], alone.U[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(spectrum.w[k, :n], alone.w[0], atol=1e-12, rtol=0)
        assert not spectrum.U[k, n:].any()
        assert not spectrum.U[k, :, n:].any()
        assert not spectrum.w[k, n:].any()


def test_close_eigenvalues_are_told_apart():
    """At gaps of 1e-5 of the norm, rounding of the matrix moves the basis by less than 1e-10."""
    a = ring(6) * (1 + 2e-4 * random(6, 3, 0.5))
    w, V = torch.linalg.eigh(laplacian(a))
    assert 1e-5 < float(w.diff().min() / w.max()) < 1e-4
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = canonical_basis(*torch.linalg.eigh(laplacian(a[order][:, order])))
    torch.testing.assert_close(permuted, canonical_basis(w, V)[order], atol=1e-10, rtol=0)


def test_eigenvalues_within_1e_8_of_the_norm_are_one_eigenspace() -> None:
    """Of the norm of the matrix, 50 here; then no basis of them that comes is kept."""
    _, V = torch.linalg.eigh(laplacian(random(5, 0)))
    turn = torch.eye(5, dtype=torch.float64)
    turn[1:3, 1:3] = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    for gap, spaces in ((0.9e-8, [0, 1, 1, 2, 3]), (1.1e-8, [0, 1, 2, 3, 4])):
        w = torch.tensor([0.0, 1.0, 1.0 + 50 * gap, 20.0, 50.0], dtype=torch.float64)
        assert eigenspaces(w[None])[0].tolist() == spaces
        found, turned = canonical_basis(w, V), canonical_basis(w, V @ turn)
        assert torch.allclose(found, turned, rtol=0, atol=1e-12) == (spaces[2] == 1)
        assert spectral_gap_report(w, 2).cuts == (spaces[2] == 1)


@pytest.mark.parametrize("solver", ["torch", "numpy"])
def test_solvers_agree(solver: str) -> None:
    """LAPACK through torch and through NumPy, and what `graph_spectrum` takes here."""
    for name, a in SHAPES.items():
        matrix = laplacian(a)
        if solver == "torch":
            w, V = torch.linalg.eigh(matrix)
        else:
            w, V = (torch.from_numpy(part) for part in np.linalg.eigh(matrix.numpy()))
        ours = graph_spectrum(batch_of([a]), dtype=torch.float64).U[0]
        torch.testing.assert_close(canonical_basis(w, V), ours, atol=1e-10, rtol=0, msg=name)
        rounded = graph_spectrum(batch_of([a])).U[0]
        torch.testing.assert_close(canonical_basis(w, V).float(), rounded, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_gpu_agrees(backend: str) -> None:
    """Laplacians, solver and canonical basis on the device, in one batch, against the CPU."""
    graphs = batch_of(list(SHAPES.values()))
    expected = graph_spectrum(graphs, dtype=torch.float64)
    there = Graphs(graphs.row.cuda(), graphs.col.cuda(), graphs.ptr.cuda())
    matrices = graph_laplacian(there)
    assert torch.equal(matrices.cpu(), graph_laplacian(graphs))
    w, V = eigh_batched(matrices, there.sizes, backend=backend)
    U = canonical_basis(w, V, there.sizes)
    assert U.is_cuda
    torch.testing.assert_close(w.cpu(), expected.w, atol=1e-11, rtol=0)
    torch.testing.assert_close(U.cpu(), expected.U, atol=1e-10, rtol=0)
    rounded = graph_spectrum(there).U.cpu()
    torch.testing.assert_close(rounded, graph_spectrum(graphs).U, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["symmetric", "random_walk"])
def test_normalised_spectra(kind):
    a = random(9, 5)
    w, U = (x[0] for x in graph_spectrum(batch_of([a]), kind, dtype=torch.float64))
    degree = a.sum(1)
    matrix = torch.eye(9, dtype=torch.float64) - a / degree[:, None]
    if kind == "symmetric":
        matrix = matrix * degree.sqrt()[:, None] / degree.sqrt()
        degree = torch.ones_like(degree)
    torch.testing.assert_close(matrix @ U, U * w, atol=1e-12, rtol=0)
    torch.testing.assert_close((U.T * degree) @ U, torch.eye(9).double(), atol=1e-12, rtol=0)


def test_fp32_is_the_rounded_fp64():
    graphs = batch_of([ring(8), star(5)])
    exact = graph_spectrum(graphs, dtype=torch.float64)
    assert torch.equal(graph_spectrum(graphs).U, exact.U.float())


def test_the_solvers_own_basis_on_request():
    graphs = batch_of([random(6, 2)])
    own = graph_spectrum(graphs, canonical=False, dtype=torch.float64)
    canonical = graph_spectrum(graphs, dtype=torch.float64)
    torch.testing.assert_close(own.U.abs(), canonical.U.abs(), atol=1e-12, rtol=0)


def test_bad_arguments_are_refused():
    w, V = torch.linalg.eigh(laplacian(ring(4)))
    with pytest.raises(TypeError, match="`V` must be float64"):
        canonical_basis(w, V.float())
    with pytest.raises(ValueError, match="`V` must be"):
        canonical_basis(w[:3], V)
    with pytest.raises(ValueError, match="`sizes` must be"):
        canonical_basis(w[None], V[None], torch.tensor([4, 4]))


def test_where_modes_end():
    report = spectral_gap_report(torch.linalg.eigvalsh(laplacian(benzene())), 2)
    assert [count for _, _, count in report.spaces] == [1, 3, 2]
    assert report.cuts
    assert (report.safe_below, report.safe_above, report.nearest_safe) == (1, 4, 1)
    assert "cut the eigenspace of eigenvalue 4, modes 1 to 3" in str(report)
    w = torch.linalg.eigvalsh(laplacian(aspirin()))
    assert [m for m in range(1, 14) if spectral_gap_report(w, m).cuts] == [4]
    assert spectral_gap_report(w, 4).nearest_safe == 5
    assert spectral_gap_report(w, 13).gap == float("inf")
    assert spectral_gap_report(w, 2).gap == pytest.approx(float(w[2] - w[1]))
    with pytest.raises(ValueError, match="`num_modes` must be in 1 … 13, got 14"):
        spectral_gap_report(w, 14)
