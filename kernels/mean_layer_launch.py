"""Launchers of GraphSAGE and GCN: state of T copies (T*n, ...), edges of one copy sorted by
row, their features as the caller has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.kernels.launch import ceil_div, on_device_of
from gfnode_fast.kernels.mean_layer import _mean_layer_fwd_kernel
from gfnode_fast.kernels.mean_layer_bwd import (
    _mean_edge_bwd_kernel,
    _mean_neighbours_kernel,
    _mean_node_bwd_kernel,
    _mean_summand_bwd_kernel,
)
from gfnode_fast.kernels.registry import AotCase
from gfnode_fast.kernels.row_products_launch import (
    MODES,
    PER_MULTIPROCESSOR,
    Rows,
    add_outers,
    aot_case,
    copies_together,
    feature_blocks,
    forward_items,
    launch_row_linear,
    launch_row_outers,
    mode,
    num_programs,
    tile,
    zero_gradients,
)


def _launched(
    state: Tensor, edge_fea: Tensor, weights: Sequence[Tensor], concat: bool, precision: str
) -> dict[str, Any]:
    """What all kernels take, less what only some do."""
    edge0, node0 = weights[0], weights[4]
    return tile(mode(state, precision)) | {
        "stride_e0": edge0.stride(0),
        "width": weights[2].shape[0],
        "hidden": edge0.shape[0],
        "hidden_n": node0.shape[0],
        "depth": edge_fea.shape[1],
        "CONCAT": int(concat),
    }


def launch_mean_layer_fwd(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    concat: bool,
    silu: bool,
    max_nodes: int | None,
    precision: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns x', v', h', and for backward c (T*n, C) and the means of act(u) (T*n, H), with
    `recompute` (0,).

    neighbours: the fields of `gfnode_fast.ops.topology.Neighbours`. weights: four each of the edge
    and the node MLP. concat: GraphSAGE. max_nodes: of a molecule, if known.
    """
    order, row_start, _, col, _, _, block_start = neighbours
    launched = _launched(h, edge_fea, weights, concat, precision)
    width, hidden = launched["width"], launched["hidden"]
    (rows, _), num_nodes, edge0 = h.shape, row_start.shape[0] - 1, weights[0]
    out = torch.empty_like(x), torch.empty_like(v), torch.empty_like(h)
    state, means = h.new_empty(rows, width), h.new_empty(0 if recompute else (rows, hidden))
    if rows == 0:
        return *out, state, means
    copies, block_r = rows // num_nodes, launched["BLOCK_R"]
    whole, items = forward_items(h, block_start, num_nodes, copies, max_nodes, block_r)
    if whole:
        node_products = h.new_empty(rows, 2 * hidden)
    else:
        state = torch.cat((x, v, h), dim=1)
        node_products = launch_row_linear(state, edge0, None, 2, hidden, precision)
    programs = num_programs(h, items * copies, PER_MULTIPROCESSOR)
    own = h.new_empty(programs, block_r, width + launched["hidden_n"] + hidden)
    with on_device_of(h):
        _mean_layer_fwd_kernel[(programs,)](
            x, v, h, edge_fea, order, row_start, col, block_start, *weights, *out, state,
            None if recompute else means, node_products, own, num_nodes, items, copies, **launched,
            SILU=silu, WHOLE=whole, BLOCK_P=feature_blocks(launched["depth"])["BLOCK_P"],
        )  # fmt: skip
    return *out, state, means


def launch_mean_layer_bwd(
    grad_x_out: Tensor,
    grad_v_out: Tensor,
    grad_h_out: Tensor,
    edge_fea: Tensor,
    state: Tensor,
    means: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    concat: bool,
    silu: bool,
    precision: str,
    wants_edge_fea: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, v, h, edge_fea ((0,) unless wanted), and of the 8 weights end to end.

    means: as forward returned them.
    """
    order, row_start, row, col, source_start, source_edge, _ = neighbours
    edge0, edge0_bias, edge2, edge2_bias, node0, node0_bias, node2, _ = weights
    rows, num_nodes, num_edges = state.shape[0], row_start.shape[0] - 1, col.shape[0]
    if rows == 0:
        grads = grad_x_out, grad_v_out, grad_h_out
        return zero_gradients(grads, edge_fea, weights, wants_edge_fea)
    node = _launched(state, edge_fea, weights, concat, precision) | {"SILU": silu}
    width, hidden, hidden_n, depth = (node[k] for k in ("width", "hidden", "hidden_n", "depth"))
    edge = node | feature_blocks(depth)
    summand = {key: edge[key] for key in edge if key not in ("CONCAT", "hidden_n", "BLOCK_D")}
    del node["depth"]
    num_copies, block_r, block_d = rows // num_nodes, node["BLOCK_R"], edge["BLOCK_D"]

    grad_x, grad_v = torch.empty_like(grad_x_out), torch.empty_like(grad_v_out)
    grad_h = torch.empty_like(grad_h_out)
    numbers = num_nodes * (5 * hidden + 3 * width + 2 * hidden_n)
    copies = copies_together(num_copies, numbers * state.element_size())
    part = copies * num_nodes
    node_products, grad_sum = state.new_empty(part, 2 * hidden), state.new_empty(part, hidden)
    grad_state, message, grad_message = (state.new_empty(part, width) for _ in range(3))
    active, grad_hidden = (state.new_empty(part, n) for n in (hidden_n, 2 * hidden + hidden_n))
    programs = num_programs(state, ceil_div(part, block_r), PER_MULTIPROCESSOR)
    node_sums = state.new_zeros(programs, hidden_n + 2 * width)
    tiles = ceil_div(num_nodes, block_r) * copies
    edge_programs = num_programs(state, tiles, PER_MULTIPROCESSOR)
    edge_sums = state.new_zeros(edge_programs, hidden * block_d)
    kept = means.dim() == 2
    if not kept:
        means = state.new_empty(part, hidden)
    outers: list[Tensor] = []
    grad_edge = state.new_zeros(num_edges, hidden) if wants_edge_fea else None
    of_edges = ceil_div(num_edges, block_r), ceil_div(hidden, edge["BLOCK_C"])
    for first in range(0, num_copies, copies):
        taken, first_row = min(copies, num_copies - first), first * num_nodes
        run, first_mean = taken * num_nodes, first_row if kept else 0
        with on_device_of(state):
            if not kept:
                launch_row_linear(
                    state, edge0, None, 2, hidden, precision, out=node_products[:run],
                    first=first_row,
                )  # fmt: skip
                _mean_neighbours_kernel[(ceil_div(num_nodes, block_r) * taken,)](
                    edge_fea, order, row_start, col, edge0, edge0_bias, node_products, means,
                    num_nodes, taken, **summand,
                )  # fmt: skip
            _mean_node_bwd_kernel[(programs,)](
                grad_x_out, grad_v_out, grad_h_out, state, means, row_start, edge0, edge2,
                edge2_bias, node0, node0_bias, node2, node_products if kept else None, grad_state,
                message, active, grad_message, grad_hidden, grad_sum, node_sums, num_nodes, run,
                first, first_mean, **node,
            )  # fmt: skip
            _mean_edge_bwd_kernel[(edge_programs,)](
                grad_state, grad_sum, node_products, edge_fea, order, row_start, row, col,
                source_start, source_edge, edge0, edge0_bias, node0, grad_hidden, grad_x, grad_v,
                grad_h, edge_sums, num_nodes, first, taken, **edge,
            )  # fmt: skip
            if grad_edge is not None and num_edges:
                _mean_summand_bwd_kernel[of_edges](
                    grad_sum, node_products, edge_fea, order, row, col, edge0, edge0_bias,
                    grad_edge, num_nodes, num_edges, taken, **summand,
                )  # fmt: skip
        pairs = [
            (Rows(grad_hidden), Rows(state, first_row)),
            (Rows(grad_hidden[:, 2 * hidden :]), Rows(message)),
            (Rows(grad_state), Rows(active)),
            (Rows(grad_message), Rows(means, first_mean)),
        ]
        outers = add_outers(outers, launch_row_outers(pairs, run, precision))

    grad_fea = state.new_empty(0)
    if grad_edge is not None:
        turned = edge0[:, 2 * width :].t()
        sorted_fea = launch_row_linear(grad_edge, turned, None, 1, depth, precision)
        grad_fea = torch.empty_like(sorted_fea).index_copy_(0, order, sorted_fea)
    of_state, of_message, grad_node2, grad_edge2 = outers
    of_row, of_col, of_node = of_state.split([hidden, hidden, hidden_n])
    extra = edge_sums.sum(0).view(hidden, block_d)
    grad_node0_bias, grad_node2_bias, grad_edge2_bias = node_sums.sum(0).split(
        [hidden_n, width, width]
    )
    of_weights = (
        torch.cat((of_row, of_col, extra[:, 1 : depth + 1]), dim=1), extra[:, depth + 1],
        grad_edge2, grad_edge2_bias,
        torch.cat((of_node, of_message), dim=1) if concat else of_message, grad_node0_bias,
        grad_node2, grad_node2_bias,
    )  # fmt: skip
    flat = torch.cat([gradient.reshape(-1) for gradient in of_weights])
    return grad_x, grad_v, grad_h, grad_fea, flat


def aot_cases() -> list[AotCase]:
    """The widths of GraphSAGE and GCN, 70 and 102, divide nothing; GCN takes less of the same."""
    layer: dict[str, object] = {"SILU": True, "CONCAT": 1, "WHOLE": True, **feature_blocks(5)}
    kernels = {
        "mean_layer_fwd": _mean_layer_fwd_kernel,
        "mean_node_bwd": _mean_node_bwd_kernel,
        "mean_edge_bwd": _mean_edge_bwd_kernel,
        "mean_summand_bwd": _mean_summand_bwd_kernel,
        "mean_neighbours": _mean_neighbours_kernel,
    }
    cases = [
        aot_case(kernel, name, precision, layer, ())
        for precision in MODES
        for name, kernel in kernels.items()
    ]
    # the same less a phase
    tiles, again = {**layer, "WHOLE": False}, {**layer, "means_ptr": None}
    split = {**layer, "node_products_ptr": None}
    return [
        *cases,
        aot_case(_mean_layer_fwd_kernel, "mean_layer_fwd tiles", "fp32", tiles, ()),
        aot_case(_mean_layer_fwd_kernel, "mean_layer_fwd recompute", "fp32", again, ()),
        aot_case(_mean_node_bwd_kernel, "mean_node_bwd recompute", "fp32", split, ()),
    ]
