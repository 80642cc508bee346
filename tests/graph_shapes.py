"""Graphs whose spectra are known, as adjacency matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.spectra import Graphs


def ring(n: int) -> Tensor:
    a = torch.zeros(n, n, dtype=torch.float64)
    i = torch.arange(n)
    a[i, (i + 1) % n] = a[(i + 1) % n, i] = 1
    return a


def path(n: int) -> Tensor:
    return (torch.ones(n - 1).diag(1) + torch.ones(n - 1).diag(-1)).double()


def complete(n: int) -> Tensor:
    return 1 - torch.eye(n, dtype=torch.float64)


def star(n: int) -> Tensor:
    a = torch.zeros(n, n, dtype=torch.float64)
    a[0, 1:] = a[1:, 0] = 1
    return a


def random(n: int, seed: int, density: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a = (torch.rand(n, n, generator=generator) < density).triu(1)
    return (a | a.T).double()


def benzene() -> Tensor:
    """Heavy atoms, bonds and two-bond pairs."""
    a = ring(6)
    both = ((a + a @ a) > 0).double()
    return both.fill_diagonal_(0)


def batch_of(adjacency: list[Tensor], *, weighted: bool = False) -> Graphs:
    """The graphs of these matrices in one batch, edges shuffled."""
    rows, cols, weights, ptr = [], [], [], [0]
    for a in adjacency:
        row, col = a.nonzero(as_tuple=True)
        rows.append(row + ptr[-1])
        cols.append(col + ptr[-1])
        weights.append(a[row, col])
        ptr.append(ptr[-1] + len(a))
    row, col, weight = torch.cat(rows), torch.cat(cols), torch.cat(weights)
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    return Graphs(row[order], col[order], torch.tensor(ptr), weight[order] if weighted else None)


def laplacian(a: Tensor) -> Tensor:
    return a.sum(1).diag() - a
