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
    and of the hidden layers of node and velocity MLP. Node state is kept from forward, and Σ m
    unless it is to be taken again: by `row_linear`, for P and Q, and `messages`, in tiles of nodes.
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

Per edge at K = 96: forward 43 kflop, backward 116 kflop, Σ m again 25 kflop; 0.8 kB from the node
state's side, mostly from the caches, and the weights once per tile of edges.
No atomics; every sum has a fixed order. 64-bit addresses.
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.egnn_messages import sum_messages
from gfnode_fast.kernels.feature_tiles import (
    activate,
    linear_tile,
    load_columns,
    product_tile,
    store_tile,
)
from gfnode_fast.kernels.graph_tiles import (
    edges_of_nodes,
    load_point,
    nodes_of_item,
    split_products,
    store_point,
)
from gfnode_fast.kernels.integers import BATCH_SIZES

MAX_DISPLACEMENT = tl.constexpr(100.0)


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

    messages: Σ m for backward, or None.
    own: (programs, BLOCK_R (hidden + width) + CHUNK (width + 3)), what lies between products and
    sums.
    """
    program = tl.program_id(0).to(tl.int64)
    own_ptr += program * (BLOCK_R * (hidden + width) + CHUNK * (width + 3))
    if messages_ptr is None:
        sums_ptr = own_ptr + BLOCK_R * hidden + CHUNK * (width + 3)
    else:
        sums_ptr = messages_ptr
    r_index = tl.arange(0, BLOCK_R)
    every = r_index >= 0
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
            sums_at = (r_index if messages_ptr is None else row) * width
            shift_x, shift_y, shift_z = sum_messages(
                x_ptr, edge_fea_ptr, order_ptr, row_start_ptr, row_ptr, col_ptr, message0_ptr,
                message0_bias_ptr, message2_ptr, message2_bias_ptr, coordinate0_ptr,
                coordinate0_bias_ptr, coordinate2_ptr, coordinate2_bias_ptr, node_products_ptr,
                sums_ptr, sums_at, own_ptr, start, last, base, stride_m0, width, hidden, depth,
                True, NORM, SILU, CHUNK, BLOCK_P, BLOCK_R, BLOCK_C, MODE,
            )  # fmt: skip
            factor = tl.zeros((BLOCK_R,), velocity_offset.dtype) + velocity_offset
            for column in range(0, hidden, BLOCK_C):
                c = column + tl.arange(0, BLOCK_C)
                z = product_tile(
                    h_ptr, row * width, mask, node0_ptr, c, 2 * width, 1, hidden, width, BLOCK_C,
                    MODE,
                )  # fmt: skip
                z += linear_tile(
                    sums_ptr, sums_at, mask, node0_ptr + width, 2 * width, node0_bias_ptr,
                    c, hidden, width, BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(
                    own_ptr, r_index * hidden, c, every, hidden, activate(z, SILU, MODE)
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
                    own_ptr, r_index * hidden, every, node2_ptr, hidden, node2_bias_ptr, c,
                    width, hidden, BLOCK_C, MODE,
                )  # fmt: skip
                store_tile(h_out_ptr, row * width, c, mask, width, z)
            tl.debug_barrier()

            shift = (shift_x, shift_y, shift_z)
            store_point(shift_ptr, row, shift, mask)
            x_i = load_point(x_ptr, row, mask)
            v = load_point(v_ptr, row, mask)
            _first, degree = edges_of_nodes(row_start_ptr, node, mask)
            count = tl.maximum(degree, 1).to(velocity_offset.dtype)
            for axis in tl.static_range(3):
                moved = x_i[axis] + factor * v[axis] + _clamp(shift[axis] / count)
                tl.store(x_out_ptr + row * 3 + axis, moved, mask=mask)


@triton.jit
def _clamp(x):
    x = tl.where(x > MAX_DISPLACEMENT, MAX_DISPLACEMENT, x)
    return tl.where(x < -MAX_DISPLACEMENT, -MAX_DISPLACEMENT, x)
