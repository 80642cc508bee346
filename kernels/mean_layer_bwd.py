"""Backward of GraphSAGE and GCN in two steps; formulas, ownership and cost: `mean_layer`."""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    activate_with_slope,
    add_column_sums,
    dot,
    load_tile,
    product_tile,
    store_tile,
)
from gfnode_fast.kernels.graph_tiles import (
    edges_of_nodes,
    feature_columns,
    feature_weights,
    nodes_of_item,
    row_of_copy,
    split_products,
    summand_tile,
)
from gfnode_fast.kernels.integers import BATCH_SIZES
from gfnode_fast.kernels.mean_layer import (
    load_state,
    mean_message,
    mean_of_neighbours,
    node_hidden,
    store_state,
)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_neighbours_kernel(
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
    col_ptr,
    edge0_ptr,
    edge0_bias_ptr,
    node_products_ptr,
    means_ptr,
    num_nodes,
    num_copies,
    stride_e0,
    width,
    hidden,
    depth,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """The means of act(u) again; a program owns a tile of nodes of one copy."""
    item = tl.program_id(0).to(tl.int64)
    first, last, base = nodes_of_item(None, item, num_nodes, num_copies, False, BLOCK_R)
    node = first + tl.arange(0, BLOCK_R)
    mask = node < last
    first_edge, degree = edges_of_nodes(row_start_ptr, node, mask)
    row = base + node
    mean_of_neighbours(
        node_products_ptr, edge_fea_ptr, order_ptr, col_ptr, edge0_ptr, stride_e0, edge0_bias_ptr,
        means_ptr, row * hidden, base, row, mask, first_edge, degree, width, hidden, depth, BLOCK_P,
        SILU, BLOCK_R, BLOCK_C, MODE,
    )  # fmt: skip


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_node_bwd_kernel(
    grad_x_ptr,
    grad_v_ptr,
    grad_h_ptr,
    state_ptr,
    means_ptr,
    row_start_ptr,
    edge0_ptr,
    edge2_ptr,
    edge2_bias_ptr,
    node0_ptr,
    node0_bias_ptr,
    node2_ptr,
    node_products_ptr,
    grad_state_ptr,
    message_ptr,
    active_ptr,
    grad_message_ptr,
    grad_hidden_ptr,
    grad_sum_ptr,
    sums_ptr,
    num_nodes,
    num_rows,
    first_copy,
    first_mean,
    stride_e0,
    width,
    hidden,
    hidden_n,
    SILU: tl.constexpr,
    CONCAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes P and Q, unless they are None, M, the node MLP's active layer; the gradients of c' in
    one piece, of M, of Σ act(u), and columns 2H ... of `grad_hidden` (rows, 2H + H_n), of the node
    MLP.

    Rows are those of the copies taken together; state and what flows in have all copies, the
    means are those from row `first_mean` on.
    sums: a row per program, to which are added the gradients of b_node0 (H_n), b_node2, b_2
    (width).
    """
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * (hidden_n + 2 * width)
    first_row = row_of_copy(first_copy, num_nodes)
    grad_x_ptr += first_row * 3
    grad_v_ptr += first_row * 3
    grad_h_ptr += first_row * (width - 6)
    state_ptr += first_row * width
    means_ptr += first_mean.to(tl.int64) * hidden
    stride_g = 2 * hidden + hidden_n
    for tile in range(program, tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = row < num_rows
        _first, degree = edges_of_nodes(row_start_ptr, row % num_nodes, mask)
        if node_products_ptr is not None:
            split_products(
                state_ptr, node_products_ptr, edge0_ptr, stride_e0, row, mask, width, hidden,
                BLOCK_C, MODE,
            )  # fmt: skip
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = load_state(grad_x_ptr, grad_v_ptr, grad_h_ptr, row, c, mask, width)
            store_tile(grad_state_ptr, row * width, c, mask, width, grad)
            add_column_sums(sums_ptr + hidden_n, c, width, grad)
            message = mean_message(
                means_ptr, row * hidden, mask, degree, edge2_ptr, edge2_bias_ptr, c, width, hidden,
                BLOCK_C, MODE,
            )  # fmt: skip
            store_tile(message_ptr, row * width, c, mask, width, message)
        tl.debug_barrier()
        for start in range(0, hidden_n, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = node_hidden(
                state_ptr, row, mask, message_ptr, row * width, mask, node0_ptr, node0_bias_ptr, c,
                width, hidden_n, CONCAT, BLOCK_C, MODE,
            )  # fmt: skip
            active, slope = activate_with_slope(z, SILU, MODE)
            store_tile(active_ptr, row * hidden_n, c, mask, hidden_n, active)
            grad = product_tile(
                grad_state_ptr, row * width, mask, node2_ptr, c, 1, hidden_n, hidden_n, width,
                BLOCK_C, MODE,
            )  # fmt: skip
            grad *= slope
            store_tile(grad_hidden_ptr + 2 * hidden, row * stride_g, c, mask, hidden_n, grad)
            add_column_sums(sums_ptr, c, hidden_n, grad)
        tl.debug_barrier()
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = product_tile(
                grad_hidden_ptr + 2 * hidden, row * stride_g, mask, node0_ptr + CONCAT * width, c,
                1, (1 + CONCAT) * width, width, hidden_n, BLOCK_C, MODE,
            )  # fmt: skip
            store_tile(grad_message_ptr, row * width, c, mask, width, grad)
            counted = tl.where((degree > 0)[:, None], grad, 0.0)
            add_column_sums(sums_ptr + hidden_n + width, c, width, counted)
        tl.debug_barrier()
        count = tl.maximum(degree, 1).to(grad_x_ptr.dtype.element_ty)
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = product_tile(
                grad_message_ptr, row * width, mask, edge2_ptr, c, 1, hidden, hidden, width,
                BLOCK_C, MODE,
            )  # fmt: skip
            store_tile(grad_sum_ptr, row * hidden, c, mask, hidden, grad / count[:, None])


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_edge_bwd_kernel(
    grad_state_ptr,
    grad_sum_ptr,
    node_products_ptr,
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
    row_ptr,
    col_ptr,
    source_start_ptr,
    source_edge_ptr,
    edge0_ptr,
    edge0_bias_ptr,
    node0_ptr,
    grad_hidden_ptr,
    grad_x_ptr,
    grad_v_ptr,
    grad_h_ptr,
    sums_ptr,
    num_nodes,
    first_copy,
    num_copies,
    stride_e0,
    width,
    hidden,
    hidden_n,
    depth,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
    CONCAT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes columns 0 ... 2H of `grad_hidden`, of P and Q, and the gradients of x, v and h.

    sums: a row per program, to which are added the gradients by [0, e, 1] (H, BLOCK_D).
    """
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * hidden * BLOCK_D
    first_row = row_of_copy(first_copy, num_nodes)
    grad_x_ptr += first_row * 3
    grad_v_ptr += first_row * 3
    grad_h_ptr += first_row * (width - 6)
    stride_g = 2 * hidden + hidden_n
    d_index = tl.arange(0, BLOCK_D)
    p_index = tl.arange(0, BLOCK_P)
    acc = grad_x_ptr.dtype.element_ty
    tiles = tl.cdiv(num_nodes, BLOCK_R)
    for item in range(program, tiles * num_copies, tl.num_programs(0)):
        node = (item // num_copies) * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = node < num_nodes
        base = (item % num_copies) * num_nodes
        row = base + node
        first, degree = edges_of_nodes(row_start_ptr, node, mask)
        first_out, degree_out = edges_of_nodes(source_start_ptr, node, mask)
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad_sum = load_tile(grad_sum_ptr, row * hidden, c, mask, hidden)
            total = tl.zeros((BLOCK_R, BLOCK_C), acc)
            extra = tl.zeros((BLOCK_C, BLOCK_D), acc)
            weights = feature_weights(
                edge0_ptr, stride_e0, 2 * width, edge0_bias_ptr, c, p_index, hidden, depth, MODE
            )  # fmt: skip
            for k in range(0, tl.max(degree, axis=0)):
                live = k < degree
                edge = first + k
                source = base + tl.load(col_ptr + edge, mask=live, other=0)
                features = feature_columns(
                    edge_fea_ptr, order_ptr, edge, None, live, p_index, depth, MODE
                )  # fmt: skip
                u = summand_tile(
                    node_products_ptr, features, weights, row, source, live, c, hidden, MODE,
                )  # fmt: skip
                _a, slope = activate_with_slope(u, SILU, MODE)
                grad = tl.where(live[:, None], grad_sum * slope, 0.0)
                total += grad
                features = feature_columns(
                    edge_fea_ptr, order_ptr, edge, None, live, d_index, depth, "ieee"
                )  # fmt: skip
                extra += dot(tl.trans(grad), features, MODE)
            store_tile(grad_hidden_ptr, row * stride_g, c, mask, hidden, total)
            to = sums_ptr + c[:, None] * BLOCK_D + d_index[None, :]
            inside = (c < hidden)[:, None] & (d_index >= 0)[None, :]
            tl.store(to, tl.load(to, mask=inside, other=0.0) + extra, mask=inside)
        # columns a second time: in one loop for both directions registers do not suffice
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            weights = feature_weights(
                edge0_ptr, stride_e0, 2 * width, edge0_bias_ptr, c, p_index, hidden, depth, MODE
            )  # fmt: skip
            total = tl.zeros((BLOCK_R, BLOCK_C), acc)
            for k in range(0, tl.max(degree_out, axis=0)):
                live = k < degree_out
                edge = tl.load(source_edge_ptr + first_out + k, mask=live, other=0)
                target = base + tl.load(row_ptr + edge, mask=live, other=0)
                features = feature_columns(
                    edge_fea_ptr, order_ptr, edge, None, live, p_index, depth, MODE
                )  # fmt: skip
                u = summand_tile(
                    node_products_ptr, features, weights, target, row, live, c, hidden, MODE,
                )  # fmt: skip
                _a, slope = activate_with_slope(u, SILU, MODE)
                grad = load_tile(grad_sum_ptr, target * hidden, c, live, hidden)
                total += grad * slope
            store_tile(grad_hidden_ptr + hidden, row * stride_g, c, mask, hidden, total)
        tl.debug_barrier()
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = load_tile(grad_state_ptr, row * width, c, mask, width)
            for side in range(0, 2):
                grad += product_tile(
                    grad_hidden_ptr + side * hidden, row * stride_g, mask, edge0_ptr + side * width,
                    c, 1, stride_e0, width, hidden, BLOCK_C, MODE,
                )  # fmt: skip
            if CONCAT:
                grad += product_tile(
                    grad_hidden_ptr + 2 * hidden, row * stride_g, mask, node0_ptr, c, 1, 2 * width,
                    width, hidden_n, BLOCK_C, MODE,
                )  # fmt: skip
            store_state(grad_x_ptr, grad_v_ptr, grad_h_ptr, row, c, mask, width, grad)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_summand_bwd_kernel(
    grad_sum_ptr,
    node_products_ptr,
    edge_fea_ptr,
    order_ptr,
    row_ptr,
    col_ptr,
    edge0_ptr,
    edge0_bias_ptr,
    grad_edge_ptr,
    num_nodes,
    num_edges,
    num_copies,
    stride_e0,
    width,
    hidden,
    depth,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Adds the gradient of W_e e + b, summed over copies (E, H)."""
    edge = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = edge < num_edges
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = tl.load(row_ptr + edge, mask=mask, other=0)
    source = tl.load(col_ptr + edge, mask=mask, other=0)
    total = load_tile(grad_edge_ptr, edge * hidden, c, mask, hidden)
    p_index = tl.arange(0, BLOCK_P)
    features = feature_columns(edge_fea_ptr, order_ptr, edge, None, mask, p_index, depth, MODE)
    weights = feature_weights(
        edge0_ptr, stride_e0, 2 * width, edge0_bias_ptr, c, p_index, hidden, depth, MODE
    )  # fmt: skip
    for _ in range(0, num_copies):
        u = summand_tile(
            node_products_ptr, features, weights, target, source, mask, c, hidden, MODE,
        )  # fmt: skip
        _a, slope = activate_with_slope(u, SILU, MODE)
        total += load_tile(grad_sum_ptr, target * hidden, c, mask, hidden) * slope
        target += num_nodes
        source += num_nodes
    store_tile(grad_edge_ptr, edge * hidden, c, mask, hidden, total)
