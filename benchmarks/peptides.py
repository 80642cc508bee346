"""Capped peptides of any length with ideal geometry, for systems larger than the shipped samples.

Ac-(Ala or Gly)-NHMe as a right-handed α helix, hydrogens included, atom by atom from standard bond
lengths, angles and dihedrals (Engh and Huber, Acta Cryst. A47, 392 (1991), rounded). Trajectories
are synthetic: independent vibrations about that geometry, smooth in time. They have the graphs and
sizes of real molecules and nothing to learn beyond; no error measured on them means anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from gfnode_fast.data import Trajectory
from gfnode_fast.data.trajectory import Array

# Residues of the systems that the large-system rows name, by number of atoms: 12 + 10 Ala + 7 Gly.
SYSTEMS = {148: "AG" * 8, 370: "A" * 4 + "GAAAAAAA" * 4 + "A"}
PHI, PSI, OMEGA = -57.0, -47.0, 180.0
AMPLITUDE = 0.05  # Å of each vibration
PERIODS = (40.0, 400.0)  # frames, shortest and longest
VIBRATIONS = 3  # of each coordinate
NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8}


@dataclass
class _Chain:
    """Atoms placed so far."""

    elements: list[str] = field(default_factory=list)
    places: list[Array] = field(default_factory=list)

    def put(
        self, element: str, behind: tuple[int, int, int], length: float, angle: float, turn: float
    ) -> int:
        """An atom d bonded to c, of `behind` = (a, b, c): |cd|, angle bcd, dihedral abcd."""
        a, b, c = (self.places[atom] for atom in behind)
        along = (c - b) / np.linalg.norm(c - b)
        normal = np.cross(b - a, along)
        normal /= np.linalg.norm(normal)
        polar, around = math.radians(angle), math.radians(turn)
        step = (
            -math.cos(polar) * along
            + math.sin(polar) * math.cos(around) * np.cross(normal, along)
            + math.sin(polar) * math.sin(around) * normal
        )
        self.elements.append(element)
        self.places.append(c + length * step)
        return len(self.places) - 1

    def start(self, element: str, place: tuple[float, float, float]) -> int:
        self.elements.append(element)
        self.places.append(np.array(place))
        return len(self.places) - 1

    def methyl(self, behind: tuple[int, int, int]) -> None:
        """Three hydrogens on the last of `behind`."""
        for turn in (60.0, 180.0, 300.0):
            self.put("H", behind, 1.09, 109.5, turn)


def capped_peptide(residues: str) -> tuple[Array, Array]:
    """Positions (N, 3) float64 in Å, centred, and atomic numbers (N,) of Ac-residues-NHMe.

    Args:
        residues: one letter each, A (alanine) or G (glycine).

    Raises:
        ValueError: no residues, or others.
    """
    if not residues or set(residues) - {"A", "G"}:
        raise ValueError(
            f"capped_peptide: `residues` must be letters A and G, got {residues!r}; correct them"
        )
    chain = _Chain()
    alpha = chain.start("C", (0.0, 0.0, 0.0))  # the cap's methyl, in the place of an alpha carbon
    carbonyl = chain.start("C", (1.52, 0.0, 0.0))
    nitrogen = chain.start("N", (2.10, 1.20, 0.0))
    chain.methyl((nitrogen, carbonyl, alpha))
    for residue in residues:
        before, behind = alpha, (alpha, carbonyl, nitrogen)
        alpha = chain.put("C", behind, 1.46, 121.7, OMEGA)
        _finish_peptide_bond(chain, before, carbonyl, nitrogen, alpha)
        behind = (carbonyl, nitrogen, alpha)
        following = chain.put("C", behind, 1.52, 111.0, PHI)
        chain.put("H", behind, 1.09, 109.0, PHI + 120.0)
        if residue == "A":
            beta = chain.put("C", behind, 1.53, 110.1, PHI - 120.0)
            chain.methyl((nitrogen, alpha, beta))
        else:
            chain.put("H", behind, 1.09, 109.0, PHI - 120.0)
        carbonyl = following
        nitrogen = chain.put("N", (nitrogen, alpha, carbonyl), 1.33, 116.6, PSI)
    last = chain.put("C", (alpha, carbonyl, nitrogen), 1.46, 121.7, OMEGA)
    _finish_peptide_bond(chain, alpha, carbonyl, nitrogen, last)
    chain.methyl((carbonyl, nitrogen, last))
    places = np.stack(chain.places)
    numbers = np.array([NUMBERS[element] for element in chain.elements])
    return places - places.mean(axis=0), numbers


def _finish_peptide_bond(
    chain: _Chain, before: int, carbonyl: int, nitrogen: int, alpha: int
) -> None:
    """The oxygen and the hydrogen of alpha - C(=O) - N(H) - alpha."""
    chain.put("O", (alpha, nitrogen, carbonyl), 1.23, 122.7, 0.0)
    chain.put("H", (before, carbonyl, nitrogen), 1.01, 119.0, 0.0)


def vibrating(positions: Array, numbers: Array, num_frames: int, *, seed: int = 0) -> Trajectory:
    """A synthetic trajectory: each coordinate the sum of VIBRATIONS sines of random phase."""
    rng = np.random.default_rng(seed)
    time = np.arange(num_frames, dtype=np.float64)[:, None, None]
    moved = np.repeat(positions[None], num_frames, axis=0)
    for _ in range(VIBRATIONS):
        period, phase = rng.uniform(*PERIODS, positions.shape), rng.random(positions.shape)
        moved += AMPLITUDE / VIBRATIONS * np.sin(2 * np.pi * (time / period + phase))
    return Trajectory(positions=moved.astype(np.float32), numbers=numbers, dt_fs=0.5)
