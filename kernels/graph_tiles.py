"""Nodes, edges and their summands in tiles: what the kernels of all graph layers begin with.

    u = P_i + Q_j + W_e e_ij + b,   P = W_a h, Q = W_b h

P and Q lie side by side in (rows, 2H). W_e e is taken edge by edge and copy by copy: for the
published 5 edge features that is 5 multiply-adds a column, less than loading a product that copies
share would cost, and one launch less.

Tiles of nodes follow each other, so that their edges, which are sorted by row, do too. A block is
a run of nodes that no edge leaves (`ops.topology.Neighbours`): a program that owns one needs
nothing of others.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    load_columns,
    load_tile,
    product_tile,
    store_tile,
)


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
def nodes_of_item(
    block_start_ptr, item, num_nodes, num_copies, WHOLE: tl.constexpr, BLOCK_R: tl.constexpr
):  # fmt: skip
    """First and last node of a block, or of a tile, and the copy's first row.

    The copies of one block are successive items, which read the same edges at about the same time.
    """
    base = item % num_copies * num_nodes
    part = item // num_copies
    if WHOLE:
        return tl.load(block_start_ptr + part), tl.load(block_start_ptr + part + 1), base
    else:
        return part * BLOCK_R, tl.minimum((part + 1) * BLOCK_R, num_nodes), base


@triton.jit
def edges_of_nodes(start_ptr, node, mask):
    """First edge and number of edges of each node."""
    first = tl.load(start_ptr + node, mask=mask, other=0)
    return first, tl.load(start_ptr + node + 1, mask=mask, other=0) - first


@triton.jit
def split_products(
    h_ptr, out_ptr, weight_ptr, stride_n, row, mask, width, hidden, BLOCK_C: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """[P, Q] of rows of h, from [W_a, W_b]."""
    for side in range(0, 2):
        for start in range(0, hidden, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            z = product_tile(
                h_ptr, row * width, mask, weight_ptr + side * width, c, stride_n, 1, hidden, width,
                BLOCK_C, MODE,
            )  # fmt: skip
            store_tile(out_ptr + side * hidden, row * 2 * hidden, c, mask, hidden, z)


@triton.jit
def edge_summand(
    edge_fea_ptr, weight_ptr, stride_n, bias_ptr, edge, live, n, hidden, depth
):  # fmt: skip
    """W_e e + b of the columns n."""
    u = tl.zeros((edge.shape[0], n.shape[0]), bias_ptr.dtype.element_ty)
    u += load_columns(bias_ptr, n, hidden)
    for d in range(0, depth):
        feature = tl.load(edge_fea_ptr + edge * depth + d, mask=live, other=0.0)
        weight = tl.load(weight_ptr + n * stride_n + d, mask=n < hidden, other=0.0)
        u += feature[:, None] * weight[None, :]
    return u


@triton.jit
def summand_tile(
    node_products_ptr, edge_fea_ptr, weight_ptr, stride_n, bias_ptr, target, source, edge, live, n,
    hidden, depth,
):  # fmt: skip
    """u of the columns n; anything finite where there is no edge."""
    u = edge_summand(edge_fea_ptr, weight_ptr, stride_n, bias_ptr, edge, live, n, hidden, depth)
    u += load_tile(node_products_ptr, target * 2 * hidden, n, live, hidden)
    return u + load_tile(node_products_ptr + hidden, source * 2 * hidden, n, live, hidden)


@triton.jit
def feature_columns(edge_fea_ptr, edge, live, d, depth):
    """[0, e, 1] of edges, with a column 0 to be filled: what their summands' weights act on."""
    at = edge_fea_ptr + edge[:, None] * depth + d[None, :] - 1
    e = tl.load(at, mask=live[:, None] & ((d >= 1) & (d <= depth))[None, :], other=0.0)
    return tl.where((d == depth + 1)[None, :], 1.0, e).to(e.dtype)
