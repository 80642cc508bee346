"""Graphs, layers and inputs for the tests of the graph layers, and the reference on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gfnode_fast._extension import why_no_extension
from gfnode_fast.nn.graph_layers import apply_layer
from gfnode_fast.ops.topology import topology
from gfnode_fast.reference.layers import GRAPH_LAYERS

# The compiled kernels are part of any installation with a compiler; tests of a pure-Python one say
# so here, and only here.
NEEDS_CPP = pytest.mark.skipif(
    why_no_extension() is not None, reason="the compiled extension is not built"
)
BACKENDS = ["torch", pytest.param("cpp", marks=NEEDS_CPP)]

# Relative to the largest value, against the reference in float64; measured beside it.
TOLERANCES = {
    torch.float64: 1e-12,  # 2e-14
    torch.float32: 2e-5,  # 2e-6
}
# float32 error over that of the reference in float32, both against float64; 1.5 measured.
FAITHFUL = 2.0

Edges = tuple[Tensor, Tensor]
LAYERS = ["egnn", "sage", "gcn"]
VARIANTS: dict[str, dict[str, Any]] = {
    "egnn": {"name": "egnn"},
    "egnn norm": {"name": "egnn", "norm": True},
    "egnn flat": {"name": "egnn", "flat": True},
    "sage": {"name": "sage"},
    "sage flat": {"name": "sage", "flat": True},
    "gcn": {"name": "gcn"},
}
# Name → number of nodes, edges in a deliberate disorder.
GRAPHS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "unsorted": (5, [(3, 1), (0, 2), (4, 0), (0, 1), (2, 0), (1, 3), (1, 0), (0, 4)]),
    "duplicates and a loop": (3, [(0, 1), (0, 1), (1, 0), (2, 2), (0, 1)]),
    "isolated nodes": (7, [(5, 1), (1, 5), (1, 6)]),
    "crossing molecules": (9, [(i, (i * 4 + 3) % 9) for i in (8, 2, 5, 0, 1, 7)]),
    "one node": (1, []),
    "no edges": (4, []),
    "empty": (0, []),
    "many": (60, [(i, (i * i + k) % 60) for k in (1, 7, 11, 13, 20) for i in range(60)]),
}


def edges_of(graph: str) -> tuple[int, Edges]:
    num_nodes, pairs = GRAPHS[graph]
    pair = torch.tensor(pairs, dtype=torch.long).view(-1, 2)
    return num_nodes, (pair[:, 0].contiguous(), pair[:, 1].contiguous())


def molecules(count: int, num_atoms: int = 6) -> tuple[int, Edges]:
    """Rings that share no node."""
    atom = torch.arange(count * num_atoms)
    first = atom // num_atoms * num_atoms
    row = atom.repeat(2)
    col = torch.cat([first + (atom - first + step) % num_atoms for step in (1, num_atoms - 1)])
    return count * num_atoms, (row, col)


def odd() -> tuple[int, Edges]:
    """Duplicates, a loop, isolated nodes, edges in disorder."""
    pair = torch.tensor([(5, 1), (0, 1), (0, 1), (1, 0), (2, 2), (1, 6), (0, 1)])
    return 7, (pair[:, 0].contiguous(), pair[:, 1].contiguous())


def ragged(sizes: tuple[int, ...] = (1, 5, 12, 2)) -> tuple[int, Edges]:
    """Molecules of these sizes, chains and a ring, more nodes than a tile has."""
    pairs, first = [], 0
    for size in sizes:
        for atom in range(size - 1):
            pairs += [(first + atom, first + atom + 1), (first + atom + 1, first + atom)]
        if size > 10:
            pairs += [(first, first + size - 1), (first + size - 1, first)]
        first += size
    pair = torch.tensor(pairs)[
        torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5))
    ]
    return first, (pair[:, 0].contiguous(), pair[:, 1].contiguous())


def make_layer(
    name: str, width: int, activation: nn.Module | None = None, **options: bool
) -> nn.Module:
    torch.manual_seed(0)
    options = {"flat": False, "norm": False} | options
    return GRAPH_LAYERS[name](width, 3, activation or nn.SiLU(), **options).double()


def make_inputs(num_nodes: int, edges: Edges, copies: int, width: int) -> dict[str, Tensor]:
    """Random state and edge features, on the edges' device."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = copies * num_nodes
    given = {
        "x": randn(rows, 3),
        "v": randn(rows, 3),
        "h": randn(rows, width),
        "edge_fea": randn(edges[0].shape[0], 3),
    }
    return {key: value.to(edges[0].device) for key, value in given.items()}


def published(layer: nn.Module, given: dict[str, Tensor], num_nodes: int, edges: Edges) -> Tensor:
    """The reference's module on copies of the graph; outputs side by side."""
    copies = given["x"].shape[0] // max(num_nodes, 1)
    offset = torch.arange(copies, device=edges[0].device)[:, None] * num_nodes
    row, col = ((offset + end).reshape(-1) for end in edges)
    fea = given["edge_fea"].repeat(copies, 1)
    return torch.cat(layer(given["x"], given["v"], given["h"], row, col, fea), dim=-1)


def ours(
    layer: nn.Module,
    given: dict[str, Tensor],
    num_nodes: int,
    edges: Edges,
    *,
    max_nodes: int | None = None,
    **options: Any,
) -> Tensor:
    state = (given["x"], given["v"], given["h"])
    options = {"recompute": False} | options
    built = topology(*edges, num_nodes, max_nodes=max_nodes)
    return torch.cat(apply_layer(layer, state, built, given["edge_fea"], **options), dim=-1)


def values(
    run: Callable[..., Tensor],
    layer: nn.Module,
    given: dict[str, Tensor],
    *args: Any,
    **options: Any,
) -> dict[str, Tensor]:
    """Output and gradients of inputs and parameters for one random cotangent."""
    layer.zero_grad()
    leaves = {key: value.detach().requires_grad_() for key, value in given.items()}
    out = run(layer, leaves, *args, **options)
    cotangent = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    out.backward(cotangent.to(out))
    found = {"output": out.detach()}
    for key, leaf in (leaves | dict(layer.named_parameters())).items():
        found[key] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
    return found


def cast(given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) for key, value in given.items()}


def assert_close(
    got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, context: object = ""
) -> None:
    for key, value in expected.items():
        # A velocity or bias gradient can cancel to nothing; errors count against the largest.
        scale = max(value.abs().max().item() if value.numel() else 0.0, 1e-2)
        if value.numel():
            error = (got[key].double() - value).abs().max().item() / scale
            assert error <= tolerance, (key, error, context)
