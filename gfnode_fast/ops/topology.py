"""The edges of one batch of graphs, sorted by row once and shared by every layer and copy."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

MAX_CACHED = 8  # training, validation and last-batch sizes of a run or two
BLOCK_NODES = 16  # the rows of one tile of the kernels: molecules that begin in them go together


class Neighbours(NamedTuple):
    """The edges of a `Topology` as kernels on a GPU walk them, dense in memory."""

    order: Tensor
    row_start: Tensor
    row: Tensor
    col: Tensor
    source_start: Tensor
    """(n + 1,) first of the edges that leave a node, in `source_edge`."""
    source_edge: Tensor
    """(E,) sorted edges by the node that they leave."""
    block_start: Tensor
    """(ceil(n / BLOCK_NODES) + 1,) first node of each block: nodes that follow each other, and
    that no edge joins with others; those that begin in the same BLOCK_NODES. Where none begin
    there are fewer blocks, and the last ones are empty."""


@dataclass(frozen=True, eq=False)
class Topology:
    """Compressed sparse rows of directed edges; built by `topology`.

    Attributes:
        num_nodes: n, nodes of one copy.
        order: (E,) int64, position in the caller's edge list of each sorted edge; equal rows keep
            the caller's order, so sums over neighbours have one defined order.
        row, col: (E,) int64, sorted by row.
        row_start: (n + 1,) int64, first sorted edge of each row.
        max_nodes: most nodes of a molecule, if the caller knows it. Kernels choose by it; a wrong
            one costs time alone.
    """

    num_nodes: int
    order: Tensor
    row: Tensor
    col: Tensor
    row_start: Tensor
    max_nodes: int | None = None

    @property
    def num_edges(self) -> int:
        return self.row.shape[0]

    @property
    def unsorted(self) -> tuple[Tensor, Tensor]:
        """Row and col in the caller's order, (E,)."""
        row, col = torch.empty_like(self.row), torch.empty_like(self.col)
        return row.index_copy_(0, self.order, self.row), col.index_copy_(0, self.order, self.col)

    @property
    def neighbours(self) -> Neighbours:
        """Built at first use and kept; on the device, without synchronisation."""
        if torch.compiler.is_compiling():
            return _build_neighbours(self)
        if "_neighbours" not in self.__dict__:
            with torch.inference_mode(False):
                self.__dict__["_neighbours"] = _build_neighbours(self)
        found: Neighbours = self.__dict__["_neighbours"]
        return found


def _build_neighbours(edges: Topology) -> Neighbours:
    nodes = torch.arange(edges.num_nodes + 1, device=edges.row.device)
    source, edge = torch.sort(edges.col, stable=True)
    return Neighbours(
        edges.order.contiguous(),
        edges.row_start.contiguous(),
        edges.row.contiguous(),
        edges.col.contiguous(),
        torch.searchsorted(source, nodes),
        edge,
        _block_start(edges, nodes),
    )


def _block_start(edges: Topology, nodes: Tensor) -> Tensor:
    """Found on the device, whatever the molecules: an end is a node that no edge crosses."""
    ends = torch.stack((edges.row, edges.col))
    one = torch.ones_like(edges.row)
    change = torch.zeros(edges.num_nodes + 2, dtype=torch.int64, device=nodes.device)
    change = change.index_add(0, ends.amin(0) + 1, one).index_add(0, ends.amax(0) + 1, -one)
    closed = torch.where(change.cumsum(0)[:-1] == 0, nodes, edges.num_nodes)
    following = closed.flip(0).cummin(0).values.flip(0)
    starts = torch.cat((following[:-1:BLOCK_NODES], nodes[-1:]))
    # Those that are there one after another, so that programs, which take turns, share them evenly.
    place = (starts.diff(prepend=starts[:1]) > 0).cumsum(0)
    return torch.full_like(starts, edges.num_nodes).index_copy(0, place, starts)


_cache: OrderedDict[tuple[int, int, int | None], tuple[Tensor, Tensor, Topology]] = OrderedDict()
_lock = threading.Lock()


def topology(row: Tensor, col: Tensor, num_nodes: int, *, max_nodes: int | None = None) -> Topology:
    """Sort the edges of a graph by row, or find them sorted already.

    Args:
        row, col: (E,) int64 or int32, any order, duplicates allowed.
        num_nodes: n; nodes without edges are allowed.
        max_nodes: most nodes of one molecule of the batch, if known: the Triton kernels take
            whole molecules where these fill the GPU. Nothing but time depends on it.

    Returns:
        The topology, on the device of `row`.

    Raises:
        TypeError, ValueError: not integer vectors of one length and device; on the CPU also an end
            outside 0 ... n-1 (elsewhere the look would cost a synchronisation).

    Notes:
        The last few CPU topologies are kept and found again by content (a copy of it, so that
        writing to `row` in place cannot make one stale): a comparison is far cheaper than a sort
        and, unlike a tensor's identity, survives a data loader. Linear in E but for the sort.
    """
    _check(row, col, num_nodes)
    if row.device.type != "cpu" or torch.compiler.is_compiling():
        return _build(row, col, num_nodes, max_nodes)
    key = (num_nodes, row.shape[0], max_nodes)
    found = _cache.get(key)
    if found is not None and torch.equal(found[0], row) and torch.equal(found[1], col):
        with _lock:
            if key in _cache:
                _cache.move_to_end(key)
        return found[2]
    _check_range("row", row, num_nodes)
    _check_range("col", col, num_nodes)
    with torch.inference_mode(False):  # kept, and then used in training
        built = _build(row, col, num_nodes, max_nodes)
        kept = (row.clone(), col.clone(), built)
    with _lock:
        _cache[key] = kept
        if len(_cache) > MAX_CACHED:
            _cache.popitem(last=False)
    return built


def _build(row: Tensor, col: Tensor, num_nodes: int, max_nodes: int | None) -> Topology:
    row, order = torch.sort(row.long(), stable=True)
    nodes = torch.arange(num_nodes + 1, device=row.device)
    row_start = torch.searchsorted(row, nodes)
    return Topology(num_nodes, order, row, col.long()[order], row_start, max_nodes)


def _check(row: Tensor, col: Tensor, num_nodes: int) -> None:
    for name, end in (("row", row), ("col", col)):
        if end.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"topology: `{name}` must be torch.int64, got {end.dtype}; convert with .long()"
            )
        if end.dim() != 1 or end.shape != row.shape:
            raise ValueError(
                f"topology: `{name}` must be (E,), one length for row and col, got "
                f"{tuple(end.shape)}; pass one node number per edge"
            )
        if end.device != row.device:
            raise ValueError(
                f"topology: `{name}` must be on {row.device} like row, got {end.device}; move it"
            )
    if num_nodes < 0:
        raise ValueError(f"topology: `num_nodes` must be at least 0, got {num_nodes}; correct it")


def _check_range(name: str, end: Tensor, num_nodes: int) -> None:
    if end.numel() == 0:
        return
    low, high = (int(bound) for bound in end.aminmax())
    if low < 0 or high >= num_nodes:
        raise ValueError(
            f"topology: `{name}` must be between 0 and {num_nodes - 1}, got {low} ... {high}; "
            "correct the edges or num_nodes"
        )
