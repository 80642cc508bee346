"""The graph layers with the first edge linear split into per-node products, in plain PyTorch.

    W [q, h_row, h_col, e] = (W_a h)_row + (W_b h)_col + W_e e + w_q q

The products with W_a, W_b are taken once per node and the one with W_e once for all T copies. What
is linear after the mean over neighbours (the second linear of GraphSAGE's and GCN's edge MLP) is
taken per node too. Any activation, dtype and device; differentiable any number of times.

The parts in which the time goes are `LayerKernels`: `TorchKernels` here, compiled ones in
graph_layers_cpp.py.

Shapes: T copies of n nodes, E edges; x, v (T, n, 3), h (T, n, K), edges sorted by row; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from gfnode_fast.ops.edge_differences import edge_differences
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


class PerEdgeWeights(NamedTuple):
    """What an EGNN layer multiplies edge by edge."""

    distance: Tensor  # (H,)
    message: Tensor  # (W, H)
    message_bias: Tensor
    coordinate: Tensor  # (C, W)
    coordinate_bias: Tensor
    displacement: Tensor  # (C,)
    displacement_bias: Tensor  # (1,)


class LayerKernels(Protocol):
    """The costly parts: sums over neighbours, products and MLPs on nodes, EGNN's edges."""

    width_multiple: int
    """H, W and C are padded with zeros to a multiple of this."""

    def sum(self, node: Tensor, edge: Tensor, edges: Topology, activation: Activation) -> Tensor:
        """node (T, n, 2H), edge (E, H) → Σ act(node_row + node_col + edge) (T, n, H)."""

    def linear(self, h: Tensor, weight: Tensor) -> Tensor:
        """(T, n, in) → (T, n, out), without bias."""

    def mlp(self, parts: Sequence[Tensor], weights: MLPWeights, activation: Activation) -> Tensor:
        """One or two parts (T, n, ...) side by side → (T, n, out)."""

    def egnn(
        self,
        x: Tensor,
        node: Tensor,
        edge: Tensor,
        edges: Topology,
        weights: PerEdgeWeights,
        activation: Activation,
        norm: bool,
    ) -> tuple[Tensor, Tensor]:
        """x (T, n, 3), node (T, n, 2H), edge (E, H) → Σ m (T, n, W), Σ r f (T, n, 3)."""


class TorchKernels:
    """`LayerKernels` in PyTorch."""

    width_multiple = 1

    def egnn(
        self,
        x: Tensor,
        node: Tensor,
        edge: Tensor,
        edges: Topology,
        weights: PerEdgeWeights,
        activation: Activation,
        norm: bool,
    ) -> tuple[Tensor, Tensor]:
        r = edge_differences(x, edges.row, edges.col)
        q = (r * r).sum(dim=-1, keepdim=True)
        if norm:
            q = q / q.clamp(min=NORM_EPSILON)
        a = activation(_gather(node, edge, edges) + q * weights.distance)
        m = activation(F.linear(a, weights.message, weights.message_bias))
        a = activation(F.linear(m, weights.coordinate, weights.coordinate_bias))
        f = F.linear(a, weights.displacement.unsqueeze(0), weights.displacement_bias)
        return _sum_onto_rows(m, edges), _sum_onto_rows(r * f, edges)

    def sum(self, node: Tensor, edge: Tensor, edges: Topology, activation: Activation) -> Tensor:
        return _sum_onto_rows(activation(_gather(node, edge, edges)), edges)

    def linear(self, h: Tensor, weight: Tensor) -> Tensor:
        return F.linear(h, weight)

    def mlp(self, parts: Sequence[Tensor], weights: MLPWeights, activation: Activation) -> Tensor:
        inputs = torch.cat(tuple(parts), dim=-1) if len(parts) > 1 else parts[0]
        z = F.linear(inputs, weights.weight0, weights.bias0)
        return F.linear(activation(z), weights.weight2, weights.bias2)


def _gather(node: Tensor, edge: Tensor, edges: Topology) -> Tensor:
    """node_row + node_col + edge, (T, E, H)."""
    row, col = node.chunk(2, dim=-1)
    return row.index_select(1, edges.row) + col.index_select(1, edges.col) + edge


def _sum_onto_rows(values: Tensor, edges: Topology) -> Tensor:
    """(T, E, C) → (T, n, C), in the sorted order of the edges."""
    copies, _, width = values.shape
    return values.new_zeros(copies, edges.num_nodes, width).index_add(1, edges.row, values)


def split_egnn(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: EGNNWeights,
    activation: Activation,
    norm: bool,
    kernels: LayerKernels,
) -> State:
    """An EGNN layer; oracle `gfnode_fast.reference.layers.EGNNLayer`."""
    x, v, h = state
    message, coordinate = weights.message, weights.coordinate
    node, edge = _summands(h, edge_fea, message.weight0[:, 1:], message.bias0, kernels)
    multiple = kernels.width_multiple
    per_edge = PerEdgeWeights(
        _padded(message.weight0[:, 0], multiple),
        _padded(message.weight2, multiple),
        _padded(message.bias2, multiple),
        _padded(coordinate.weight0, multiple),
        _padded(coordinate.bias0, multiple),
        _padded(coordinate.weight2[0], multiple),
        coordinate.bias2,
    )
    messages, shift = kernels.egnn(x, node, edge, edges, per_edge, activation, norm)
    shift = (shift / _degree(edges, x).clamp(min=1)).clamp(-MAX_DISPLACEMENT, MAX_DISPLACEMENT)
    x = x + kernels.mlp((h,), weights.velocity, activation) * v + shift
    h = kernels.mlp((h, messages[..., : h.shape[-1]]), weights.node, activation)
    return x, v, h


def split_mean(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: MeanWeights,
    activation: Activation,
    concatenate_self: bool,
    kernels: LayerKernels,
) -> State:
    """A GraphSAGE (`concatenate_self`) or GCN layer; oracles in `gfnode_fast.reference.layers`."""
    c = torch.cat(state, dim=-1)
    mlp = weights.edge
    node, edge = _summands(c, edge_fea, mlp.weight0, mlp.bias0, kernels)
    degree = _degree(edges, c)
    mean = kernels.sum(node, edge, edges, activation) / degree.clamp(min=1)
    weight = F.pad(mlp.weight2, (0, mean.shape[-1] - mlp.weight2.shape[1]))
    # A node without edges has mean 0, not the bias.
    mean = kernels.linear(mean, weight) + mlp.bias2 * (degree > 0)
    c = c + kernels.mlp((c, mean) if concatenate_self else (mean,), weights.node, activation)
    x, v, h = c.split((3, 3, c.shape[-1] - COORDINATE_WIDTH), dim=-1)
    return x, v, h


def _summands(
    h: Tensor, edge_fea: Tensor, weight: Tensor, bias: Tensor, kernels: LayerKernels
) -> tuple[Tensor, Tensor]:
    """[W_a h, W_b h] (T, n, 2H) and W_e e + bias (E, H) for W = [W_a, W_b, W_e]."""
    width = h.shape[-1]
    parts = weight.split((width, width, edge_fea.shape[1]), dim=1)
    extra = -weight.shape[0] % kernels.width_multiple
    of_row, of_col, of_edge = (F.pad(part, (0, 0, 0, extra)) if extra else part for part in parts)
    node = kernels.linear(h, torch.cat((of_row, of_col)))
    return node, F.linear(edge_fea, of_edge, F.pad(bias, (0, extra)) if extra else bias)


def _padded(weight: Tensor, multiple: int) -> Tensor:
    """Every dimension to a multiple of `multiple`, with zeros."""
    extra = [-size % multiple for size in weight.shape]
    if not any(extra):
        return weight
    return F.pad(weight, [side for size in reversed(extra) for side in (0, size)])


def _degree(edges: Topology, like: Tensor) -> Tensor:
    return edges.row_start.diff().to(like.dtype).unsqueeze(-1)
