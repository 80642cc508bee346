"""A batch of graphs of different size as flat edge lists."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Graphs:
    """B graphs: flat nodes of all graphs one after the other, edges between flat nodes.

    Args:
        row, col: (E,) int64, every edge in both directions, any order; graph by graph not needed.
        ptr: (B + 1,) int64, graph b has the nodes ptr[b] to ptr[b + 1].
        weights: (E,) weight of each directed edge, equal in both directions, or None for 1.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes or devices; and, for tensors on the CPU, an edge
            that leaves its graph, a loop, an edge without its reverse, weights that are negative or
            not finite.

    Notes:
        Not to be changed in place: what follows from the edges is computed once.
    """

    row: Tensor
    col: Tensor
    ptr: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in (("row", self.row), ("col", self.col), ("ptr", self.ptr)):
            if value.dtype != torch.int64:
                raise TypeError(f"Graphs: `{name}` must be int64, got {value.dtype}; use .long()")
            if value.dim() != 1:
                raise ValueError(
                    f"Graphs: `{name}` must have one dimension, got {tuple(value.shape)}"
                )
        if self.row.shape != self.col.shape:
            raise ValueError(
                f"Graphs: `col` must be as long as row, {len(self.row)}, got {len(self.col)}"
            )
        if len(self.ptr) == 0:
            raise ValueError("Graphs: `ptr` must have B + 1 entries, got none; pass [0] for B = 0")
        if self.weights is not None and (
            self.weights.shape != self.row.shape or not self.weights.is_floating_point()
        ):
            raise ValueError(
                f"Graphs: `weights` must be floating point ({len(self.row)},), got "
                f"{self.weights.dtype} {tuple(self.weights.shape)}; give one weight per edge"
            )
        for other in (self.col, self.ptr, self.weights):
            if other is not None and other.device != self.row.device:
                raise ValueError(
                    f"Graphs: all tensors must be on {self.row.device} like row, got one on "
                    f"{other.device}; move it"
                )
        if self.row.device.type == "cpu":
            self._check_edges()

    def _check_edges(self) -> None:
        ptr, row, col = self.ptr, self.row, self.col
        if ptr[0] != 0 or bool((ptr.diff() < 0).any()):
            raise ValueError(
                f"Graphs: `ptr` must ascend from 0, got {ptr[:8].tolist()} ...; pass the running "
                "sum of the graphs' sizes"
            )
        nodes = int(ptr[-1])
        if len(row) == 0:
            return
        if min(int(row.min()), int(col.min())) < 0 or max(int(row.max()), int(col.max())) >= nodes:
            raise ValueError(f"Graphs: `row` and `col` must be in 0 … {nodes - 1}, ptr's nodes")
        if bool((self.graph_of(row) != self.graph_of(col)).any()):
            raise ValueError("Graphs: `row` and `col` must be of one graph, got an edge across two")
        if bool((row == col).any()):
            raise ValueError("Graphs: `row` and `col` must differ, got a loop; leave it out")
        here, there = (row * nodes + col).sort(), (col * nodes + row).sort()
        if not torch.equal(here.values, there.values):
            raise ValueError(
                "Graphs: `row` and `col` must hold both directions of every edge, got one without "
                "its reverse; append the reversed edges"
            )
        if self.weights is not None:
            if not bool((self.weights.isfinite() & (self.weights >= 0)).all()):
                raise ValueError("Graphs: `weights` must be finite and not negative")
            # Repeated edges may differ among each other, their sums may not.
            first, where = here.values.unique_consecutive(return_inverse=True)
            sums = self.weights.new_zeros(2, len(first))
            sums[0].index_add_(0, where, self.weights[here.indices])
            sums[1].index_add_(0, where, self.weights[there.indices])
            if not torch.allclose(sums[0], sums[1]):
                raise ValueError("Graphs: `weights` must be equal in both directions of an edge")

    @classmethod
    def repeat(cls, row: Tensor, col: Tensor, num_nodes: int, copies: int) -> Graphs:
        """Copies of one graph."""
        shift = torch.arange(copies, device=row.device)[:, None] * num_nodes
        ptr = torch.arange(copies + 1, device=row.device) * num_nodes
        return cls((row + shift).flatten(), (col + shift).flatten(), ptr)

    def graph_of(self, nodes: Tensor) -> Tensor:
        """The graph of each flat node."""
        return torch.searchsorted(self.ptr, nodes, right=True) - 1

    def __len__(self) -> int:
        return len(self.ptr) - 1

    @cached_property
    def sizes(self) -> Tensor:
        """(B,) number of nodes of each graph."""
        return self.ptr.diff()

    @cached_property
    def largest(self) -> int:
        """Nodes of the largest graph."""
        return int(self.sizes.max()) if len(self) else 0

    @cached_property
    def distinct(self) -> tuple[list[bytes], Tensor, Graphs]:
        """The different ones among the graphs.

        Returns:
            Their keys, equal for equal nodes, edges and weights and for no others (SHA-256); which
            of them each graph is, (B,); and the different graphs themselves.
        """
        keys: dict[bytes, int] = {}
        first: list[int] = []
        which = []
        for b, content in enumerate(self._contents()):
            key = hashlib.sha256(content).digest()
            if key not in keys:
                keys[key] = len(keys)
                first.append(b)
            which.append(keys[key])
        chosen = torch.tensor(first, dtype=torch.int64, device=self.row.device)
        return list(keys), torch.tensor(which, device=self.row.device), self.select(chosen)

    def _contents(self) -> Iterator[bytes]:
        """Nodes, sorted edges and weights of each graph as bytes."""
        graph = self.graph_of(self.row)
        local = torch.stack([self.row, self.col]) - self.ptr[graph]
        order = (self.row * max(1, int(self.ptr[-1])) + self.col).argsort(stable=True)
        edges = local[:, order].t().contiguous().cpu().numpy()
        counts = torch.bincount(graph, minlength=len(self)).tolist()
        weights = None if self.weights is None else self.weights[order].double().cpu().numpy()
        begin = 0
        for size, count in zip(self.sizes.tolist(), counts, strict=True):
            part = slice(begin, begin + count)
            begin += count
            content = size.to_bytes(8, "little") + edges[part].tobytes()
            yield content if weights is None else content + b"w" + weights[part].tobytes()

    def select(self, which: Tensor) -> Graphs:
        """These graphs of the batch, (K,) int64, in this order."""
        sizes = self.sizes[which]
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        graph = self.graph_of(self.row)
        place = torch.full((len(self),), -1, dtype=torch.int64, device=self.row.device)
        place[which] = torch.arange(len(which), device=self.row.device)
        kept = place[graph] >= 0
        graph = graph[kept]
        shift = ptr[place[graph]] - self.ptr[graph]
        weights = None if self.weights is None else self.weights[kept]
        return Graphs(self.row[kept] + shift, self.col[kept] + shift, ptr, weights)
