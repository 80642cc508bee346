"""Backward of the EGNN layer in three steps; formulas, ownership and cost: `egnn_layer`."""

import triton
import triton.language as tl

from gfnode_fast.kernels.egnn_layer import MAX_DISPLACEMENT
from gfnode_fast.kernels.egnn_messages import distance
from gfnode_fast.kernels.feature_tiles import (
    activate_with_slope,
    add_column_sums,
    add_outer,
    dot,
    linear_tile,
    load_columns,
    load_tile,
    product_tile,
    store_tile,
)
from gfnode_fast.kernels.graph_tiles import (
    edges_of_nodes,
    feature_columns,
    feature_weights,
    load_point,
    row_of_copy,
    split_products,
    summand_tile,
)
from gfnode_fast.kernels.integers import BATCH_SIZES


@triton.jit(do_not_specialize=BATCH_SIZES)
def _egnn_node_bwd_kernel(
    grad_x_ptr,
    grad_h_ptr,
    v_ptr,
    h_ptr,
    messages_ptr,
    shift_ptr,
    row_start_ptr,
    message0_ptr,
    velocity0_ptr,
    velocity0_bias_ptr,
    velocity2_ptr,
    velocity2_bias_ptr,
    node0_ptr,
    node0_bias_ptr,
    node2_ptr,
    node_products_ptr,
    grad_hidden_ptr,
    active_ptr,
    grad_messages_ptr,
    grad_shift_ptr,
    grad_v_ptr,
    sums_ptr,
    num_nodes,
    num_rows,
    first_copy,
    first_message,
    stride_gh,
    stride_m0,
    width,
    hidden,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes P and Q, unless they are None, and columns 0 ... 2H of `grad_hidden` (rows, 4H), of
    node and velocity MLP.

    Rows are those of the copies taken together; the state and its gradients have all copies, the
    messages are those from row `first_message` on.
    sums: a row per program, to which are added the gradients of b_node0, b_velocity0, w_velocity2
    (hidden each), b_node2 (width), b_velocity2.
    """
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * (3 * hidden + width + 1)
    first_row = row_of_copy(first_copy, num_nodes)
    grad_x_ptr += first_row * 3
    grad_v_ptr += first_row * 3
    grad_h_ptr += first_row * stride_gh
    v_ptr += first_row * 3
    h_ptr += first_row * width
    messages_ptr += first_message.to(tl.int64) * width
    shift_ptr += first_row * 3
    offset = tl.load(velocity2_bias_ptr)
    grad_offset = tl.zeros((BLOCK_R,), offset.dtype)
    for tile in range(program, tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = row < num_rows
        if node_products_ptr is not None:
            split_products(
                h_ptr, node_products_ptr, message0_ptr + 1, stride_m0, row, mask, width, hidden,
                BLOCK_C, MODE,
            )  # fmt: skip
        grad_x = load_point(grad_x_ptr, row, mask)
        v = load_point(v_ptr, row, mask)
        grad_factor = grad_x[0] * v[0] + grad_x[1] * v[1] + grad_x[2] * v[2]
        grad_offset += grad_factor
        factor = tl.zeros((BLOCK_R,), offset.dtype) + offset
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = product_tile(
                h_ptr, row * width, mask, node0_ptr, c, 2 * width, 1, hidden, width, BLOCK_C, MODE
            )
            z += linear_tile(
                messages_ptr, row * width, mask, node0_ptr + width, 2 * width, node0_bias_ptr, c,
                hidden, width, BLOCK_C, MODE,
            )  # fmt: skip
            active, slope = activate_with_slope(z, SILU, MODE)
            store_tile(active_ptr, row * hidden, c, mask, hidden, active)
            grad = product_tile(
                grad_h_ptr, row * stride_gh, mask, node2_ptr, c, 1, hidden, hidden, width, BLOCK_C,
                MODE,
            )  # fmt: skip
            grad *= slope
            store_tile(grad_hidden_ptr, row * 4 * hidden, c, mask, hidden, grad)
            add_column_sums(sums_ptr, c, hidden, grad)

            z = linear_tile(
                h_ptr, row * width, mask, velocity0_ptr, width, velocity0_bias_ptr, c, hidden,
                width, BLOCK_C, MODE,
            )  # fmt: skip
            active, slope = activate_with_slope(z, SILU, MODE)
            weight = load_columns(velocity2_ptr, c, hidden)
            factor += tl.sum(active * weight, axis=1)
            grad = grad_factor[:, None] * weight * slope
            store_tile(grad_hidden_ptr + hidden, row * 4 * hidden, c, mask, hidden, grad)
            add_column_sums(sums_ptr + hidden, c, hidden, grad)
            add_column_sums(sums_ptr + 2 * hidden, c, hidden, grad_factor[:, None] * active)
        tl.debug_barrier()
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = product_tile(
                grad_hidden_ptr, row * 4 * hidden, mask, node0_ptr + width, c, 1, 2 * width, width,
                hidden, BLOCK_C, MODE,
            )  # fmt: skip
            store_tile(grad_messages_ptr, row * width, c, mask, width, grad)
            grad = load_tile(grad_h_ptr, row * stride_gh, c, mask, width)
            add_column_sums(sums_ptr + 3 * hidden, c, width, grad)
        _first, degree = edges_of_nodes(row_start_ptr, row % num_nodes, mask)
        count = tl.maximum(degree, 1).to(offset.dtype)
        shift = load_point(shift_ptr, row, mask)
        for axis in tl.static_range(3):
            tl.store(grad_v_ptr + row * 3 + axis, factor * grad_x[axis], mask=mask)
            mean = shift[axis] / count
            moved = (mean >= -MAX_DISPLACEMENT) & (mean <= MAX_DISPLACEMENT)
            passed = tl.where(moved, grad_x[axis] / count, 0.0)
            tl.store(grad_shift_ptr + row * 3 + axis, passed, mask=mask)
    to = sums_ptr + 3 * hidden + width
    tl.store(to, tl.load(to) + tl.sum(grad_offset, axis=0))


@triton.jit(do_not_specialize=BATCH_SIZES)
def _egnn_edge_bwd_kernel(
    x_ptr,
    node_products_ptr,
    edge_fea_ptr,
    order_ptr,
    row_ptr,
    col_ptr,
    message0_ptr,
    message0_bias_ptr,
    message2_ptr,
    message2_bias_ptr,
    coordinate0_ptr,
    coordinate0_bias_ptr,
    coordinate2_ptr,
    coordinate2_bias_ptr,
    grad_messages_ptr,
    grad_shift_ptr,
    grad_u_ptr,
    grad_r_ptr,
    sums_ptr,
    own_ptr,
    num_nodes,
    num_edges,
    first_copy,
    num_copies,
    stride_m0,
    width,
    hidden,
    depth,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes the gradients of u and r edge by edge.

    sums: a row per program, to which are added the gradients of W_2 (K, H), W_c (H, K), those by
    [q, e, 1] (H, BLOCK_D), b_2 (K), b_c and c (H each) and d.
    own: (programs, BLOCK_R, 3H + 3K), what lies between products.
    """
    program = tl.program_id(0).to(tl.int64)
    sums_ptr += program * (2 * hidden * width + hidden * BLOCK_D + width + 2 * hidden + 1)
    extra_ptr = sums_ptr + 2 * hidden * width
    bias_ptr = extra_ptr + hidden * BLOCK_D
    hidden_ptr = own_ptr + program * BLOCK_R * 3 * (hidden + width)
    slope_u_ptr = hidden_ptr + BLOCK_R * hidden
    grad_hidden_c_ptr = slope_u_ptr + BLOCK_R * hidden
    message_ptr = grad_hidden_c_ptr + BLOCK_R * hidden
    slope_ptr = message_ptr + BLOCK_R * width
    grad_y_ptr = slope_ptr + BLOCK_R * width
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
    d_index = tl.arange(0, BLOCK_D)
    p_index = tl.arange(0, BLOCK_P)
    offset = tl.load(coordinate2_bias_ptr)
    grad_offset = tl.zeros((BLOCK_R,), offset.dtype)
    tiles = tl.cdiv(num_edges, BLOCK_R)
    x_ptr += row_of_copy(first_copy, num_nodes) * 3
    for item in range(program, tiles * num_copies, tl.num_programs(0)):
        edge = (item // num_copies) * BLOCK_R + r_index
        live = edge < num_edges
        copy = item % num_copies
        base = copy * num_nodes
        target = base + tl.load(row_ptr + edge, mask=live, other=0)
        source = base + tl.load(col_ptr + edge, mask=live, other=0)
        x_i = load_point(x_ptr, target, live)
        r, q, _ = distance(x_i, load_point(x_ptr, source, live), NORM)
        features = feature_columns(edge_fea_ptr, order_ptr, edge, q, live, p_index, depth, MODE)
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            weights = feature_weights(
                message0_ptr, stride_m0, 1 + 2 * width, message0_bias_ptr, c, p_index, hidden,
                depth, MODE,
            )  # fmt: skip
            u = summand_tile(
                node_products_ptr, features, weights, target, source, live, c, hidden, MODE
            )  # fmt: skip
            active, slope = activate_with_slope(u, SILU, MODE)
            store_tile(hidden_ptr, r_index * hidden, c, every, hidden, active)
            store_tile(slope_u_ptr, r_index * hidden, c, every, hidden, slope)
        tl.debug_barrier()
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            y = linear_tile(
                hidden_ptr, r_index * hidden, every, message2_ptr, hidden, message2_bias_ptr, c,
                width, hidden, BLOCK_C, MODE,
            )  # fmt: skip
            m, slope = activate_with_slope(y, SILU, MODE)
            store_tile(message_ptr, r_index * width, c, every, width, m)
            store_tile(slope_ptr, r_index * width, c, every, width, slope)
        tl.debug_barrier()
        f = tl.zeros((BLOCK_R,), offset.dtype) + offset
        grad_shift = load_point(grad_shift_ptr, target, live)
        grad_f = r[0] * grad_shift[0] + r[1] * grad_shift[1] + r[2] * grad_shift[2]
        grad_offset += grad_f
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = linear_tile(
                message_ptr, r_index * width, every, coordinate0_ptr, width, coordinate0_bias_ptr,
                c, hidden, width, BLOCK_C, MODE,
            )  # fmt: skip
            active, slope = activate_with_slope(z, SILU, MODE)
            weight = load_columns(coordinate2_ptr, c, hidden)
            f += tl.sum(active * weight, axis=1)
            grad = grad_f[:, None] * weight * slope
            store_tile(grad_hidden_c_ptr, r_index * hidden, c, every, hidden, grad)
            add_column_sums(bias_ptr + width, c, hidden, grad)
            add_column_sums(bias_ptr + width + hidden, c, hidden, grad_f[:, None] * active)
        tl.debug_barrier()
        add_outer(
            sums_ptr + hidden * width, grad_hidden_c_ptr, r_index * hidden, hidden, message_ptr,
            r_index * width, width, every, BLOCK_C, MODE,
        )  # fmt: skip
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = product_tile(
                grad_hidden_c_ptr, r_index * hidden, every, coordinate0_ptr, c, 1, width, width,
                hidden, BLOCK_C, MODE,
            )  # fmt: skip
            grad += load_tile(grad_messages_ptr, target * width, c, live, width)
            grad *= load_tile(slope_ptr, r_index * width, c, every, width)
            store_tile(grad_y_ptr, r_index * width, c, every, width, grad)
            add_column_sums(bias_ptr, c, width, grad)
        tl.debug_barrier()
        add_outer(
            sums_ptr, grad_y_ptr, r_index * width, width, hidden_ptr, r_index * hidden, hidden,
            every, BLOCK_C, MODE,
        )  # fmt: skip
        at = copy * num_edges + edge
        grad_q = tl.zeros((BLOCK_R,), offset.dtype)
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            grad = product_tile(
                grad_y_ptr, r_index * width, every, message2_ptr, c, 1, hidden, hidden, width,
                BLOCK_C, MODE,
            )  # fmt: skip
            grad *= load_tile(slope_u_ptr, r_index * hidden, c, every, hidden)
            store_tile(grad_u_ptr, at * hidden, c, live, hidden, grad)
            weight = tl.load(message0_ptr + c * stride_m0, mask=c < hidden, other=0.0)
            grad_q += tl.sum(grad * weight[None, :], axis=1)
        tl.debug_barrier()
        # taken again rather than held: registers are short
        target = base + tl.load(row_ptr + edge, mask=live, other=0)
        source = base + tl.load(col_ptr + edge, mask=live, other=0)
        x_i = load_point(x_ptr, target, live)
        r, q, slope_q = distance(x_i, load_point(x_ptr, source, live), NORM)
        grad_shift = load_point(grad_shift_ptr, target, live)
        grad_q *= 2.0 * slope_q
        for axis in tl.static_range(3):
            grad_r = f * grad_shift[axis] + grad_q * r[axis]
            tl.store(grad_r_ptr + at * 3 + axis, grad_r, mask=live)
        features = feature_columns(edge_fea_ptr, order_ptr, edge, q, live, d_index, depth, "ieee")
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            inside = (c < hidden)[:, None] & live[None, :]
            grad = tl.load(grad_u_ptr + at[None, :] * hidden + c[:, None], inside, other=0.0)
            to = extra_ptr + c[:, None] * BLOCK_D + d_index[None, :]
            inside = (c < hidden)[:, None] & (d_index >= 0)[None, :]
            total = tl.load(to, mask=inside, other=0.0) + dot(grad, features, MODE)
            tl.store(to, total, mask=inside)
    to = bias_ptr + width + 2 * hidden
    tl.store(to, tl.load(to) + tl.sum(grad_offset, axis=0))


@triton.jit(do_not_specialize=BATCH_SIZES)
def _egnn_gather_bwd_kernel(
    grad_u_ptr,
    grad_r_ptr,
    grad_x_out_ptr,
    grad_hidden_ptr,
    grad_x_ptr,
    grad_h_ptr,
    row_start_ptr,
    source_start_ptr,
    source_edge_ptr,
    message0_ptr,
    velocity0_ptr,
    node0_ptr,
    num_nodes,
    num_edges,
    first_copy,
    stride_m0,
    width,
    hidden,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes columns 2H ... 4H of `grad_hidden`, of P and Q, and the gradients of x and h."""
    node = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = node < num_nodes
    first, degree = edges_of_nodes(row_start_ptr, node, mask)
    first_out, degree_out = edges_of_nodes(source_start_ptr, node, mask)
    copy = tl.program_id(1).to(tl.int64)
    edges = copy * num_edges
    row = copy * num_nodes + node
    first_row = row_of_copy(first_copy, num_nodes)
    grad_x_out_ptr += first_row * 3
    grad_x_ptr += first_row * 3
    grad_h_ptr += first_row * width
    most = tl.max(degree, axis=0)
    most_out = tl.max(degree_out, axis=0)
    last = num_edges - 1
    acc = grad_x_ptr.dtype.element_ty
    for start in range(0, hidden, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), acc)
        for k in range(0, most):
            at = edges + first + k
            total += load_tile(grad_u_ptr, at * hidden, c, k < degree, hidden)
        store_tile(grad_hidden_ptr + 2 * hidden, row * 4 * hidden, c, mask, hidden, total)
        total = tl.zeros((BLOCK_R, BLOCK_C), acc)
        for k in range(0, most_out):
            at = edges + tl.load(source_edge_ptr + tl.minimum(first_out + k, last))
            total += load_tile(grad_u_ptr, at * hidden, c, k < degree_out, hidden)
        store_tile(grad_hidden_ptr + 3 * hidden, row * 4 * hidden, c, mask, hidden, total)
    for axis in tl.static_range(3):
        total = tl.load(grad_x_out_ptr + row * 3 + axis, mask=mask, other=0.0)
        for k in range(0, most):
            at = edges + first + k
            total += tl.load(grad_r_ptr + at * 3 + axis, mask=k < degree, other=0.0)
        for k in range(0, most_out):
            at = edges + tl.load(source_edge_ptr + tl.minimum(first_out + k, last))
            total -= tl.load(grad_r_ptr + at * 3 + axis, mask=k < degree_out, other=0.0)
        tl.store(grad_x_ptr + row * 3 + axis, total, mask=mask)
    tl.debug_barrier()
    for start in range(0, width, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        at = row * 4 * hidden
        grad = product_tile(
            grad_hidden_ptr, at, mask, node0_ptr, c, 1, 2 * width, width, hidden, BLOCK_C, MODE
        )
        grad += product_tile(
            grad_hidden_ptr + hidden, at, mask, velocity0_ptr, c, 1, width, width, hidden, BLOCK_C,
            MODE,
        )  # fmt: skip
        for side in range(0, 2):
            grad += product_tile(
                grad_hidden_ptr + (2 + side) * hidden, at, mask, message0_ptr + 1 + side * width, c,
                1, stride_m0, width, hidden, BLOCK_C, MODE,
            )  # fmt: skip
        store_tile(grad_h_ptr, row * width, c, mask, width, grad)
