"""Windows of several molecules as tensors on one device, and mixed batches as `GFNODE` takes them.

Every quantity of all molecules stands in one flat buffer with offsets. A batch is index operations
on the device; what must be known on the host, the sizes, is known there, so nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gfnode_fast.data.dataset import WindowDataset, check_index
from gfnode_fast.ops.topology import Topology
from gfnode_fast.solvers.transfers import to_device


class MixedBatch(NamedTuple):
    """B samples of different molecules: the arguments of `GFNODE.forward`, and the target.

    x, v : (ΣN, 3) Å, Å/frame. h : (ΣN, 2). edge_index : the `Topology` of all ΣE edges, in whose
    order edge_fea (ΣE, 5) is. ptr : (B + 1,) int64, on the host. timeframes : (B, T) frames.
    eigvecs : (ΣN²,). target : (T, ΣN, 3) Å. samples : (B,) on the host, in the order of the
    batch, those of one molecule beside each other. sizes : (B,) atoms of each, on the device.
    membership : (K, B), 1 where sample b is of molecule k, float64.
    """

    x: Tensor
    h: Tensor
    edge_index: Topology
    edge_fea: Tensor
    v: Tensor
    ptr: Tensor
    timeframes: Tensor
    eigvecs: Tensor
    target: Tensor
    samples: Tensor
    sizes: Tensor
    membership: Tensor

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of `GFNODE.forward`."""
        values = self._asdict()
        for name in ("target", "samples", "sizes", "membership"):
            del values[name]
        return values

    def errors(self, predicted: Tensor) -> Tensor:
        """(B, T), Å²: mean squared error of each sample at each time, over atoms and components."""
        by_atom = (predicted - self.target).square().mean(dim=-1).T.contiguous()
        # The lengths are right by construction; checking them would wait for the device.
        return torch.segment_reduce(by_atom, "mean", lengths=self.sizes, axis=0, unsafe=True)

    def loss(self, predicted: Tensor) -> Tensor:
        """Mean of `errors`: every sample counts the same, however many atoms it has."""
        return self.errors(predicted).mean()

    def error_sums(self, predicted: Tensor) -> Tensor:
        """(K, 2) float64: of each molecule's samples, the summed error at all times and the last.

        A product with `membership`, which is deterministic on every device.
        """
        errors = self.errors(predicted.double())
        return self.membership @ torch.stack((errors.mean(dim=1), errors[:, -1]), dim=1)


class MixedDataset:
    """All samples of several molecules; sample numbers run molecule after molecule.

    Parameters
    ----------
    parts : one data set a molecule, of one dtype, device and number of times. They are copied.

    Attributes
    ----------
    counts : samples of each molecule, as a list.
    num_timesteps, dtype, device : of the parts.
    index_device : where `batch` wants its index: the host.

    Raises
    ------
    ValueError
        Without parts, or for parts that differ in dtype, device or number of times.

    Notes
    -----
    Memory: that of the parts. The edges of each molecule are sorted by row once; the compressed
    rows of a batch follow from theirs by offsets, without a sort. Deterministic.
    """

    def __init__(self, parts: Sequence[WindowDataset]) -> None:
        kinds = {(p.dtype, p.device, p.num_timesteps) for p in parts}
        if len(kinds) != 1:
            raise ValueError(
                "MixedDataset: `parts` must be data sets of one dtype, device and number of times, "
                f"got {sorted(map(str, kinds))}; make them alike"
            )
        self.dtype, self.device, self.num_timesteps = kinds.pop()
        self.index_device = torch.device("cpu")
        self.counts = [len(part) for part in parts]
        self._num_atoms = torch.tensor([part.num_atoms for part in parts])
        self._num_edges = torch.tensor([part.num_edges for part in parts])
        self._molecule = torch.arange(len(parts)).repeat_interleave(torch.tensor(self.counts))
        rows = self._num_atoms[self._molecule]
        self._first_row = (rows.cumsum(0) - rows).to(self.device)
        self._x = torch.cat([part._x.reshape(-1, 3) for part in parts])
        self._v = torch.cat([part._v.reshape(-1, 3) for part in parts])
        times = self.num_timesteps
        self._target = torch.cat([p._target.transpose(1, 2).reshape(-1, times, 3) for p in parts])
        self._times = torch.cat([part._times for part in parts])
        self._charge = torch.cat([part._charge for part in parts])
        self._eigvecs = torch.cat([part._eigvecs.reshape(-1) for part in parts])
        edges = [_sorted_edges(part) for part in parts]
        self._row, self._col, self._edge_static, self._row_start = (
            torch.cat(values) for values in zip(*edges, strict=True)
        )
        # Per molecule, on the device: its sizes, and where it begins in the buffers above.
        sizes = torch.stack((self._num_atoms, self._num_edges, self._num_atoms.square()))
        self._table = torch.cat((sizes, sizes.cumsum(1) - sizes)).to(self.device)

    def __len__(self) -> int:
        return sum(self.counts)

    def batch(self, index: Tensor) -> MixedBatch:
        """Gather samples `index`: (B,) int64 on the host, in any order.

        The batch has them sorted by molecule (stable). Nothing waits for the device.

        Raises
        ------
        TypeError, ValueError, IndexError
            When `index` is not a 1-D int64 tensor on the host, is empty, or is out of range.
        """
        check_index(index, self.index_device)
        if index.min() < 0 or index.max() >= len(self):
            raise IndexError(
                f"batch: `index` must be in 0 … {len(self) - 1}, got {int(index.min())} to "
                f"{int(index.max())}; take samples that there are"
            )
        index = index[self._molecule[index].argsort(stable=True)]
        molecule = self._molecule[index]
        num_atoms = self._num_atoms[molecule]
        ptr = torch.nn.functional.pad(num_atoms.cumsum(0), (1, 0))
        num_edges, num_entries = int(self._num_edges[molecule].sum()), int(num_atoms.square().sum())
        here, kind = (to_device(numbers, self.device) for numbers in (index, molecule))
        sizes, edge_counts, entry_counts, first_atom, first_edge, first_entry = self._table[:, kind]

        owner, within = _spread(sizes, int(ptr[-1]))
        source = self._first_row[here][owner] + within
        local = first_atom[owner] + within
        x, v = self._x[source], self._v[source]
        speed = torch.linalg.vector_norm(v, dim=-1, keepdim=True)

        edge_owner, edge = _spread(edge_counts, num_edges)
        edge += first_edge[edge_owner]
        offset = (sizes.cumsum(0) - sizes)[edge_owner]
        row, col = self._row[edge] + offset, self._col[edge] + offset
        square = (x[row] - x[col]).square().sum(dim=-1, keepdim=True)
        row_start = self._row_start[local] + (edge_counts.cumsum(0) - edge_counts)[owner]
        edges = Topology(
            num_nodes=len(x),
            order=torch.arange(num_edges, device=self.device),
            row=row,
            col=col,
            row_start=torch.nn.functional.pad(row_start, (0, 1), value=num_edges),
            max_nodes=int(num_atoms.max()),
        )
        entry_owner, entry = _spread(entry_counts, num_entries)
        kinds = torch.arange(len(self.counts), device=self.device)
        return MixedBatch(
            x=x,
            h=torch.cat([speed, self._charge[local]], dim=-1),
            edge_index=edges,
            edge_fea=torch.cat([self._edge_static[edge], square], dim=-1),
            v=v,
            ptr=ptr,
            timeframes=self._times[here],
            eigvecs=self._eigvecs[first_entry[entry_owner] + entry],
            target=self._target[source].transpose(0, 1),
            samples=index,
            sizes=sizes,
            membership=(kinds[:, None] == kind).double(),
        )


def _sorted_edges(part: WindowDataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, col and static features sorted by row, (E,) each, and each atom's first edge, (N,)."""
    row, order = torch.sort(part._row, stable=True)
    atoms = torch.arange(part.num_atoms, device=row.device)
    return row, part._col[order], part._edge_static[order], torch.searchsorted(row, atoms)


def _spread(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For counts (B,) of sum `total`: b, counts[b] times, and 0 ... counts[b] - 1; (total,)."""
    owner = torch.repeat_interleave(counts, output_size=total)
    first = counts.cumsum(0) - counts
    return owner, torch.arange(total, device=counts.device) - first[owner]
