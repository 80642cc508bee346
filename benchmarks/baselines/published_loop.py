"""The published recipe's training loop: the reference model behind a per-item data loader.

The published data set gives one window at a time, with features, edge features and eigenvectors of
its own; torch's DataLoader collates a batch of them, whose tensors are then flattened and given the
edges of that many copies of the graph. Adam as by default.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from gfnode_fast import reference
from gfnode_fast.data import Batch, MolecularGraph, Trajectory, Windows

Item = dict[str, Tensor]


class ItemDataset(Dataset[Item]):
    """One window at a time: x, v, loc_mean (N, 3), h (N, 2), edge_fea (E, 5), timeframes (T,),
    U (N, N) and target (T, N, 3), as `WindowDataset.batch` has them for whole batches.
    """

    def __init__(self, trajectory: Trajectory, graph: MolecularGraph, windows: Windows) -> None:
        self.positions = torch.from_numpy(trajectory.positions).float()
        self.graph, self.windows = graph, windows
        self.charges = graph.numbers.float()

    def __len__(self) -> int:
        return len(self.windows.start)

    def __getitem__(self, index: int) -> Item:
        graph, start = self.graph, self.windows.start[index]
        x = self.positions[start]
        v = self.positions[start + 1] - x
        square = (x[graph.row] - x[graph.col]).square().sum(dim=1)
        ends = self.charges[graph.row], self.charges[graph.col]
        return {
            "x": x,
            "v": v,
            "loc_mean": x.mean(dim=0, keepdim=True).repeat(len(x), 1),
            "h": torch.stack([v.norm(dim=1), self.charges / self.charges.max()], dim=1),
            "edge_fea": torch.stack([*ends, graph.hops, graph.stick, square], dim=1),
            "timeframes": self.windows.times[index].float(),
            "U": graph.eigvecs.float(),
            "target": self.positions[self.windows.target[index]],
        }


def flattened(items: Item, graph: MolecularGraph) -> Batch:
    """A collated batch in the layout of `FourierMD.forward`."""
    size, num_atoms, _ = items["x"].shape
    offset = num_atoms * torch.arange(size, device=items["x"].device)[:, None]
    row, col = ((end.to(offset.device) + offset).flatten() for end in (graph.row, graph.col))
    rows = {name: items[name].flatten(0, 1) for name in ("x", "h", "edge_fea", "v", "loc_mean")}
    return Batch(
        **rows,
        edge_index=(row, col),
        timeframes=items["timeframes"],
        U_batch=items["U"],
        target=items["target"].transpose(0, 1).reshape(-1, 3),
    )


def published_steps(
    model: reference.FourierMD, dataset: ItemDataset, batch_size: int, lr: float, decay: float
) -> Iterator[Tensor]:
    """Training steps without end, whole batches only; yields each loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, weight_decay=decay)
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    device = next(model.parameters()).device
    while True:
        for items in loader:
            batch = flattened(
                {name: item.to(device) for name, item in items.items()}, dataset.graph
            )
            optimizer.zero_grad()
            loss = (model(**batch.inputs())[0] - batch.target).square().mean()
            loss.backward()
            optimizer.step()
            yield loss.detach()
