"""Σ_j act(P_i + Q_j + E_ij) over the neighbours j of a node: the edge phase of GraphSAGE and GCN.

node (T*n, 2H) holds P and Q side by side, E is (edges, H), shared by T copies. Forward: a program
owns a run of nodes of one copy and a tile of columns, and takes one edge of each node at a time.
Backward takes u = P_i + Q_j + E_ij again, once by destination (gradient of P), once by source (of
Q) and, when it is wanted, once edge by edge over all copies (of E).

An edge costs H activations for 4 H to 8 H bytes, mostly from the caches: nothing to gain from
storing u. No atomics; every sum has a fixed order. 64-bit addresses.
Tuned on: none yet; not yet run on hardware.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.egnn_layer import tile_of_nodes
from gfnode_fast.kernels.feature_tiles import activate, activate_with_slope, load_tile, store_tile


@triton.jit
def _edge_sum_fwd_kernel(
    node_ptr,
    edge_ptr,
    order_ptr,
    row_start_ptr,
    col_ptr,
    out_ptr,
    num_nodes,
    hidden,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    node, mask, first, degree = tile_of_nodes(
        order_ptr, row_start_ptr, tl.program_id(0), num_nodes, BLOCK_R
    )
    base = tl.program_id(1).to(tl.int64) * num_nodes
    row = base + node
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = load_tile(node_ptr, row * 2 * hidden, c, mask, hidden)
    total = tl.zeros_like(p)
    for k in range(0, tl.max(degree, axis=0)):
        live = k < degree
        edge = first + k
        source = base + tl.load(col_ptr + tl.where(live, edge, 0))
        u = p + load_tile(node_ptr + hidden, source * 2 * hidden, c, live, hidden)
        u += load_tile(edge_ptr, edge * hidden, c, live, hidden)
        total += tl.where(live[:, None], activate(u, SILU, MODE), 0.0)
    store_tile(out_ptr, row * hidden, c, mask, hidden, total)


@triton.jit
def _edge_sum_bwd_kernel(
    grad_ptr,
    node_ptr,
    edge_ptr,
    order_ptr,
    row_start_ptr,
    row_ptr,
    col_ptr,
    source_start_ptr,
    source_edge_ptr,
    grad_node_ptr,
    num_nodes,
    hidden,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    node, mask, first, degree = tile_of_nodes(
        order_ptr, row_start_ptr, tl.program_id(0), num_nodes, BLOCK_R
    )
    first_out = tl.load(source_start_ptr + node, mask=mask, other=0)
    degree_out = tl.load(source_start_ptr + node + 1, mask=mask, other=0) - first_out
    base = tl.program_id(1).to(tl.int64) * num_nodes
    row = base + node
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = load_tile(node_ptr, row * 2 * hidden, c, mask, hidden)
    grad = load_tile(grad_ptr, row * hidden, c, mask, hidden)
    total = tl.zeros_like(p)
    for k in range(0, tl.max(degree, axis=0)):
        live = k < degree
        edge = first + k
        source = base + tl.load(col_ptr + tl.where(live, edge, 0))
        u = p + load_tile(node_ptr + hidden, source * 2 * hidden, c, live, hidden)
        u += load_tile(edge_ptr, edge * hidden, c, live, hidden)
        _a, slope = activate_with_slope(u, SILU, MODE)
        total += tl.where(live[:, None], grad * slope, 0.0)
    store_tile(grad_node_ptr, row * 2 * hidden, c, mask, hidden, total)
    q = load_tile(node_ptr + hidden, row * 2 * hidden, c, mask, hidden)
    total = tl.zeros_like(p)
    for k in range(0, tl.max(degree_out, axis=0).to(tl.int32)):
        live = k < degree_out
        edge = tl.load(source_edge_ptr + tl.where(live, first_out + k, 0))
        target = base + tl.load(row_ptr + edge)
        u = q + load_tile(node_ptr, target * 2 * hidden, c, live, hidden)
        u += load_tile(edge_ptr, edge * hidden, c, live, hidden)
        _a, slope = activate_with_slope(u, SILU, MODE)
        grad = load_tile(grad_ptr, target * hidden, c, live, hidden)
        total += tl.where(live[:, None], grad * slope, 0.0)
    store_tile(grad_node_ptr + hidden, row * 2 * hidden, c, mask, hidden, total)


@triton.jit
def _edge_sum_bwd_edge_kernel(
    grad_ptr,
    node_ptr,
    edge_ptr,
    row_ptr,
    col_ptr,
    grad_edge_ptr,
    num_nodes,
    num_edges,
    num_copies,
    hidden,
    SILU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):
    edge = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = edge < num_edges
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    target = tl.load(row_ptr + edge, mask=mask, other=0)
    source = tl.load(col_ptr + edge, mask=mask, other=0)
    e = load_tile(edge_ptr, edge * hidden, c, mask, hidden)
    total = tl.zeros_like(e)
    for _ in range(0, num_copies):
        u = e + load_tile(node_ptr, target * 2 * hidden, c, mask, hidden)
        u += load_tile(node_ptr + hidden, source * 2 * hidden, c, mask, hidden)
        _a, slope = activate_with_slope(u, SILU, MODE)
        total += load_tile(grad_ptr, target * hidden, c, mask, hidden) * slope
        target += num_nodes
        source += num_nodes
    store_tile(grad_edge_ptr, edge * hidden, c, mask, hidden, total)
