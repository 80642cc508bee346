"""Launchers of the sums over neighbours: node (T*n, 2H), edge (E, H), edges sorted by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gfnode_fast.kernels.edge_sum import (
    _edge_sum_bwd_edge_kernel,
    _edge_sum_bwd_kernel,
    _edge_sum_fwd_kernel,
)
from gfnode_fast.kernels.launch import ceil_div, on_device_of
from gfnode_fast.kernels.registry import AotCase
from gfnode_fast.kernels.row_products_launch import MODES, aot_case, mode, tile

BLOCK_R = 32


def _options(tensor: Tensor, silu: bool, precision: str) -> dict[str, Any]:
    return tile(mode(tensor, precision)) | {"BLOCK_R": BLOCK_R, "num_warps": 4, "SILU": silu}


def launch_edge_sum_fwd(
    node: Tensor, edge: Tensor, neighbours: Sequence[Tensor], silu: bool, precision: str
) -> Tensor:
    """Returns (T*n, H). neighbours: the fields of `gfnode_fast.ops.topology.Neighbours`."""
    order, row_start, _, col, _, _ = neighbours
    rows, hidden, num_nodes = node.shape[0], edge.shape[1], order.shape[0]
    out = node.new_empty(rows, hidden)
    if out.numel():
        options = _options(node, silu, precision)
        grid = ceil_div(num_nodes, BLOCK_R), rows // num_nodes, ceil_div(hidden, options["BLOCK_C"])
        with on_device_of(node):
            _edge_sum_fwd_kernel[grid](
                node, edge, order, row_start, col, out, num_nodes, hidden, **options
            )
    return out


def launch_edge_sum_bwd(
    grad: Tensor,
    node: Tensor,
    edge: Tensor,
    neighbours: Sequence[Tensor],
    silu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """grad (T*n, H) → gradients of node and edge."""
    order, row_start, row, col, source_start, source_edge = neighbours
    rows, hidden, num_nodes, num_edges = node.shape[0], edge.shape[1], order.shape[0], len(col)
    grad_node, grad_edge = node.new_empty(node.shape), edge.new_empty(edge.shape)
    if grad_node.numel():
        options, copies = _options(node, silu, precision), rows // num_nodes
        tiles = ceil_div(hidden, options["BLOCK_C"])
        with on_device_of(node):
            _edge_sum_bwd_kernel[(ceil_div(num_nodes, BLOCK_R), copies, tiles)](
                grad, node, edge, order, row_start, row, col, source_start, source_edge, grad_node,
                num_nodes, hidden, **options,
            )  # fmt: skip
            if num_edges:
                _edge_sum_bwd_edge_kernel[(ceil_div(num_edges, BLOCK_R), tiles)](
                    grad, node, edge, row, col, grad_edge, num_nodes, num_edges, copies, hidden,
                    **options,
                )  # fmt: skip
    else:
        grad_edge.zero_()
    return grad_node, grad_edge


def aot_cases() -> list[AotCase]:
    """The width is a run-time argument; GraphSAGE's and GCN's, 70 and 102, divide nothing."""
    return [
        aot_case(kernel, name, precision, {"BLOCK_R": BLOCK_R, "SILU": True}, ())
        for precision in MODES
        for kernel, name in (
            (_edge_sum_fwd_kernel, "edge_sum_fwd"),
            (_edge_sum_bwd_kernel, "edge_sum_bwd"),
            (_edge_sum_bwd_edge_kernel, "edge_sum_bwd_edge"),
        )
    ]
