"""The order of the training windows: a function of seed and epoch alone, drawn on the CPU.

From several molecules with n_k windows each, an epoch draws as many windows as there are, molecule
k with the probability

    p_k = n_k^(1/tau) / Σ_j n_j^(1/tau)

of temperature sampling (Arivazhagan et al., arXiv 1907.05019; for molecules JMP, arXiv 2310.16802):
tau = 1 takes every window once, tau = ∞ as many of each molecule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def epoch_order(
    seed: int, epoch: int, counts: Sequence[int], temperature: float | None = 1.0
) -> Tensor:
    """The windows of an epoch in their order, (Σ n_k,) int64 on the CPU.

    Args:
        seed, epoch: what it is a function of.
        counts: n_k, windows of each molecule; numbers run molecule after molecule.
        temperature: tau; None: infinite.

    Notes:
        The number drawn of molecule k is one of the two integers next to its share, and the share
        on average over epochs (systematic sampling). Of one molecule every window is drawn equally
        often in an epoch, or once more: random ones.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    total = sum(counts)
    if temperature == 1 or len(counts) == 1:
        return torch.randperm(total, generator=generator)
    # Of the largest, so that a low temperature takes it alone and does not overflow.
    shares = np.asarray(counts, dtype=np.float64) / max(counts)
    weights = shares ** (1 / temperature if temperature else 0.0)
    bounds = total * np.cumsum(weights) / weights.sum()
    offset = float(torch.rand((), dtype=torch.float64, generator=generator))
    ends = np.ceil(bounds[:-1] - offset).clip(0, total).astype(int)  # points k + offset below it
    drawn = np.diff(np.concatenate(([0], ends, [total])))
    chosen, first = [], 0
    for count, wanted in zip(counts, drawn.tolist(), strict=True):
        passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
        chosen += [first + torch.cat(passes)[:wanted]] if passes else []
        first += count
    windows = torch.cat(chosen)
    return windows[torch.randperm(total, generator=generator)]
