"""A GraphSAGE or GCN layer on T copies of a graph: forward in one launch, backward in two steps.

    c = [x, v, h];  u = P_i + Q_j + W_e e + b;  a_i = mean_j act(u);  M_i = W_2 a_i + b_2
    c_i' = c_i + node([c_i, M_i])  (GraphSAGE, CONCAT)  or  c_i + node(M_i)  (GCN)

M_i is 0 for a node without edges. The second linear of the edge MLP is taken after the mean, so
no product is left edge by edge, and an edge costs H activations for 4 H to 8 H bytes, mostly from
the caches: u is taken again whenever it is wanted, and never stored.

forward: who owns what, and WHOLE, as in `egnn_layer`. A tile takes one edge of each node at a
    time: with no product behind it, an edge that is not there costs little. c is kept for
    backward, a unless it is to be taken again. Not WHOLE, c, P and Q come from launches of their
    own.
backward 1, `node`: from the gradient of c' those of a, and of the hidden layer of the node MLP; P
    and Q again. Where a was not kept `row_linear` takes P and Q and `neighbours` a before.
backward 2, `edge`: the gradient of u, by destination for P, by source for Q, and then that of c.
    In one launch with step 1 it would have to wait for the nodes of other tiles; what the two
    hand on are rows of nodes, which a launch costs little to read again.

Gradients of the edge features, where they are wanted, take u a third time, edge by edge over all
copies. Weights: as in `egnn_layer`; those by [e, 1] as one product, the others by `row_outer`.

No atomics; every sum has a fixed order. 64-bit addresses.
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    activate,
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
    nodes_of_item,
    split_products,
    summand_tile,
)
from gfnode_fast.kernels.integers import BATCH_SIZES


@triton.jit
def load_state(x_ptr, v_ptr, h_ptr, row, c, mask_r, width):
    """Columns c of [x, v, h]."""
    of_x = mask_r[:, None] & (c < 3)[None, :]
    of_v = mask_r[:, None] & ((c >= 3) & (c < 6))[None, :]
    of_h = mask_r[:, None] & ((c >= 6) & (c < width))[None, :]
    r, c = row[:, None], c[None, :]
    value = tl.load(x_ptr + r * 3 + c, mask=of_x, other=0.0)
    value += tl.load(v_ptr + r * 3 + c - 3, mask=of_v, other=0.0)
    return value + tl.load(h_ptr + r * (width - 6) + c - 6, mask=of_h, other=0.0)


@triton.jit
def store_state(x_ptr, v_ptr, h_ptr, row, c, mask_r, width, value):
    """What `load_state` reads."""
    of_x = mask_r[:, None] & (c < 3)[None, :]
    of_v = mask_r[:, None] & ((c >= 3) & (c < 6))[None, :]
    of_h = mask_r[:, None] & ((c >= 6) & (c < width))[None, :]
    r, c = row[:, None], c[None, :]
    tl.store(x_ptr + r * 3 + c, value, mask=of_x)
    tl.store(v_ptr + r * 3 + c - 3, value, mask=of_v)
    tl.store(h_ptr + r * (width - 6) + c - 6, value, mask=of_h)


@triton.jit
def mean_of_neighbours(
    node_products_ptr, edge_fea_ptr, order_ptr, col_ptr, edge0_ptr, stride_e0, edge0_bias_ptr,
    means_ptr, means_at, base, row, mask, first_edge, degree, width, hidden, depth,
    BLOCK_P: tl.constexpr, SILU: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Writes the mean of act(u) of a tile of nodes to rows that begin `means_at`."""
    p_index = tl.arange(0, BLOCK_P)
    acc = means_ptr.dtype.element_ty
    count = tl.maximum(degree, 1).to(acc)
    for column in range(0, hidden, BLOCK_C):
        c = column + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_C), acc)
        weights = feature_weights(
            edge0_ptr, stride_e0, 2 * width, edge0_bias_ptr, c, p_index, hidden, depth, MODE
        )  # fmt: skip
        for k in range(0, tl.max(degree, axis=0)):
            live = k < degree
            edge = first_edge + k
            source = base + tl.load(col_ptr + edge, mask=live, other=0)
            features = feature_columns(
                edge_fea_ptr, order_ptr, edge, None, live, p_index, depth, MODE
            )  # fmt: skip
            u = summand_tile(
                node_products_ptr, features, weights, row, source, live, c, hidden, MODE
            )  # fmt: skip
            total += tl.where(live[:, None], activate(u, SILU, MODE), 0.0)
        store_tile(means_ptr, means_at, c, mask, hidden, total / count[:, None])


@triton.jit
def mean_message(
    means_ptr, at, mask, degree, edge2_ptr, edge2_bias_ptr, c, width, hidden,
    BLOCK_C: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Columns c of M."""
    message = product_tile(
        means_ptr, at, mask, edge2_ptr, c, hidden, 1, width, hidden, BLOCK_C, MODE
    )
    bias = load_columns(edge2_bias_ptr, c, width)
    return message + tl.where((degree > 0)[:, None], bias, 0.0)


@triton.jit
def node_hidden(
    state_ptr, row, mask, message_ptr, at, live, node0_ptr, node0_bias_ptr, c, width, num_n,
    CONCAT: tl.constexpr, BLOCK_C: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Columns c of the node MLP's hidden layer, not activated."""
    stride = (1 + CONCAT) * width
    z = linear_tile(
        message_ptr, at, live, node0_ptr + CONCAT * width, stride, node0_bias_ptr, c, num_n, width,
        BLOCK_C, MODE,
    )  # fmt: skip
    if CONCAT:
        z += product_tile(
            state_ptr, row * width, mask, node0_ptr, c, stride, 1, num_n, width, BLOCK_C, MODE
        )
    return z


@triton.jit(do_not_specialize=BATCH_SIZES)
def _mean_layer_fwd_kernel(
    x_ptr,
    v_ptr,
    h_ptr,
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
    col_ptr,
    block_start_ptr,
    edge0_ptr,
    edge0_bias_ptr,
    edge2_ptr,
    edge2_bias_ptr,
    node0_ptr,
    node0_bias_ptr,
    node2_ptr,
    node2_bias_ptr,
    x_out_ptr,
    v_out_ptr,
    h_out_ptr,
    state_ptr,
    means_ptr,
    node_products_ptr,
    own_ptr,
    num_nodes,
    num_items,
    num_copies,
    stride_e0,
    width,
    hidden,
    hidden_n,
    depth,
    BLOCK_P: tl.constexpr,
    SILU: tl.constexpr,
    CONCAT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """means: for backward, or None.

    own: (programs, BLOCK_R, width + hidden_n + hidden), M, the hidden layer of the node MLP, and a.
    """
    program = tl.program_id(0).to(tl.int64)
    message_ptr = own_ptr + program * BLOCK_R * (width + hidden_n + hidden)
    hidden_ptr = message_ptr + BLOCK_R * width
    if means_ptr is None:
        kept_ptr = hidden_ptr + BLOCK_R * hidden_n
    else:
        kept_ptr = means_ptr
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
    for item in range(program, num_items * num_copies, tl.num_programs(0)):
        first, last, base = nodes_of_item(
            block_start_ptr, item, num_nodes, num_copies, WHOLE, BLOCK_R
        )  # fmt: skip
        if WHOLE:
            for start in range(first, last, BLOCK_R):
                mask = start + r_index < last
                row = base + start + r_index
                for column in range(0, width, BLOCK_C):
                    c = column + tl.arange(0, BLOCK_C)
                    state = load_state(x_ptr, v_ptr, h_ptr, row, c, mask, width)
                    store_tile(state_ptr, row * width, c, mask, width, state)
                tl.debug_barrier()
                split_products(
                    state_ptr, node_products_ptr, edge0_ptr, stride_e0, row, mask, width, hidden,
                    BLOCK_C, MODE,
                )  # fmt: skip
            tl.debug_barrier()
        for start in range(first, last, BLOCK_R):
            node = start + r_index
            mask = node < last
            row = base + node
            first_edge, degree = edges_of_nodes(row_start_ptr, node, mask)
            means_at = (r_index if means_ptr is None else row) * hidden
            mean_of_neighbours(
                node_products_ptr, edge_fea_ptr, order_ptr, col_ptr, edge0_ptr, stride_e0,
                edge0_bias_ptr, kept_ptr, means_at, base, row, mask, first_edge, degree, width,
                hidden, depth, BLOCK_P, SILU, BLOCK_R, BLOCK_C, MODE,
            )  # fmt: skip
            tl.debug_barrier()
            for column in range(0, width, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                message = mean_message(
                    kept_ptr, means_at, mask, degree, edge2_ptr, edge2_bias_ptr, c, width, hidden,
                    BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(message_ptr, r_index * width, c, every, width, message)
            tl.debug_barrier()
            for column in range(0, hidden_n, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                z = node_hidden(
                    state_ptr, row, mask, message_ptr, r_index * width, every, node0_ptr,
                    node0_bias_ptr, c, width, hidden_n, CONCAT, BLOCK_C, MODE,
                )  # fmt: skip
                z = activate(z, SILU, MODE)
                store_tile(hidden_ptr, r_index * hidden_n, c, every, hidden_n, z)
            tl.debug_barrier()
            for column in range(0, width, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                out = linear_tile(
                    hidden_ptr, r_index * hidden_n, every, node2_ptr, hidden_n, node2_bias_ptr, c,
                    width, hidden_n, BLOCK_C, MODE,
                )  # fmt: skip
                out += load_tile(state_ptr, row * width, c, mask, width)
                store_state(x_out_ptr, v_out_ptr, h_out_ptr, row, c, mask, width, out)
            tl.debug_barrier()
