"""The Triton graph layers on a GPU: production sizes against float64, both forms, streams, offsets
beyond 32 bits. Where there is no GPU the interpreter's tests stand alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graph_layer_cases import (
    VARIANTS,
    Edges,
    cast,
    make_inputs,
    make_layer,
    molecules,
    ours,
    published,
    values,
)

pytestmark = pytest.mark.gpu

# Error in the 2-norm against float64; the reduced modes take SiLU with tanh.approx. Not measured.
BOUNDS = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2}
PRECISIONS = tuple(BOUNDS)


def production(
    variant: str, num_atoms: int, *, count: int, copies: int, width: int
) -> tuple[nn.Module, dict[str, Tensor], int, Edges]:
    """A float64 layer, its inputs and edges on the GPU."""
    num_nodes, (row, col) = molecules(count, num_atoms)
    edges = (row.cuda(), col.cuda())
    layer = make_layer(width=width, **VARIANTS[variant]).cuda()
    return layer, make_inputs(num_nodes, edges, copies, width), num_nodes, edges


def in_float32(layer: nn.Module, given: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    return layer.float(), cast(given, torch.float32)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_atoms", [13, 5, 400])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("variant", VARIANTS)
def test_production_size(variant: str, width: int, num_atoms: int, precision: str) -> None:
    """64 molecules (8 of the largest) times 8 copies, values and every gradient, twice the same."""
    count = 64 if num_atoms < 100 else 8
    layer, given, *graph = production(variant, num_atoms, count=count, copies=8, width=width)
    expected = values(published, layer, given, *graph)
    layer, given = in_float32(layer, given)
    options = {"backend": "triton", "precision": precision, "max_nodes": num_atoms}
    once, again = (values(ours, layer, given, *graph, **options) for _ in range(2))
    for key, value in expected.items():
        assert torch.equal(once[key], again[key]), key
        scale = max(value.norm().item(), 1e-2)
        error = (once[key].double() - value).norm().item() / scale
        assert error <= BOUNDS[precision], (key, error)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("num_atoms", [13, 148, 370])
@pytest.mark.parametrize("variant", ["egnn", "sage", "gcn"])
def test_both_forms(variant: str, num_atoms: int, precision: str) -> None:
    """The same bits, whichever form the batch leads to; 1: taken whole, None: in tiles."""
    layer, given, *graph = production(variant, num_atoms, count=4, copies=2, width=96)
    layer, given = in_float32(layer, given)
    options = {"backend": "triton", "precision": precision}
    with torch.no_grad():
        whole, tiles = (ours(layer, given, *graph, max_nodes=n, **options) for n in (1, None))
    assert torch.equal(whole, tiles)


@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_a_side_stream(variant: str) -> None:
    """Inputs appear late on the side stream; a launch elsewhere would read what was there."""
    layer, given, *graph = production(variant, 13, count=64, copies=8, width=64)
    layer, given = in_float32(layer, given)
    options: dict[str, Any] = {"backend": "triton", "max_nodes": 13}
    expected = values(ours, layer, given, *graph, **options)
    late = {key: torch.full_like(value, 0.5) for key, value in given.items()}
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(75_000_000)  # cycles: 0.05 s
        for key, value in given.items():
            late[key].copy_(value)
        found = values(ours, layer, late, *graph, **options)
    side.synchronize()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture
def large_memory() -> Iterator[None]:
    """60 GB, which other processes may want afterwards."""
    if torch.cuda.mem_get_info()[0] < 60e9:
        pytest.xfail("60 GB of GPU memory are not free; offsets beyond 32 bits stay unverified")
    yield
    torch.cuda.empty_cache()


@pytest.mark.parametrize(("variant", "whole"), [("egnn", True), ("egnn", False), ("sage", True)])
def test_offsets_beyond_32_bits(variant: str, whole: bool, large_memory: None) -> None:
    """More than 2^31 values of h: the last molecule's are those it has alone."""
    count, num_atoms, copies, width = 215_000, 13, 8, 96
    assert count * num_atoms * copies * width > 2**31
    num_nodes, (row, col) = molecules(count, num_atoms)
    edges = (row.cuda(), col.cuda())
    layer = make_layer(width=width, **VARIANTS[variant]).float().cuda()
    rows = copies * num_nodes
    given = {
        "x": torch.randn(rows, 3, device="cuda"),
        "v": torch.randn(rows, 3, device="cuda"),
        "h": torch.randn(rows, width, device="cuda"),
        "edge_fea": torch.randn(len(row), 3, device="cuda"),
    }
    options = {"backend": "triton", "max_nodes": 1 if whole else None}
    with torch.no_grad():
        out = ours(layer, given, num_nodes, edges, **options)
        last = {key: given[key][-num_atoms:] for key in ("x", "v", "h")}
        inside = row >= num_nodes - num_atoms  # rings share no node
        last["edge_fea"] = given["edge_fea"][inside.cuda()]
        _, ring = molecules(1, num_atoms)
        alone = ours(layer, last, num_atoms, (ring[0].cuda(), ring[1].cuda()), **options)
    assert torch.equal(out[-num_atoms:], alone)
