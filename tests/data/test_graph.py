"""`build_graph`: bonds, two-bond pairs, Laplacian, eigenvectors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import ETHANOL, ETHANOL_POSITIONS
from gfnode_fast.data import PUBLISHED_RIGID_BONDS, build_graph, load_sample
from gfnode_fast.data.elements import MAX_ATOMIC_NUMBER, SYMBOLS, covalent_radii


def pairs(graph, hops):
    chosen = graph.hops == hops
    return set(zip(graph.row[chosen].tolist(), graph.col[chosen].tolist(), strict=True))


def both(*edges):
    return set(edges) | {(j, i) for i, j in edges}


def test_ethanol_bonds_are_its_chemistry():
    graph = build_graph(ETHANOL_POSITIONS, ETHANOL)
    bonds = [(0, 1), (1, 2), (0, 3), (0, 4), (0, 5), (1, 6), (1, 7), (2, 8)]
    assert pairs(graph, 1) == both(*bonds)
    # C0: 3 H and C1 pairwise, C1: C0, O, 2 H pairwise, O: C1 and H.
    assert graph.num_edges == 2 * (len(bonds) + 6 + 6 + 1)
    assert graph.num_atoms == 9


def naive_edges(positions, bonded):
    """The published construction, atom by atom."""
    num_atoms = len(positions)
    edges = []
    for i in range(num_atoms):
        for j in range(num_atoms):
            if i == j:
                continue
            if bonded[i][j]:
                edges.append((i, j, 1))
            elif any(bonded[i][k] and bonded[k][j] for k in range(num_atoms)):
                edges.append((i, j, 2))
    return edges


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 14), st.integers(0, 10_000))
def test_edges_equal_the_atom_by_atom_construction(num_atoms, seed):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, 1.0 + 0.3 * num_atoms, size=(num_atoms, 3))
    numbers = rng.choice([1, 6, 7, 8, 16], size=num_atoms)
    radii = covalent_radii(numbers)
    for bonds in ("published", "covalent"):
        bonded = np.zeros((num_atoms, num_atoms), bool)
        for i in range(num_atoms):
            for j in range(num_atoms):
                cutoff = 1.6 if bonds == "published" else 1.25 * (radii[i] + radii[j])
                bonded[i, j] = i != j and np.linalg.norm(positions[i] - positions[j]) < cutoff
        graph = build_graph(positions, numbers, bonds=bonds)
        got = list(zip(graph.row.tolist(), graph.col.tolist(), graph.hops.tolist(), strict=True))
        assert got == naive_edges(positions, bonded)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 20), st.integers(0, 10_000))
def test_laplacian_and_its_eigenvectors(num_atoms, seed):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(0, 1.0 + 0.4 * num_atoms, size=(num_atoms, 3))
    graph = build_graph(positions, np.full(num_atoms, 6))
    laplacian, eigvecs = graph.laplacian, graph.eigvecs
    assert laplacian.dtype == eigvecs.dtype == torch.float64
    adjacency = torch.zeros(num_atoms, num_atoms, dtype=torch.float64)
    adjacency[graph.row, graph.col] = 1.0
    torch.testing.assert_close(graph.adjacency, adjacency)
    torch.testing.assert_close(graph.degree, adjacency.sum(1))
    torch.testing.assert_close(laplacian, torch.diag(graph.degree) - adjacency)
    torch.testing.assert_close(laplacian.sum(1), torch.zeros(num_atoms, dtype=torch.float64))
    identity = torch.eye(num_atoms, dtype=torch.float64)
    torch.testing.assert_close(eigvecs.T @ eigvecs, identity, atol=1e-12, rtol=0)
    rebuilt = eigvecs @ torch.diag(graph.eigenvalues) @ eigvecs.T
    torch.testing.assert_close(rebuilt, laplacian, atol=1e-11, rtol=0)
    assert (graph.eigenvalues.diff() >= -1e-12).all()
    assert graph.eigenvalues[0].abs() < 1e-10
    largest = eigvecs.gather(0, eigvecs.abs().argmax(0, keepdim=True))
    assert (largest > 0).all() or (eigvecs.abs().max(0).values - largest.abs() < 1e-6).all()


def test_permuting_atoms_permutes_the_graph():
    rng = np.random.default_rng(1)
    order = rng.permutation(9)
    graph = build_graph(ETHANOL_POSITIONS, ETHANOL)
    permuted = build_graph(ETHANOL_POSITIONS[order], ETHANOL[order])
    torch.testing.assert_close(permuted.laplacian, graph.laplacian[order][:, order])
    torch.testing.assert_close(permuted.eigenvalues, graph.eigenvalues)


def test_far_from_the_origin_in_float64_changes_nothing():
    near = build_graph(ETHANOL_POSITIONS, ETHANOL)
    far = build_graph(ETHANOL_POSITIONS + 5000.0, ETHANOL)
    torch.testing.assert_close(near.row, far.row)
    torch.testing.assert_close(near.hops, far.hops)


def test_three_membered_ring_has_each_pair_once_as_a_bond():
    triangle = 1.51 * np.array([[0, 0, 0], [1, 0, 0], [0.5, 3**0.5 / 2, 0]])
    graph = build_graph(triangle, np.array([6, 6, 6]))
    assert pairs(graph, 1) == both((0, 1), (0, 2), (1, 2))
    assert pairs(graph, 2) == set()


def test_disconnected_molecules_and_single_atoms():
    positions = np.array([[0.0, 0, 0], [0.74, 0, 0], [50.0, 0, 0], [50.74, 0, 0], [90.0, 0, 0]])
    graph = build_graph(positions, np.ones(5, int))
    assert pairs(graph, 1) == both((0, 1), (2, 3))
    assert int((graph.eigenvalues.abs() < 1e-12).sum()) == 3
    alone = build_graph(np.zeros((1, 3)), np.array([18]))
    assert alone.num_edges == 0
    torch.testing.assert_close(alone.eigvecs, torch.ones(1, 1, dtype=torch.float64))


def test_sticks_mark_both_directions_and_nothing_else():
    graph = build_graph(ETHANOL_POSITIONS, ETHANOL, rigid_bonds=[(1, 0)])
    marked = graph.stick == 1
    assert set(zip(graph.row[marked].tolist(), graph.col[marked].tolist(), strict=True)) == both(
        (0, 1)
    )
    assert set(graph.stick.tolist()) == {0, 1}


def test_published_rigid_bonds_are_the_contract():
    assert PUBLISHED_RIGID_BONDS["aspirin"] == ((0, 2), (1, 3), (5, 6), (7, 10), (11, 12))
    assert set(PUBLISHED_RIGID_BONDS) == {
        "aspirin", "benzene", "ethanol", "malonaldehyde", "naphthalene", "salicylic", "toluene",
        "uracil",
    }  # fmt: skip


def test_both_rules_agree_on_heavy_aspirin_and_find_its_bonds():
    sample = load_sample("aspirin")
    published = build_graph(sample.positions[0], sample.numbers, bonds="published")
    covalent = build_graph(sample.positions[0], sample.numbers)
    torch.testing.assert_close(published.adjacency, covalent.adjacency)
    assert len(pairs(covalent, 1)) == 2 * 13  # 13 heavy atoms, one ring: 13 bonds


def test_large_molecule_is_vectorised():
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(9)] * 3), -1).reshape(-1, 3) * 1.5
    graph = build_graph(grid + 0.01 * rng.standard_normal(grid.shape), np.full(len(grid), 6))
    assert graph.num_edges > 4 * len(grid)


def test_radii_table_is_cordero_2008():
    data = pytest.importorskip("ase.data", reason="compares with ASE's table of the same source")
    numbers = np.arange(1, MAX_ATOMIC_NUMBER + 1)
    np.testing.assert_array_equal(covalent_radii(numbers), data.covalent_radii[numbers])
    assert list(SYMBOLS) == data.chemical_symbols[1:119]
    assert MAX_ATOMIC_NUMBER == 96


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bonds": "ionic"}, ValueError, "`bonds` must be one of covalent, published, got 'ionic'"),
        ({"positions": np.zeros((2, 9, 3))}, ValueError, r"`positions` must have shape \(atoms, 3"),
        ({"positions": np.zeros((9, 3), int)}, TypeError, "`positions` must be floating point"),
        ({"positions": ETHANOL_POSITIONS * np.nan}, ValueError, "`positions` must be finite"),
        ({"positions": ETHANOL_POSITIONS * 0}, ValueError, "atoms 0 and 1 at the same place"),
        ({"numbers": ETHANOL[:3]}, ValueError, r"`numbers` must have shape \(9,\)"),
        ({"numbers": ETHANOL * 1.0}, TypeError, "`numbers` must be integers"),
        ({"numbers": ETHANOL + 100}, ValueError, "`numbers` must lie in 1 … 96, got 106"),
        ({"rigid_bonds": [(0, 1, 2)]}, TypeError, r"`rigid_bonds` must be pairs .* \(0, 1, 2\)"),
        ({"rigid_bonds": [(0.0, 1.0)]}, TypeError, r"`rigid_bonds` must be pairs"),
        ({"rigid_bonds": [(0, 99)]}, ValueError, r"`rigid_bonds` must be edges .* \(0, 99\)"),
        ({"rigid_bonds": [(3, 8)]}, ValueError, r"`rigid_bonds` must be edges .* \(3, 8\)"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"positions": ETHANOL_POSITIONS, "numbers": ETHANOL}
    with pytest.raises(error, match=message):
        build_graph(**{**arguments, **change})
