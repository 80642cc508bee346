"""Messages of EGNN's edges, summed over neighbours: in forward, and again in backward where forward
kept no sums. Formulas, ownership and cost: `egnn_layer`."""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    activate,
    linear_tile,
    load_columns,
    load_tile,
    store_tile,
)
from gfnode_fast.kernels.graph_tiles import (
    edges_of_nodes,
    feature_columns,
    feature_weights,
    load_point,
    nodes_of_item,
    row_of_copy,
    store_point,
    summand_tile,
)
from gfnode_fast.kernels.integers import BATCH_SIZES

NORM_EPSILON = tl.constexpr(1e-12)


@triton.jit
def distance(x_i, x_j, NORM: tl.constexpr):
    """r, q and dq/d|r|²."""
    r = (x_i[0] - x_j[0], x_i[1] - x_j[1], x_i[2] - x_j[2])
    q = r[0] * r[0] + r[1] * r[1] + r[2] * r[2]
    if NORM:
        small = q < NORM_EPSILON
        slope = small.to(q.dtype) / NORM_EPSILON
        q = q / tl.where(small, NORM_EPSILON, q)
    else:
        slope = tl.full(q.shape, 1.0, q.dtype)
    return r, q, slope


@triton.jit
def sum_messages(
    x_ptr,
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
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
    node_products_ptr,
    sums_ptr,
    sums_at,
    own_ptr,
    start,
    last,
    base,
    stride_m0,
    width,
    hidden,
    depth,
    MOVE: tl.constexpr,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Writes Σ m of the nodes from `start` to before `last`, a tile of a copy whose first row is
    `base`, to rows that begin `sums_at`; returns Σ r f, which is 0 unless MOVE.

    own: BLOCK_R hidden + CHUNK (width + 3) numbers; ends with a barrier.
    """
    message_ptr = own_ptr + BLOCK_R * hidden
    moved_ptr = message_ptr + CHUNK * width
    p_index = tl.arange(0, BLOCK_P)
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
    node = start + r_index
    mask = node < last
    acc = x_ptr.dtype.element_ty
    first_edge, degree = edges_of_nodes(row_start_ptr, node, mask)
    shift_x = tl.zeros((BLOCK_R,), acc)
    shift_y = tl.zeros((BLOCK_R,), acc)
    shift_z = tl.zeros((BLOCK_R,), acc)
    for column in range(0, width, BLOCK_C):
        c = column + tl.arange(0, BLOCK_C)
        nothing = tl.zeros((BLOCK_R, BLOCK_C), acc)
        store_tile(sums_ptr, sums_at, c, mask, width, nothing)
    edges_end = tl.load(row_start_ptr + tl.minimum(start + BLOCK_R, last))
    for chunk in range(tl.load(row_start_ptr + start), edges_end, CHUNK):
        chunk_end = tl.minimum(chunk + CHUNK, edges_end)
        for edge_start in range(chunk, chunk_end, BLOCK_R):
            edge = edge_start + r_index
            live = edge < chunk_end
            at = edge - chunk
            target = base + tl.load(row_ptr + edge, mask=live, other=0)
            source = base + tl.load(col_ptr + edge, mask=live, other=0)
            x_i = load_point(x_ptr, target, live)
            r, q, _ = distance(x_i, load_point(x_ptr, source, live), NORM)
            features = feature_columns(edge_fea_ptr, order_ptr, edge, q, live, p_index, depth, MODE)
            for column in range(0, hidden, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                weights = feature_weights(
                    message0_ptr, stride_m0, 1 + 2 * width, message0_bias_ptr, c, p_index, hidden,
                    depth, MODE,
                )  # fmt: skip
                u = summand_tile(
                    node_products_ptr, features, weights, target, source, live, c, hidden, MODE
                )  # fmt: skip
                store_tile(own_ptr, r_index * hidden, c, every, hidden, activate(u, SILU, MODE))
            tl.debug_barrier()
            for column in range(0, width, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                m = linear_tile(
                    own_ptr, r_index * hidden, every, message2_ptr, hidden, message2_bias_ptr, c,
                    width, hidden, BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(message_ptr, at * width, c, every, width, activate(m, SILU, MODE))
            tl.debug_barrier()
            if MOVE:
                f = tl.zeros((BLOCK_R,), acc) + tl.load(coordinate2_bias_ptr)
                for column in range(0, hidden, BLOCK_C):
                    c = column + tl.arange(0, BLOCK_C)
                    z = linear_tile(
                        message_ptr, at * width, every, coordinate0_ptr, width,
                        coordinate0_bias_ptr, c, hidden, width, BLOCK_C, MODE,
                    )  # fmt: skip
                    z = activate(z, SILU, MODE)
                    f += tl.sum(z * load_columns(coordinate2_ptr, c, hidden), axis=1)
                store_point(moved_ptr, at, (r[0] * f, r[1] * f, r[2] * f), every)
        tl.debug_barrier()
        from_edge = tl.maximum(first_edge, chunk)
        count = tl.minimum(first_edge + degree, chunk_end) - from_edge
        most = tl.max(tl.where(mask, count, 0), axis=0)
        at = from_edge - chunk
        if MOVE:
            for k in range(0, most):
                moved = load_point(moved_ptr, at + k, mask & (k < count))
                shift_x += moved[0]
                shift_y += moved[1]
                shift_z += moved[2]
        for column in range(0, width, BLOCK_C):
            c = column + tl.arange(0, BLOCK_C)
            total = load_tile(sums_ptr, sums_at, c, mask, width)
            for k in range(0, most):
                here = mask & (k < count)
                total += load_tile(message_ptr, (at + k) * width, c, here, width)
            store_tile(sums_ptr, sums_at, c, mask, width, total)
        tl.debug_barrier()
    tl.debug_barrier()
    return shift_x, shift_y, shift_z


@triton.jit(do_not_specialize=BATCH_SIZES)
def _egnn_messages_kernel(
    x_ptr,
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
    row_ptr,
    col_ptr,
    message0_ptr,
    message0_bias_ptr,
    message2_ptr,
    message2_bias_ptr,
    node_products_ptr,
    messages_ptr,
    own_ptr,
    num_nodes,
    first_copy,
    num_copies,
    stride_m0,
    width,
    hidden,
    depth,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """Σ m of the copies taken together, in tiles of nodes; x has all copies.

    own: (programs, BLOCK_R hidden + CHUNK (width + 3)), as in `sum_messages`.
    """
    program = tl.program_id(0).to(tl.int64)
    own_ptr += program * (BLOCK_R * hidden + CHUNK * (width + 3))
    x_ptr += row_of_copy(first_copy, num_nodes) * 3
    for item in range(program, tl.cdiv(num_nodes, BLOCK_R) * num_copies, tl.num_programs(0)):
        first, last, base = nodes_of_item(None, item, num_nodes, num_copies, False, BLOCK_R)
        at = (base + first + tl.arange(0, BLOCK_R)) * width
        sum_messages(
            x_ptr, edge_fea_ptr, order_ptr, row_start_ptr, row_ptr, col_ptr, message0_ptr,
            message0_bias_ptr, message2_ptr, message2_bias_ptr, None, None, None, None,
            node_products_ptr, messages_ptr, at, own_ptr, first, last, base, stride_m0, width,
            hidden, depth, False, NORM, SILU, CHUNK, BLOCK_P, BLOCK_R, BLOCK_C, MODE,
        )  # fmt: skip
