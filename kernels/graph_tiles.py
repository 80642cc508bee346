"""Nodes, edges and their summands in tiles: what the kernels of all graph layers begin with.

    u = P_i + Q_j + W_e e_ij + b,   P = W_a h, Q = W_b h

P and Q lie side by side in (rows, 2H). W_e e + b is taken edge by edge and copy by copy, with q
where there is one, as one small product: [q, e, 1] by [w_q, W_e, b], whose factors are split so
that one product of tf32 keeps fp32 in every mode (`split_tile`).

A product that copies share would have to be loaded: 4 H bytes an edge and copy, 384 at H = 96,
from the second cache, beside 768 for P and Q. It would be written and read once, 96 bytes of memory
an edge and copy at 8 copies, 512 in an encoder, which has one; and forward would be two launches.
Taken anew with the published 5 features it is 20 bytes of e; 12 (5 + 2) H bytes of weights from the
first cache for a tile of edges, 504 an edge in EGNN's tiles of 16, 252 in those of 32, next to none
in the other layers, which hold them over a tile's edges; and 32 H multiply-adds of tensor cores,
3 k beside the 55 k (tf32x3) or 18 k (tf32, bf16) of an EGNN edge's own products. Counted, not
measured.

Considered: one column of W_e after another in fp32 multiply-adds. Its elements are a row of the
weight apart, a request each for a sector of 32 bytes: about as many as the rest of an EGNN edge
makes. A program that walks the copies of its edges: saves the weights, not the 4 H bytes, and at
B = 50 leaves 7 of 8 programs without work.

Tiles of nodes follow each other, so that their edges, which are sorted by row, do too. A block is
a run of nodes that no edge leaves (`ops.topology.Neighbours`): a program that owns one needs
nothing of others.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.feature_tiles import (
    dot_of_parts,
    load_tile,
    product_tile,
    split_tile,
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
def row_of_copy(copy, num_nodes):
    """First row of a copy in what all copies have."""
    return copy.to(tl.int64) * num_nodes


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
    """First edge and number of edges of each node; one copy has fewer than 2^31."""
    first = tl.load(start_ptr + node, mask=mask, other=0).to(tl.int32)
    return first, tl.load(start_ptr + node + 1, mask=mask, other=0).to(tl.int32) - first


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
def feature_columns(edge_fea_ptr, order_ptr, edge, q, live, k, depth, MODE: tl.constexpr):
    """[q, e, 1] of edges in three parts, which `feature_weights` multiplies; q: None for 0."""
    part, d = k // (depth + 2), k % (depth + 2)
    at = tl.load(order_ptr + edge, mask=live, other=0) * depth - 1
    inside = (d >= 1) & (d <= depth) & (part < 3)
    at = edge_fea_ptr + at[:, None] + d[None, :]
    e = tl.load(at, mask=live[:, None] & inside[None, :], other=0.0)
    e = tl.where((d == depth + 1)[None, :], 1.0, e).to(e.dtype)
    if q is not None:
        e = tl.where((d == 0)[None, :], q[:, None], e)
    return split_tile(e, part[None, :], 1, MODE)


@triton.jit
def feature_weights(
    weight_ptr, stride_n, first, bias_ptr, n, k, hidden, depth, MODE: tl.constexpr
):  # fmt: skip
    """Of the columns n, in three parts: column 0 of the weight, those from `first` on, the bias."""
    part, d = k // (depth + 2), k % (depth + 2)
    mask = (n < hidden)[:, None] & (part < 3)[None, :]
    at = weight_ptr + n[:, None] * stride_n + tl.where(d == 0, 0, first + d - 1)[None, :]
    weight = tl.load(at, mask=mask & (d <= depth)[None, :], other=0.0)
    at = bias_ptr + n[:, None] + 0 * d[None, :]
    weight += tl.load(at, mask=mask & (d == depth + 1)[None, :], other=0.0)
    return tl.trans(split_tile(weight, part[None, :], 2, MODE))


@triton.jit
def summand_tile(
    node_products_ptr, features, weights, target, source, live, n, hidden, MODE: tl.constexpr
):  # fmt: skip
    """u of the columns n; anything finite where there is no edge."""
    u = dot_of_parts(features, weights, MODE)
    u += load_tile(node_products_ptr, target * 2 * hidden, n, live, hidden)
    return u + load_tile(node_products_ptr + hidden, source * 2 * hidden, n, live, hidden)
