"""The molecular graph: bonds, two-bond pairs, Laplacian and its eigenvectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data.elements import covalent_radii
from gfnode_fast.data.trajectory import Array
from gfnode_fast.spectra import Graphs, shared_cache

Bonds = Literal["covalent", "published"]

PUBLISHED_BOND_LENGTH = 1.6
# Atoms are bonded up to this factor times the sum of their covalent radii: above the stretch of a
# C-H bond at 500 K (1.34 Å), below the distance of two carbons with one atom between (2.3 Å).
COVALENT_FACTOR = 1.25

# Rigid bonds of the published data preparation, as indices among the heavy atoms of MD17 files.
PUBLISHED_RIGID_BONDS: dict[str, tuple[tuple[int, int], ...]] = {
    "benzene": ((0, 1), (2, 3), (4, 5)),
    "aspirin": ((0, 2), (1, 3), (5, 6), (7, 10), (11, 12)),
    "ethanol": ((0, 1),),
    "malonaldehyde": ((1, 2),),
    "naphthalene": ((0, 1), (2, 3), (4, 9), (5, 6), (7, 8)),
    "salicylic": ((0, 9), (1, 2), (4, 5), (6, 7)),
    "toluene": ((2, 3), (5, 6), (0, 1)),
    "uracil": ((0, 1), (3, 4)),
}


@dataclass(frozen=True, eq=False)
class MolecularGraph:
    """Graph of one molecule, built from one frame; all tensors on the CPU.

    Attributes
    ----------
    numbers : (N,) int64, atomic numbers.
    row, col : (E,) int64, both directions of every edge, sorted by (row, col).
    hops : (E,) int64, 1 for bonded pairs, 2 for pairs two bonds apart. A pair that is both (in a
        three-membered ring) is one edge with 1.
    stick : (E,) int64, 1 on the caller's rigid bonds, else 0.
    degree : (N,); adjacency, laplacian : (N, N) float64; A has a 1 for every edge, one- and
        two-hop alike, and L = D - A.
    eigenvalues : (N,) float64, ascending; eigvecs : (N, N) float64, column k is mode k.
    """

    numbers: Tensor
    row: Tensor
    col: Tensor
    hops: Tensor
    stick: Tensor
    degree: Tensor
    adjacency: Tensor
    laplacian: Tensor
    eigenvalues: Tensor
    eigvecs: Tensor

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return int(self.numbers.shape[0])

    @property
    def num_edges(self) -> int:
        """Number of directed edges E."""
        return int(self.row.shape[0])


def build_graph(
    positions: Array,
    numbers: Array,
    *,
    bonds: Bonds = "covalent",
    rigid_bonds: Sequence[tuple[int, int]] = (),
) -> MolecularGraph:
    """Build the molecular graph of one frame.

    Bonded are pairs closer than 1.6 Å (``bonds="published"``) or closer than 1.25 times the sum of
    their covalent radii (``"covalent"``); edges are the bonded pairs and the pairs two bonds apart.

    Parameters
    ----------
    positions : (N, 3) Å, one frame (the published choice is the first).
    numbers : (N,) integers, atomic numbers.
    bonds : the bond rule.
    rigid_bonds : pairs of atoms whose edges carry ``stick = 1``
        (`PUBLISHED_RIGID_BONDS` has those of the published preparation).

    Raises
    ------
    TypeError, ValueError
        For wrong shapes, unknown elements or rules, rigid bonds that are no edge, and atoms at
        the same place. Disconnected molecules and single atoms are fine.

    Notes
    -----
    Distances and eigenvectors are computed in float64. Signs, and bases of repeated eigenvalues,
    are those of `gfnode_fast.spectra.canonical_basis`: the same on every machine. Memory is
    quadratic in N, time cubic, once per topology in a process
    (`gfnode_fast.spectra.shared_cache`).

    Source: GF-NODE (arXiv 2411.01600), data preparation.
    """
    if bonds not in get_args(Bonds):
        raise ValueError(
            f"build_graph: `bonds` must be one of {', '.join(get_args(Bonds))}, got {bonds!r}"
        )
    positions, numbers = _checked_frame(positions, numbers)
    num_atoms = len(numbers)
    _refuse_coinciding(positions)
    bonded = bonded_pairs(positions, numbers, bonds=bonds)
    # A product of float matrices is exact for these small counts, and BLAS makes it fast.
    two_steps = bonded.astype(np.float32) @ bonded.astype(np.float32)
    hops = np.where(bonded, 1, np.where(two_steps > 0, 2, 0))
    np.fill_diagonal(hops, 0)
    row, col = np.nonzero(hops)
    stick = _stick(hops, rigid_bonds)

    adjacency = (hops > 0).astype(np.float64)
    degree = adjacency.sum(axis=1)
    laplacian = np.diag(degree) - adjacency
    edges = torch.from_numpy(np.stack([row, col]).astype(np.int64))
    one_graph = Graphs(edges[0], edges[1], torch.tensor([0, num_atoms]))
    eigenvalues, eigvecs = shared_cache().spectrum(one_graph, dtype=torch.float64)
    return MolecularGraph(
        numbers=torch.from_numpy(numbers),
        row=edges[0],
        col=edges[1],
        hops=torch.from_numpy(hops[row, col].astype(np.int64)),
        stick=torch.from_numpy(stick[row, col].astype(np.int64)),
        degree=torch.from_numpy(degree),
        adjacency=torch.from_numpy(adjacency),
        laplacian=torch.from_numpy(laplacian),
        eigenvalues=eigenvalues[0].clone(),  # the cache's own stay as they are
        eigvecs=eigvecs[0].clone(),
    )


def _checked_frame(positions: Array, numbers: Array) -> tuple[Array, Array]:
    positions, numbers = np.asarray(positions), np.asarray(numbers)
    if positions.dtype.kind != "f":
        raise TypeError(f"build_graph: `positions` must be floating point, got {positions.dtype}")
    if numbers.dtype.kind not in "iu":
        raise TypeError(f"build_graph: `numbers` must be integers, got {numbers.dtype}")
    if positions.ndim != 2 or positions.shape[1] != 3 or len(positions) == 0:
        raise ValueError(
            f"build_graph: `positions` must have shape (atoms, 3), got {positions.shape}; "
            "pass one frame, trajectory.positions[0]"
        )
    if numbers.shape != (len(positions),):
        raise ValueError(
            f"build_graph: `numbers` must have shape ({len(positions)},), got {numbers.shape}"
        )
    if not np.isfinite(positions).all():
        raise ValueError("build_graph: `positions` must be finite, got NaN or infinity")
    return positions.astype(np.float64), numbers.astype(np.int64)


def bonded_pairs(
    positions: Array,
    numbers: Array,
    *,
    bonds: Bonds = "covalent",
    factor: float = COVALENT_FACTOR,
) -> Array:
    """Return which pairs are bonded, (N, N) bool, symmetric; arguments as `build_graph`.

    `factor` replaces the 1.25 of the covalent rule.
    """
    if bonds == "published":
        cutoff: Array = np.asarray(PUBLISHED_BOND_LENGTH)
    else:
        radii = covalent_radii(numbers)
        cutoff = factor * (radii[:, None] + radii[None, :])
    bonded: Array = _distances(positions) < cutoff
    np.fill_diagonal(bonded, False)
    return bonded


def _distances(positions: Array) -> Array:
    """Distances of all pairs, (N, N) float64."""
    square = np.zeros((len(positions), len(positions)))
    for axis in range(3):
        coordinate = positions[:, axis].astype(np.float64)
        square += np.subtract.outer(coordinate, coordinate) ** 2
    distance: Array = np.sqrt(square)
    return distance


def _refuse_coinciding(positions: Array) -> None:
    distance = _distances(positions)
    np.fill_diagonal(distance, np.inf)
    if distance.min() < 1e-3:
        i, j = np.unravel_index(np.argmin(distance), distance.shape)
        raise ValueError(
            f"build_graph: `positions` must be of distinct atoms, got atoms {i} and {j} at the "
            "same place; check the unit (Å) and the frame"
        )


def _stick(hops: Array, rigid_bonds: Sequence[tuple[int, int]]) -> Array:
    stick = np.zeros_like(hops)
    for pair in rigid_bonds:
        if len(pair) != 2 or not all(isinstance(atom, int | np.integer) for atom in pair):
            raise TypeError(
                f"build_graph: `rigid_bonds` must be pairs of atom numbers, got {pair!r}; pass "
                "two ints each"
            )
        i, j = pair
        if not (0 <= i < len(hops) and 0 <= j < len(hops)) or hops[i, j] == 0:
            raise ValueError(
                f"build_graph: `rigid_bonds` must be edges of the graph, got ({i}, {j}) which is "
                f"not, in a molecule of {len(hops)} atoms; check the numbering (heavy atoms only?)"
            )
        stick[i, j] = stick[j, i] = 1
    return stick
