"""Rigid superposition, bonds and angles of many frames at once."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.data import MolecularGraph


def superpose(mobile: Tensor, target: Tensor) -> Tensor:
    """Move each frame rigidly (rotation and translation) onto another, least squares.

    Args:
        mobile: (F, N, 3) or (N, 3), the frames to move.
        target: (F, N, 3), the frames to move them onto.

    Returns:
        (F, N, 3), the moved frames. All atoms weigh the same.

    Source: Kabsch, Acta Cryst. A 32 (1976) 922.
    """
    mobile = mobile.expand_as(target)
    mobile_centre, target_centre = mobile.mean(-2, keepdim=True), target.mean(-2, keepdim=True)
    mobile = mobile - mobile_centre
    u, _, vh = torch.linalg.svd(mobile.transpose(-1, -2) @ (target - target_centre))
    reflection = torch.det(u @ vh).sign()
    u = torch.cat((u[..., :2], u[..., 2:] * reflection[..., None, None]), dim=-1)
    moved: Tensor = mobile @ (u @ vh) + target_centre
    return moved


def mean_structure(frames: Tensor, *, rounds: int = 3) -> Tensor:
    """The mean of frames superposed onto it (generalised Procrustes, ``rounds`` rounds).

    Args:
        frames: (F, N, 3).

    Returns:
        (N, 3), centred at the origin.
    """
    mean = frames[0]
    for _ in range(rounds):
        mean = superpose(frames, mean.expand_as(frames)).mean(dim=0)
    return mean - mean.mean(dim=0)


def bond_pairs(graph: MolecularGraph) -> Tensor:
    """(P, 2) bonded atom pairs, each once."""
    once = (graph.hops == 1) & (graph.row < graph.col)
    return torch.stack((graph.row[once], graph.col[once]), dim=1)


def angle_triples(graph: MolecularGraph) -> Tensor:
    """(A, 3) atoms i, j, k with bonds i-j and j-k, each once."""
    bonded = graph.hops == 1
    row, col = graph.row[bonded], graph.col[bonded]
    first, second = torch.nonzero(
        (row[:, None] == row[None, :]) & (col[:, None] < col[None, :]), as_tuple=True
    )
    return torch.stack((col[first], row[first], col[second]), dim=1)


def bond_lengths(frames: Tensor, pairs: Tensor) -> Tensor:
    """(F, P) distances in frames (F, N, 3), in their unit."""
    difference = frames[:, pairs[:, 0]] - frames[:, pairs[:, 1]]
    lengths: Tensor = torch.linalg.vector_norm(difference, dim=-1)
    return lengths


def bond_angles(frames: Tensor, triples: Tensor) -> Tensor:
    """(F, A) angles at the middle atoms in frames (F, N, 3), degrees."""
    one = frames[:, triples[:, 0]] - frames[:, triples[:, 1]]
    two = frames[:, triples[:, 2]] - frames[:, triples[:, 1]]
    # atan2 stays accurate near 0 and 180 degrees, where acos of the cosine does not.
    sine = torch.linalg.vector_norm(torch.linalg.cross(one, two), dim=-1)
    return torch.rad2deg(torch.atan2(sine, (one * two).sum(dim=-1)))
