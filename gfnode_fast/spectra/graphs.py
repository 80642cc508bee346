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

        Edge lists are sorted to be checked, and once more to be known again (`distinct`). Where
        the same graphs come in many batches, make `Graphs` of these graphs once, and of each batch
        an index into them, for `select` and `SpectralCache.spectrum`, which then do neither.
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
        order = self._order
        here, there = (row * nodes + col)[order], (col * nodes + row).sort()
        if not torch.equal(here, there.values):
            raise ValueError(
                "Graphs: `row` and `col` must hold both directions of every edge, got one without "
                "its reverse; append the reversed edges"
            )
        if self.weights is not None:
            if not bool((self.weights.isfinite() & (self.weights >= 0)).all()):
                raise ValueError("Graphs: `weights` must be finite and not negative")
            # Repeated edges may differ among each other, their sums may not.
            first, where = here.unique_consecutive(return_inverse=True)
            sums = self.weights.new_zeros(2, len(first))
            sums[0].index_add_(0, where, self.weights[order])
            sums[1].index_add_(0, where, self.weights[there.indices])
            if not torch.allclose(sums[0], sums[1]):
                raise ValueError("Graphs: `weights` must be equal in both directions of an edge")

    @classmethod
    def repeat(cls, row: Tensor, col: Tensor, num_nodes: int, copies: int) -> Graphs:
        """Copies of one graph."""
        one = cls(row, col, torch.tensor([0, num_nodes], device=row.device))
        return one.select(torch.zeros(copies, dtype=torch.int64, device=row.device))

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
    def _order(self) -> Tensor:
        """(E,) the edges sorted by row, which puts those of a graph beside each other, and col."""
        nodes = self.ptr[-1].clamp(min=1)
        return (self.row * nodes + self.col).argsort(stable=True)

    @cached_property
    def _edge_counts(self) -> Tensor:
        """(B,) number of edges of each graph."""
        return torch.searchsorted(self.row[self._order], self.ptr).diff()

    @cached_property
    def distinct(self) -> tuple[list[bytes], Tensor, Graphs]:
        """The different ones among the graphs.

        Returns:
            Their keys, equal for equal nodes, edges and weights and for no others (SHA-256); which
            of them each graph is, (B,); and the different graphs themselves.
        """
        numbers: dict[bytes, int] = {}
        first, number_of = [], []
        for b, content in enumerate(self._contents()):
            if content not in numbers:
                numbers[content] = len(numbers)
                first.append(b)
            number_of.append(numbers[content])
        chosen = torch.tensor(first, dtype=torch.int64, device=self.row.device)
        keys = [hashlib.sha256(content).digest() for content in numbers]
        which = torch.tensor(number_of, dtype=torch.int64, device=self.row.device)
        return keys, which, self.select(chosen)

    def _contents(self) -> Iterator[bytes]:
        """Nodes, sorted edges and weights of each graph as bytes."""
        order, counts = self._order, self._edge_counts
        first = torch.repeat_interleave(self.ptr[:-1], counts, output_size=len(order))
        local = torch.stack([self.row[order] - first, self.col[order] - first], dim=1)
        edges = local.cpu().numpy()
        weights = None if self.weights is None else self.weights[order].double().cpu().numpy()
        begin = 0
        for size, count in zip(self.sizes.tolist(), counts.tolist(), strict=True):
            part = slice(begin, begin + count)
            begin += count
            content = size.to_bytes(8, "little") + edges[part].tobytes()
            yield content if weights is None else content + b"w" + weights[part].tobytes()

    def check_numbers(self, op: str, which: Tensor) -> None:
        """Raise unless `which` is (K,) int64 and numbers graphs; on the CPU that is looked at."""
        if which.dtype != torch.int64:
            raise TypeError(f"{op}: `which` must be int64, got {which.dtype}; use .long()")
        if which.dim() != 1 or which.device != self.ptr.device:
            raise ValueError(
                f"{op}: `which` must be (K,) on {self.ptr.device}, got {tuple(which.shape)} on "
                f"{which.device}; pass the numbers of the graphs"
            )
        if which.device.type == "cpu" and len(which):
            low, high = (int(end) for end in which.aminmax())
            if low < 0 or high >= len(self):
                raise ValueError(
                    f"{op}: `which` must be in 0 … {len(self) - 1}, got {low} … {high}; pass the "
                    "numbers of graphs that there are"
                )

    def select(self, which: Tensor) -> Graphs:
        """These graphs of the batch, (K,) int64, in this order, each as often as it is named.

        Raises:
            TypeError, ValueError: `which` is of another dtype, shape or device, or, on the CPU,
                numbers a graph that is not there.
        """
        self.check_numbers("select", which)
        counts = self._edge_counts
        sizes, numbers = self.sizes[which], counts[which]
        ends = numbers.cumsum(0)
        total = int(ends[-1]) if len(which) else 0
        owner = torch.repeat_interleave(numbers, output_size=total)
        begin = (counts.cumsum(0) - counts)[which] - (ends - numbers)
        edge = self._order[begin[owner] + torch.arange(total, device=owner.device)]
        ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        shift = (ptr[:-1] - self.ptr[which])[owner]
        graphs = object.__new__(Graphs)  # these edges have been checked
        for name, value in (
            ("row", self.row[edge] + shift),
            ("col", self.col[edge] + shift),
            ("ptr", ptr),
            ("weights", None if self.weights is None else self.weights[edge]),
        ):
            object.__setattr__(graphs, name, value)
        return graphs
