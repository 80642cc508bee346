"""The graph layers with the first edge linear split into per-node products, in plain PyTorch.

    W [q, h_row, h_col, e] = (W_a h)_row + (W_b h)_col + W_e e + w_q q

The products with W_a, W_b are taken once per node and the one with W_e once for all T copies. What
is linear after the mean over neighbours (the second linear of GraphSAGE's and GCN's edge MLP) is
taken per node too. Any activation, dtype and device; differentiable any number of times.

Shapes: T copies of n nodes, E edges; x, v (T, n, 3), h (T, n, K), edges sorted by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gfnode_fast.ops.topology import Topology
from gfnode_fast.reference.layers import COORDINATE_WIDTH, MAX_DISPLACEMENT, NORM_EPSILON

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, Tensor, Tensor]
"""x, v, h."""


class MLPWeights(NamedTuple):
    """Linear(in, hidden) → act → Linear(hidden, out): weights (out, in) as in `nn.Linear`."""

    weight0: Tensor
    bias0: Tensor
    weight2: Tensor
    bias2: Tensor


class EGNNWeights(NamedTuple):
    """The four MLPs of an EGNN layer of width K."""

    message: MLPWeights
    coordinate: MLPWeights
    velocity: MLPWeights
    node: MLPWeights


class MeanWeights(NamedTuple):
    """The two MLPs of a GraphSAGE or GCN layer of width C = K + 6."""

    edge: MLPWeights
    node: MLPWeights


def _sum_onto_rows(values: Tensor, edges: Topology) -> Tensor:
    """(T, E, C) → (T, n, C), in the sorted order of the edges."""
    copies, _, width = values.shape
    return values.new_zeros(copies, edges.num_nodes, width).index_add(1, edges.row, values)


def _degree(edges: Topology, like: Tensor) -> Tensor:
    return edges.row_start.diff().to(like.dtype).unsqueeze(-1)


def _first_edge_linear(
    rows: Tensor, cols: Tensor, edge_fea: Tensor, mlp: MLPWeights, skip: int, edges: Topology
) -> Tensor:
    """(T, E, hidden) without the first `skip` input columns of the weight."""
    width = rows.shape[-1]
    weight = mlp.weight0[:, skip:]
    per_row = F.linear(rows, weight[:, :width])
    per_col = F.linear(cols, weight[:, width : 2 * width])
    per_edge = F.linear(edge_fea, weight[:, 2 * width :], mlp.bias0)
    return per_row.index_select(1, edges.row) + per_col.index_select(1, edges.col) + per_edge


def split_egnn(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: EGNNWeights,
    activation: Activation,
    norm: bool,
) -> State:
    """An EGNN layer; oracle `gfnode_fast.reference.layers.EGNNLayer`."""
    x, v, h = state
    message, coordinate, velocity, node = weights
    r = x.index_select(1, edges.row) - x.index_select(1, edges.col)
    q = (r * r).sum(dim=-1, keepdim=True)
    if norm:
        q = q / q.abs().clamp(min=NORM_EPSILON)
    z = _first_edge_linear(h, h, edge_fea, message, 1, edges) + q * message.weight0[:, 0]
    m = activation(F.linear(activation(z), message.weight2, message.bias2))
    f = _mlp(m, coordinate, activation)
    shift = _sum_onto_rows(r * f, edges) / _degree(edges, x).clamp(min=1)
    x = x + _mlp(h, velocity, activation) * v + shift.clamp(-MAX_DISPLACEMENT, MAX_DISPLACEMENT)
    return x, v, _mlp(torch.cat((h, _sum_onto_rows(m, edges)), dim=-1), node, activation)


def split_mean(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: MeanWeights,
    activation: Activation,
    concatenate_self: bool,
) -> State:
    """A GraphSAGE (`concatenate_self`) or GCN layer."""
    c = torch.cat(state, dim=-1)
    edge, node = weights
    a = activation(_first_edge_linear(c, c, edge_fea, edge, 0, edges))
    degree = _degree(edges, c)
    mean = _sum_onto_rows(a, edges) / degree.clamp(min=1)
    # A node without edges has mean 0, not the bias.
    mean = F.linear(mean, edge.weight2) + edge.bias2 * (degree > 0)
    c = c + _mlp(torch.cat((c, mean), dim=-1) if concatenate_self else mean, node, activation)
    return split_state(c)


def split_state(c: Tensor) -> State:
    """[x, v, h] along the last axis → x, v, h."""
    x, v, h = c.split((3, 3, c.shape[-1] - COORDINATE_WIDTH), dim=-1)
    return x, v, h


def _mlp(z: Tensor, mlp: MLPWeights, activation: Activation) -> Tensor:
    return F.linear(activation(F.linear(z, mlp.weight0, mlp.bias0)), mlp.weight2, mlp.bias2)
