"""Errors over all windows of a data set, of one molecule or several."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gfnode_fast.data import MixedDataset, WindowDataset
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.problem import forked_random_state
from gfnode_fast.training.ranks import Ranks


class Errors(NamedTuple):
    """Mean squared errors of the positions, Å² per coordinate.

    `mse` over all windows and times, `last` over all windows at the last time, `by_molecule` as
    `mse` of each molecule's windows: of these, weighted by their windows, `mse` is the mean.
    """

    mse: float
    last: float
    by_molecule: list[float]


@torch.no_grad()
def mean_squared_errors(
    model: FourierMD,
    dataset: WindowDataset | MixedDataset,
    *,
    batch_size: int,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Errors:
    """The errors over all windows of a data set.

    The VAE's noise is drawn from ``seed``; global random state is restored. Read from the device
    once, at the end. Ranks take batches in turn: every window counts once.
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    counts = torch.tensor(dataset.counts)
    total = torch.zeros(len(counts), 2, dtype=torch.float64, device=device)
    with forked_random_state(device):
        torch.manual_seed(seed + ranks.rank)
        batches = torch.arange(len(dataset), device=dataset.index_device).split(batch_size)
        for index in batches[ranks.rank :: ranks.count]:
            batch = dataset.batch(index)
            total += batch.error_sums(model(**batch.inputs())[0])
    model.train(was_training)
    ranks.sum([total])
    total = total.cpu()
    mse, last = (total.sum(dim=0) / len(dataset)).tolist()
    return Errors(mse, last, (total[:, 0] / counts).tolist())
