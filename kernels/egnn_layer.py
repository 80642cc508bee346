"""One EGNN layer on T copies of a graph: forward, and backward in three steps.

    r = x_i - x_j;  q = |r|² (or q / max(q, 1e-12))
    u = P_i + Q_j + E_ij + w q;  m = act(W_2 act(u) + b_2);  f = c · act(W_c m + b_c) + d
    x_i' = x_i + velocity(h_i) v_i + clamp(Σ_j r f / degree, ±100);  h_i' = node([h_i, Σ_j m])

P, Q = W_a h, W_b h are taken per node and E = W_e e + b per edge of one copy (`row_products`).

A program owns runs of nodes of one copy, in an order that puts similar numbers of edges beside
each other (`ops.topology.Neighbours`), and takes one edge of each node at a time, so that sums over
neighbours are its own, in the order of the edges. What lies between two products is in memory of
its own (`feature_tiles`).

backward 1, `node`: from the gradients of x', h' to those of the sums over neighbours, and of the
    hidden layers of node and velocity MLP. Node state and Σ m are kept from forward, nothing else.
backward 2, `edge`: messages taken again; the gradients of u go to a buffer for one or a few
    copies, so that
backward 3, `source`: sums them over the edges that leave a node. Taking the messages a second time
    by source instead would cost 4 products an edge beside the 6 of step 2; the buffer costs
    0.77 kB an edge. A program that owned whole molecules could sum both ways at once, but needs
    molecules of bounded size and their ends on the host.

Gradients of the weights that act edge by edge are summed per program, whose number is bounded by
that of the multiprocessors, and then over programs in order; those of [q, e, 1] as one product.

Considered for the sums over neighbours: a product with the one-hot incidence matrix of a tile of
edges; it costs R / 2 multiply-adds beside the 96 of an edge's own product, and the gathers of P.
Considered for the program's own memory: all of it in registers; see `feature_tiles`.

Per edge at K = 96: forward 37 kflop, backward 110 kflop; 0.8 kB from the node state's side, mostly
from the caches, and the weights once per run of nodes and edge.
No atomics; every sum has a fixed order. 64-bit addresses.
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    activate,
    load_columns,
    load_tile,
    product_tile,
    store_tile,
)

MAX_DISPLACEMENT = tl.constexpr(100.0)
NORM_EPSILON = tl.constexpr(1e-12)


@triton.jit
def load_point(ptr, row, mask):
    """Three components of a vector per row."""
    return (
        tl.load(ptr + row * 3, mask=mask, other=0.0),
        tl.load(ptr + row * 3 + 1, mask=mask, other=0.0),
        tl.load(ptr + row * 3 + 2, mask=mask, other=0.0),
    )


@triton.jit
def store_point(ptr, row, point, mask):
    """What `load_point` reads."""
    for axis in tl.static_range(3):
        tl.store(ptr + row * 3 + axis, point[axis], mask=mask)


@triton.jit
def tile_of_nodes(order_ptr, start_ptr, tile, num_nodes, BLOCK_R: tl.constexpr):
    """Nodes of a tile, which of them there are, the first edge and the number of edges of each."""
    at = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = at < num_nodes
    node = tl.load(order_ptr + at, mask=mask, other=0)
    first = tl.load(start_ptr + node, mask=mask, other=0)
    degree = tl.load(start_ptr + node + 1, mask=mask, other=0) - first
    return node, mask, first, degree.to(tl.int32)


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
def summand_tile(
    node_products_ptr, edge_products_ptr, message0_ptr, stride_m0, row, source, edge, q, live, n,
    hidden,
):  # fmt: skip
    """u of the columns n; 0 where there is no edge."""
    u = load_tile(node_products_ptr, row * 2 * hidden, n, live, hidden)
    u += load_tile(node_products_ptr + hidden, source * 2 * hidden, n, live, hidden)
    u += load_tile(edge_products_ptr, edge * hidden, n, live, hidden)
    weight = tl.load(message0_ptr + n * stride_m0, mask=n < hidden, other=0.0)
    return u + q[:, None] * weight[None, :]


@triton.jit
def _egnn_layer_fwd_kernel(
    x_ptr,
    v_ptr,
    h_ptr,
    node_products_ptr,
    edge_products_ptr,
    order_ptr,
    row_start_ptr,
    col_ptr,
    message0_ptr,
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
    own_ptr,
    num_nodes,
    num_copies,
    stride_m0,
    width,
    hidden,
    NORM: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    """own: (programs, BLOCK_R, hidden + width), what lies between products."""
    program = tl.program_id(0).to(tl.int64)
    hidden_ptr = own_ptr + program * BLOCK_R * (hidden + width)
    message_ptr = hidden_ptr + BLOCK_R * hidden
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
    offset = tl.load(coordinate2_bias_ptr)
    velocity_offset = tl.load(velocity2_bias_ptr)
    tiles = tl.cdiv(num_nodes, BLOCK_R)
    for item in range(program, tiles * num_copies, tl.num_programs(0)):
        node, mask, first, degree = tile_of_nodes(
            order_ptr, row_start_ptr, item % tiles, num_nodes, BLOCK_R
        )
        base = (item // tiles) * num_nodes
        row = base + node
        x_i = load_point(x_ptr, row, mask)
        shift_x = tl.zeros((BLOCK_R,), offset.dtype)
        shift_y = tl.zeros((BLOCK_R,), offset.dtype)
        shift_z = tl.zeros((BLOCK_R,), offset.dtype)
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            nothing = tl.zeros((BLOCK_R, BLOCK_C), offset.dtype)
            store_tile(messages_ptr, row * width, c, mask, width, nothing)
        for k in range(0, tl.max(degree, axis=0)):
            live = k < degree
            edge = first + k
            source = base + tl.load(col_ptr + tl.where(live, edge, 0))
            r, q, _ = distance(x_i, load_point(x_ptr, source, live), NORM)
            q = tl.where(live, q, 0.0)
            for start in range(0, hidden, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                u = summand_tile(
                    node_products_ptr,
                    edge_products_ptr,
                    message0_ptr,
                    stride_m0,
                    row,
                    source,
                    edge,
                    q,
                    live,
                    c,
                    hidden,
                )
                store_tile(hidden_ptr, r_index * hidden, c, every, hidden, activate(u, SILU, MODE))
            tl.debug_barrier()
            for start in range(0, width, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                y = product_tile(
                    hidden_ptr,
                    r_index * hidden,
                    every,
                    message2_ptr,
                    c,
                    hidden,
                    1,
                    width,
                    hidden,
                    BLOCK_C,
                    MODE,
                )
                m = activate(y + load_columns(message2_bias_ptr, c, width), SILU, MODE)
                store_tile(message_ptr, r_index * width, c, every, width, m)
                total = load_tile(messages_ptr, row * width, c, live, width) + m
                store_tile(messages_ptr, row * width, c, live, width, total)
            tl.debug_barrier()
            f = tl.zeros((BLOCK_R,), offset.dtype) + offset
            for start in range(0, hidden, BLOCK_C):
                c = start + tl.arange(0, BLOCK_C)
                z = product_tile(
                    message_ptr,
                    r_index * width,
                    every,
                    coordinate0_ptr,
                    c,
                    width,
                    1,
                    hidden,
                    width,
                    BLOCK_C,
                    MODE,
                )
                z = activate(z + load_columns(coordinate0_bias_ptr, c, hidden), SILU, MODE)
                f += tl.sum(z * load_columns(coordinate2_ptr, c, hidden), axis=1)
            shift_x += tl.where(live, r[0] * f, 0.0)
            shift_y += tl.where(live, r[1] * f, 0.0)
            shift_z += tl.where(live, r[2] * f, 0.0)
        tl.debug_barrier()

        factor = tl.zeros((BLOCK_R,), offset.dtype) + velocity_offset
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = product_tile(
                h_ptr, row * width, mask, node0_ptr, c, 2 * width, 1, hidden, width, BLOCK_C, MODE
            )
            z += product_tile(
                messages_ptr,
                row * width,
                mask,
                node0_ptr + width,
                c,
                2 * width,
                1,
                hidden,
                width,
                BLOCK_C,
                MODE,
            )
            z = activate(z + load_columns(node0_bias_ptr, c, hidden), SILU, MODE)
            store_tile(hidden_ptr, r_index * hidden, c, every, hidden, z)
            z = product_tile(
                h_ptr, row * width, mask, velocity0_ptr, c, width, 1, hidden, width, BLOCK_C, MODE
            )
            z = activate(z + load_columns(velocity0_bias_ptr, c, hidden), SILU, MODE)
            factor += tl.sum(z * load_columns(velocity2_ptr, c, hidden), axis=1)
        tl.debug_barrier()
        for start in range(0, width, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = product_tile(
                hidden_ptr,
                r_index * hidden,
                every,
                node2_ptr,
                c,
                hidden,
                1,
                width,
                hidden,
                BLOCK_C,
                MODE,
            )
            store_tile(
                h_out_ptr, row * width, c, mask, width, z + load_columns(node2_bias_ptr, c, width)
            )
        tl.debug_barrier()

        shift = (shift_x, shift_y, shift_z)
        store_point(shift_ptr, row, shift, mask)
        v = load_point(v_ptr, row, mask)
        count = tl.maximum(degree, 1).to(offset.dtype)
        for axis in tl.static_range(3):
            moved = x_i[axis] + factor * v[axis] + _clamp(shift[axis] / count)
            tl.store(x_out_ptr + row * 3 + axis, moved, mask=mask)


@triton.jit
def _clamp(x):
    x = tl.where(x > MAX_DISPLACEMENT, MAX_DISPLACEMENT, x)
    return tl.where(x < -MAX_DISPLACEMENT, -MAX_DISPLACEMENT, x)
