"""Launchers of the EGNN layer: state of T copies (T*n, ...), edges of one copy sorted by row, their
features as the caller has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gfnode_fast.kernels.egnn_layer import _egnn_layer_fwd_kernel
from gfnode_fast.kernels.egnn_layer_bwd import (
    _egnn_edge_bwd_kernel,
    _egnn_gather_bwd_kernel,
    _egnn_node_bwd_kernel,
)
from gfnode_fast.kernels.egnn_messages import _egnn_messages_kernel
from gfnode_fast.kernels.launch import ceil_div, on_device_of
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

CHUNK = 128  # edges of which messages wait to be summed; a multiple of BLOCK_R
SPILLS = "120 bytes of stack at widths that 16 does not divide, with the least tile"


def launch_egnn_layer_fwd(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    max_nodes: int | None,
    precision: str,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns x', h', and for backward Σ m (T*n, K), with `recompute` (0,), and Σ r f (T*n, 3).

    neighbours: the fields of `gfnode_fast.ops.topology.Neighbours`. weights: four each of the
    message, coordinate, velocity and node MLP. max_nodes: of a molecule, if known.
    """
    order, row_start, row, col, _, _, block_start = neighbours
    (rows, width), message0, depth = h.shape, weights[0], edge_fea.shape[1]
    hidden, num_nodes = message0.shape[0], row_start.shape[0] - 1
    x_out, h_out = torch.empty_like(x), torch.empty_like(h)
    messages, shift = h.new_empty(0 if recompute else h.shape), torch.empty_like(x)
    if rows == 0:
        return x_out, h_out, messages, shift
    launched = tile(mode(h, precision))
    block_r, copies = launched["BLOCK_R"], rows // num_nodes
    whole, items = forward_items(h, block_start, num_nodes, copies, max_nodes, block_r)
    if whole:
        node_products = h.new_empty(rows, 2 * hidden)
    else:
        of_nodes = message0[:, 1 : 2 * width + 1]
        node_products = launch_row_linear(h, of_nodes, None, 2, hidden, precision)
    programs = num_programs(h, items * copies, PER_MULTIPROCESSOR)
    own = h.new_empty(programs, block_r * (hidden + width) + CHUNK * (width + 3))
    with on_device_of(h):
        _egnn_layer_fwd_kernel[(programs,)](
            x, v, h, edge_fea, order, row_start, row, col, block_start, *weights, x_out, h_out,
            None if recompute else messages, shift, node_products, own, num_nodes, items, copies,
            message0.stride(0), width, hidden, depth, NORM=norm, SILU=silu, WHOLE=whole,
            CHUNK=CHUNK, BLOCK_P=feature_blocks(depth)["BLOCK_P"], **launched,
        )  # fmt: skip
    return x_out, h_out, messages, shift


def launch_egnn_layer_bwd(
    grad_x_out: Tensor,
    grad_h_out: Tensor,
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    messages: Tensor,
    shift: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    precision: str,
    wants_edge_fea: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, v, h, edge_fea ((0,) unless wanted), and of the 16 weights end to end.

    grad_h_out: rows of any stride. messages: as forward returned them.
    """
    order, row_start, row, col, source_start, source_edge, _ = neighbours
    message0, velocity, node = weights[0], weights[8:12], weights[12:]
    (rows, width), num_nodes, num_edges = h.shape, row_start.shape[0] - 1, col.shape[0]
    hidden, depth, num_copies = message0.shape[0], edge_fea.shape[1], rows // max(num_nodes, 1)
    if rows == 0:
        return zero_gradients((x, v, h), edge_fea, weights, wants_edge_fea)
    blocks = feature_blocks(depth)
    block_d = blocks["BLOCK_D"]
    launched = tile(mode(h, precision)) | {"width": width, "hidden": hidden}
    launched["stride_m0"], block_r = message0.stride(0), launched["BLOCK_R"]

    grad_x, grad_v, grad_h = torch.empty_like(x), torch.empty_like(v), torch.empty_like(h)
    of_edges, of_nodes = hidden + 3, 7 * hidden + width + 3
    numbers = num_edges * of_edges + num_nodes * of_nodes
    copies = copies_together(num_copies, numbers * h.element_size())
    part = copies * num_nodes
    node_products, grad_hidden = h.new_empty(part, 2 * hidden), h.new_empty(part, 4 * hidden)
    active = h.new_empty(part, hidden)
    grad_messages, grad_shift = h.new_empty(part, width), h.new_empty(part, 3)
    grad_u = h.new_empty(copies * num_edges, hidden)
    grad_r = h.new_empty(copies * num_edges, 3)
    programs = num_programs(h, ceil_div(part, block_r), PER_MULTIPROCESSOR)
    edge_programs = num_programs(h, ceil_div(num_edges, block_r) * copies, PER_MULTIPROCESSOR)
    own = h.new_empty(edge_programs, block_r, 3 * (hidden + width))
    kept = messages.dim() == 2
    if not kept:
        messages = h.new_empty(part, width)
        tiles = ceil_div(num_nodes, block_r)
        message_programs = num_programs(h, tiles * copies, PER_MULTIPROCESSOR)
        own_messages = h.new_empty(message_programs, block_r * hidden + CHUNK * (width + 3))
    node_sums = h.new_zeros(programs, 3 * hidden + width + 1)
    edge_sums = h.new_zeros(edge_programs, hidden * (2 * width + block_d) + width + 2 * hidden + 1)
    outers: list[Tensor] = []
    grad_edge = h.new_zeros(num_edges, hidden) if wants_edge_fea else None
    for first in range(0, num_copies, copies):
        taken, first_row = min(copies, num_copies - first), first * num_nodes
        run, first_message = taken * num_nodes, first_row if kept else 0
        with on_device_of(h):
            if not kept:
                launch_row_linear(
                    h, message0[:, 1 : 2 * width + 1], None, 2, hidden, precision,
                    out=node_products[:run], first=first_row,
                )  # fmt: skip
                _egnn_messages_kernel[(message_programs,)](
                    x, edge_fea, order, row_start, row, col, *weights[:4], node_products, messages,
                    own_messages, num_nodes, first, taken, **launched, depth=depth, NORM=norm,
                    SILU=silu, CHUNK=CHUNK, BLOCK_P=blocks["BLOCK_P"],
                )  # fmt: skip
            _egnn_node_bwd_kernel[(programs,)](
                grad_x_out, grad_h_out, v, h, messages, shift, row_start, message0, *velocity,
                *node[:3], node_products if kept else None, grad_hidden, active, grad_messages,
                grad_shift, grad_v, node_sums, num_nodes, run, first, first_message,
                grad_h_out.stride(0), **launched, SILU=silu,
            )  # fmt: skip
            _egnn_edge_bwd_kernel[(edge_programs,)](
                x, node_products, edge_fea, order, row, col, *weights[:8], grad_messages,
                grad_shift, grad_u, grad_r, edge_sums, own, num_nodes, num_edges, first, taken,
                **launched, depth=depth, **blocks, NORM=norm, SILU=silu,
            )  # fmt: skip
            _egnn_gather_bwd_kernel[(ceil_div(num_nodes, block_r), taken)](
                grad_u, grad_r, grad_x_out, grad_hidden, grad_x, grad_h, row_start, source_start,
                source_edge, message0, velocity[0], node[0], num_nodes, num_edges, first,
                **launched,
            )  # fmt: skip
        pairs = [
            (Rows(grad_hidden), Rows(h, first_row)),
            (Rows(grad_hidden[:, :hidden]), Rows(messages, first_message)),
            (Rows(grad_h_out, first_row), Rows(active)),
        ]
        outers = add_outers(outers, launch_row_outers(pairs, run, precision))
        if grad_edge is not None:
            grad_edge += grad_u[: taken * num_edges].view(taken, num_edges, hidden).sum(0)

    of_h, of_messages, grad_node2 = outers
    of_node, of_velocity, of_row, of_col = of_h.split(hidden)
    of_node = torch.cat((of_node, of_messages), dim=1)
    grad_node0_bias, grad_velocity0_bias, grad_velocity2, grad_node2_bias, grad_velocity2_bias = (
        node_sums.sum(0).split([hidden, hidden, hidden, width, 1])
    )
    (
        grad_message2, grad_coordinate0, extra,
        grad_message2_bias, grad_coordinate0_bias, grad_coordinate2, grad_coordinate2_bias,
    ) = edge_sums.sum(0).split(
        [hidden * width, hidden * width, hidden * block_d, width, hidden, hidden, 1]
    )  # fmt: skip
    extra = extra.view(hidden, block_d)
    grad_fea = h.new_empty(0)
    if grad_edge is not None:
        turned = message0[:, 2 * width + 1 :].t()
        sorted_fea = launch_row_linear(grad_edge, turned, None, 1, depth, precision)
        grad_fea = torch.empty_like(sorted_fea).index_copy_(0, order, sorted_fea)
    of_weights = (
        torch.cat((extra[:, :1], of_row, of_col, extra[:, 1 : depth + 1]), dim=1),
        extra[:, depth + 1], grad_message2, grad_message2_bias,
        grad_coordinate0, grad_coordinate0_bias, grad_coordinate2, grad_coordinate2_bias,
        of_velocity, grad_velocity0_bias, grad_velocity2, grad_velocity2_bias,
        of_node, grad_node0_bias, grad_node2, grad_node2_bias,
    )  # fmt: skip
    flat = torch.cat([gradient.reshape(-1) for gradient in of_weights])
    return grad_x, grad_v, grad_h, grad_fea, flat


def aot_cases() -> list[AotCase]:
    """Widths that 16 divides, as 64 and 96, and any; the published 5 edge features."""
    layer: dict[str, object] = {"NORM": False, "SILU": True, **feature_blocks(5)}
    forward = {**layer, "CHUNK": CHUNK, "WHOLE": True}
    aligned = ("width", "hidden")
    cases = [
        aot_case(kernel, name, precision, more, aligned)
        for precision in MODES
        for kernel, name, more in (
            (_egnn_layer_fwd_kernel, "egnn_layer_fwd", forward),
            (_egnn_node_bwd_kernel, "egnn_node_bwd", layer),
            (_egnn_edge_bwd_kernel, "egnn_edge_bwd", layer),
            (_egnn_gather_bwd_kernel, "egnn_gather_bwd", layer),
            (_egnn_messages_kernel, "egnn_messages", forward),
        )
    ]
    # any width where it costs registers most; tiles: the same less a phase
    tiles, again = {**forward, "WHOLE": False}, {**forward, "messages_ptr": None}
    split = {**layer, "node_products_ptr": None}
    return [
        *cases,
        aot_case(_egnn_layer_fwd_kernel, "egnn_layer_fwd any width", "fp32", forward, ()),
        aot_case(_egnn_edge_bwd_kernel, "egnn_edge_bwd any width", "fp32", layer, (), SPILLS),
        aot_case(_egnn_layer_fwd_kernel, "egnn_layer_fwd tiles", "fp32", tiles, aligned),
        aot_case(_egnn_layer_fwd_kernel, "egnn_layer_fwd recompute", "fp32", again, aligned),
        aot_case(_egnn_node_bwd_kernel, "egnn_node_bwd recompute", "fp32", split, aligned),
    ]
