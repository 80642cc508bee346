"""Whole molecules or tiles of nodes: which form of the Triton graph layers is launched when."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gfnode_fast.ops.topology import topology
from graph_layer_cases import (
    VARIANTS,
    cast,
    edges_of,
    make_inputs,
    make_layer,
    odd,
    ours,
    ragged,
)
from op_checks import strided

pytest.importorskip("triton", reason="triton is not installed on this platform")


def test_kernels_get_dense_neighbours() -> None:
    built = topology(*ragged()[1], 20)
    sparse = replace(built, **{n: strided(getattr(built, n)) for n in ("row", "col", "row_start")})
    assert not sparse.row.is_contiguous()
    for mine, dense in zip(sparse.neighbours, built.neighbours, strict=True):
        assert mine.is_contiguous()
        assert torch.equal(mine, dense)


def test_blocks_hold_whole_molecules() -> None:
    """Found from the edges alone, as `max_nodes` is only believed for the choice of a form."""
    for num_nodes, edges in (ragged(), edges_of("crossing molecules"), odd(), edges_of("empty")):
        built = topology(*edges, num_nodes)
        start = built.neighbours.block_start
        assert start[-1] == num_nodes
        assert (start.diff() >= 0).all()
        block = torch.searchsorted(start, torch.arange(num_nodes), right=True)
        assert torch.equal(block[built.row], block[built.col])
    assert topology(*ragged()[1], 20).neighbours.block_start.tolist() == [0, 18, 20]
    num_nodes, edges = ragged(LARGE)  # a molecule that ends where the fourth tile begins
    assert topology(*edges, num_nodes).neighbours.block_start.tolist() == [
        0,
        70,
        89,
        91,
        91,
        91,
        91,
    ]


LARGE = (2, 68, 1, 18, 2)


@pytest.mark.parametrize(
    ("variant", "launches"),
    [
        ("egnn", ["_row_linear_kernel", "_egnn_layer_fwd_kernel"]),
        ("sage", ["_row_linear_kernel", "_mean_layer_fwd_kernel"]),
    ],
)
def test_both_forms_give_the_same_bits(
    variant: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a molecule's answer does not depend on its batch, which decides on the form."""
    launched = record_launches(monkeypatch)
    num_nodes, edges = ragged(LARGE)
    layer = make_layer(width=5, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 5), torch.float32)
    with torch.no_grad():
        whole = ours(layer, given, num_nodes, edges, backend="triton", max_nodes=68)
        assert launched == launches[1:]
        tiles = ours(layer, given, num_nodes, edges, backend="triton", max_nodes=None)
        assert launched == launches[1:] + launches
        assert torch.equal(whole, tiles)
        launched.clear()
        alone = {key: value[2:70] for key, value in given.items()}
        own = (edges[0] >= 2) & (edges[0] < 70)
        alone["edge_fea"] = given["edge_fea"][own]
        ends = tuple(end[own] - 2 for end in edges)
        large = ours(layer, alone, 68, ends, backend="triton", max_nodes=68)
    assert launched == launches  # one molecule does not fill two programs
    assert torch.equal(large, whole[2:70])


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the entry kernels of the graph layers, as they are launched."""
    from gfnode_fast.kernels import egnn_layer_launch, mean_layer_launch, row_products_launch
    from gfnode_fast.kernels.registry import unwrap

    launched: list[str] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.name = kernel, unwrap(kernel).__name__

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for module in (egnn_layer_launch, mean_layer_launch, row_products_launch):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorded(value))
    return launched


@pytest.mark.parametrize(
    ("num_atoms", "batch", "copies", "whole"),
    [
        (13, 1, 1, True),  # a block is as small as a tile
        (13, 4096, 8, True),
        (400, 33, 8, True),
        (370, 50, 8, True),
        (370, 16, 8, False),  # 128 programs, where 264 run at once
        (148, 50, 1, False),
        (148, 264, 1, True),
    ],
)
def test_molecules_are_taken_whole_where_they_fill_the_gpu(
    num_atoms: int, batch: int, copies: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """132 multiprocessors, as an H200 has."""
    from gfnode_fast.kernels import row_products_launch

    monkeypatch.setattr(row_products_launch, "INTERPRETED_PROGRAMS", 2 * 132)
    num_nodes = num_atoms * batch
    blocks = -(-num_nodes // 16)
    starts = torch.empty(blocks + 1)
    given = starts, starts, num_nodes, copies
    assert row_products_launch.forward_items(*given, num_atoms, 16) == (whole, blocks)
    assert row_products_launch.forward_items(*given, None, 32) == (False, -(-num_nodes // 32))
