"""One EGNN layer on T copies of a graph: forward in one launch, backward in three steps.

    r = x_i - x_j;  q = |r|² (or q / max(q, 1e-12))
    u = P_i + Q_j + W_e e + b + w q;  m = act(W_2 act(u) + b_2);  f = c · act(W_c m + b_c) + d
    x_i' = x_i + velocity(h_i) v_i + clamp(Σ_j r f / degree, ±100);  h_i' = node([h_i, Σ_j m])

forward, WHOLE: a program owns whole molecules of one copy (`graph_tiles`), those that begin in
    the same 16 nodes, of any size. It takes P and Q of its nodes, then tiles of their edges, then
    their update, with a barrier between the phases; what lies between two products is in memory
    of its own (`feature_tiles`). Messages of up to CHUNK edges wait there until each node sums
    its own in the order of the edges. So the edges fill tiles whatever the degrees.
forward, not WHOLE: P and Q come from a launch of their own, and a program owns tiles of nodes. For
    molecules so large and so few that one program each would leave the GPU idle. The same bits:
    the same tiles of products, and sums in the order of the edges.

backward 1, `node`: P and Q again; from the gradients of x', h' those of the sums over neighbours,
    and of the hidden layers of node and velocity MLP. Node state and Σ m are kept from forward,
    nothing else.
backward 2, `edge`: tiles of edges, messages taken again; the gradients of u go to a buffer, so that
backward 3, `gather`: sums them over the edges that reach and that leave a node. Taking the messages
    a second time by source instead would cost 4 products an edge beside the 6 of step 2; the
    buffer costs 0.77 kB an edge. One kernel over whole molecules would need that buffer per
    program, and so a bound on a molecule's edges that the host does not have.

Backward takes as many copies at a time as fit a bound (`copies_together`): its buffers are 3.1 kB a
node and 0.4 kB an edge at K = 96, so 0.5 MB for 8 copies of a molecule of 13 atoms, as much as all
layers of the model keep of it, and 0.06 MB for one.

Gradients of the weights that act edge by edge are summed per program, whose number is bounded by
that of the multiprocessors, and then over programs in order; those of [q, e, 1] as one product.

Considered for the sums over neighbours: a product with the one-hot incidence matrix of a tile of
edges; it costs R / 2 multiply-adds beside the 96 of an edge's own product, and a molecule that is
NaN would spoil the others of its tile. Taking one edge of each node of a tile at a time instead:
sums in registers, but tiles of one molecule would be half empty.
Considered for the program's own memory: all of it in registers; see `feature_tiles`.

Per edge at K = 96: forward 43 kflop, backward 116 kflop; 0.8 kB from the node state's side, mostly
from the caches, and the weights once per tile of edges.
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
    load_point,
    nodes_of_item,
    split_products,
    store_point,
    summand_tile,
)
from gfnode_fast.kernels.integers import BATCH_SIZES

MAX_DISPLACEMENT = tl.constexpr(100.0)
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


@triton.jit(do_not_specialize=BATCH_SIZES)
def _egnn_layer_fwd_kernel(
    x_ptr,
    v_ptr,
    h_ptr,
    edge_fea_ptr,
    order_ptr,
    row_start_ptr,
    row_ptr,
    col_ptr,
    block_start_ptr,
    message0_ptr,
    message0_bias_ptr,
    message2_ptr,
    message2_bias_ptr,
    coordinate0_ptr,
    coordinate0_bias_ptr,
    coordinate2_ptr,
    coordinate2_bias_ptr,
    velocity0_ptr,
    velocity0_bias_ptr,
    velocity2_ptr,
    velocity2_bias_ptr,
    node0_ptr,
    node0_bias_ptr,
    node2_ptr,
    node2_bias_ptr,
    x_out_ptr,
    h_out_ptr,
    messages_ptr,
    shift_ptr,
    node_products_ptr,
    own_ptr,
    num_nodes,
    num_items,
    num_copies,
    stride_m0,
    width,
    hidden,
    depth,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    WHOLE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """An item: a block of nodes, or a tile, of one copy.

    own: (programs, BLOCK_R hidden + CHUNK (width + 3)), what lies between products and sums.
    """
    program = tl.program_id(0).to(tl.int64)
    hidden_ptr = own_ptr + program * (BLOCK_R * hidden + CHUNK * (width + 3))
    message_ptr = hidden_ptr + BLOCK_R * hidden
    moved_ptr = message_ptr + CHUNK * width
    p_index = tl.arange(0, BLOCK_P)
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
    offset = tl.load(coordinate2_bias_ptr)
    velocity_offset = tl.load(velocity2_bias_ptr)
    for item in range(program, num_items * num_copies, tl.num_programs(0)):
        first, last, base = nodes_of_item(
            block_start_ptr, item, num_nodes, num_copies, WHOLE, BLOCK_R
        )  # fmt: skip
        if WHOLE:
            for start in range(first, last, BLOCK_R):
                node = start + r_index
                split_products(
                    h_ptr, node_products_ptr, message0_ptr + 1, stride_m0, base + node, node < last,
                    width, hidden, BLOCK_C, MODE,
                )  # fmt: skip
            tl.debug_barrier()
        for start in range(first, last, BLOCK_R):
            node = start + r_index
            mask = node < last
            row = base + node
            first_edge, degree = edges_of_nodes(row_start_ptr, node, mask)
            shift_x = tl.zeros((BLOCK_R,), offset.dtype)
            shift_y = tl.zeros((BLOCK_R,), offset.dtype)
            shift_z = tl.zeros((BLOCK_R,), offset.dtype)
            for column in range(0, width, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                nothing = tl.zeros((BLOCK_R, BLOCK_C), offset.dtype)
                store_tile(messages_ptr, row * width, c, mask, width, nothing)
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
                    features = feature_columns(
                        edge_fea_ptr, order_ptr, edge, q, live, p_index, depth, MODE
                    )  # fmt: skip
                    for column in range(0, hidden, BLOCK_C):
                        c = column + tl.arange(0, BLOCK_C)
                        weights = feature_weights(
                            message0_ptr, stride_m0, 1 + 2 * width, message0_bias_ptr, c, p_index,
                            hidden, depth, MODE,
                        )  # fmt: skip
                        u = summand_tile(
                            node_products_ptr, features, weights, target, source, live, c, hidden,
                            MODE,
                        )  # fmt: skip
                        u = activate(u, SILU, MODE)
                        store_tile(hidden_ptr, r_index * hidden, c, every, hidden, u)
                    tl.debug_barrier()
                    for column in range(0, width, BLOCK_C):
                        c = column + tl.arange(0, BLOCK_C)
                        m = linear_tile(
                            hidden_ptr, r_index * hidden, every, message2_ptr, hidden,
                            message2_bias_ptr, c, width, hidden, BLOCK_C, MODE,
                        )  # fmt: skip
                        m = activate(m, SILU, MODE)
                        store_tile(message_ptr, at * width, c, every, width, m)
                    tl.debug_barrier()
                    f = tl.zeros((BLOCK_R,), offset.dtype) + offset
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
                for k in range(0, most):
                    moved = load_point(moved_ptr, at + k, mask & (k < count))
                    shift_x += moved[0]
                    shift_y += moved[1]
                    shift_z += moved[2]
                for column in range(0, width, BLOCK_C):
                    c = column + tl.arange(0, BLOCK_C)
                    total = load_tile(messages_ptr, row * width, c, mask, width)
                    for k in range(0, most):
                        here = mask & (k < count)
                        total += load_tile(message_ptr, (at + k) * width, c, here, width)
                    store_tile(messages_ptr, row * width, c, mask, width, total)
                tl.debug_barrier()

            factor = tl.zeros((BLOCK_R,), offset.dtype) + velocity_offset
            tl.debug_barrier()
            for column in range(0, hidden, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                z = product_tile(
                    h_ptr, row * width, mask, node0_ptr, c, 2 * width, 1, hidden, width, BLOCK_C,
                    MODE,
                )  # fmt: skip
                z += linear_tile(
                    messages_ptr, row * width, mask, node0_ptr + width, 2 * width, node0_bias_ptr,
                    c, hidden, width, BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(
                    hidden_ptr, r_index * hidden, c, every, hidden, activate(z, SILU, MODE)
                )  # fmt: skip
                z = linear_tile(
                    h_ptr, row * width, mask, velocity0_ptr, width, velocity0_bias_ptr, c, hidden,
                    width, BLOCK_C, MODE,
                )  # fmt: skip
                z = activate(z, SILU, MODE)
                factor += tl.sum(z * load_columns(velocity2_ptr, c, hidden), axis=1)
            tl.debug_barrier()
            for column in range(0, width, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                z = linear_tile(
                    hidden_ptr, r_index * hidden, every, node2_ptr, hidden, node2_bias_ptr, c,
                    width, hidden, BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(h_out_ptr, row * width, c, mask, width, z)
            tl.debug_barrier()

            shift = (shift_x, shift_y, shift_z)
            store_point(shift_ptr, row, shift, mask)
            x_i = load_point(x_ptr, row, mask)
            v = load_point(v_ptr, row, mask)
            count = tl.maximum(degree, 1).to(offset.dtype)
            for axis in tl.static_range(3):
                moved = x_i[axis] + factor * v[axis] + _clamp(shift[axis] / count)
                tl.store(x_out_ptr + row * 3 + axis, moved, mask=mask)


@triton.jit
def _clamp(x):
    x = tl.where(x > MAX_DISPLACEMENT, MAX_DISPLACEMENT, x)
    return tl.where(x < -MAX_DISPLACEMENT, -MAX_DISPLACEMENT, x)
