"""The reference's layer modules on the graph layer operations: their parameters, our arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gfnode_fast.ops.graph_layers import egnn_layer, gcn_layer, sage_layer
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights, State
from gfnode_fast.ops.topology import Topology
from gfnode_fast.reference.layers import MLP, EGNNLayer, GCNLayer, SAGELayer

KEPT_EDGE_BYTES = 768 * 2**20
"""What the encoder's and the decoder's layers each keep of edges for backward by themselves."""
KEPT_SUM_BYTES = 32 * 2**20
"""The same of sums over neighbours, by Triton, which keeps nothing of edges. They are as much as
the features that every layer must keep; taking them again is 10 % of a training step's arithmetic,
which small batches would wait for."""


def apply_layer(
    layer: nn.Module,
    state: State,
    edges: Topology,
    edge_fea: Tensor,
    *,
    recompute: bool,
    backend: str = "auto",
    precision: str = "fp32",
) -> State:
    """One layer on T copies of the graph, state (T*n, ...)."""
    if isinstance(layer, EGNNLayer):
        message = layer.edge_message_net.scalar_net
        egnn = EGNNWeights(
            *(_weights(m) for m in (message, layer.coord_net, layer.node_v_net, layer.node_net))
        )
        _, activation, *_ = message.mlp
        return egnn_layer(
            *state,
            edges,
            edge_fea,
            egnn,
            activation,
            norm=layer.norm,
            recompute=recompute,
            backend=backend,
            precision=precision,
        )
    assert isinstance(layer, SAGELayer | GCNLayer)  # else nn/uncalled.py has refused it
    mean = MeanWeights(_weights(layer.edge_mlp), _weights(layer.node_mlp))
    op = gcn_layer if isinstance(layer, GCNLayer) else sage_layer
    return op(
        *state,
        edges,
        edge_fea,
        mean,
        layer.edge_mlp.mlp[1],
        recompute=recompute,
        backend=backend,
        precision=precision,
    )


def layers_kept(
    layers: nn.ModuleList, num_rows: int, num_edges: int, dtype: torch.dtype, backend: str
) -> int:
    """How many of these layers, all alike, keep their edge intermediates within `KEPT_EDGE_BYTES`;
    with "triton" their sums over neighbours within `KEPT_SUM_BYTES`.

    Args:
        num_rows: nodes of all copies of the graph.
        num_edges: the same of edges.
        backend: "cpp", "torch" or "triton".
    """
    layer = layers[0]
    if backend == "triton":
        if isinstance(layer, EGNNLayer):
            width = _weights(layer.edge_message_net.scalar_net).weight2.shape[0]
        else:
            assert isinstance(layer, SAGELayer | GCNLayer)
            width = _weights(layer.edge_mlp).weight0.shape[0]
        return min(len(layers), KEPT_SUM_BYTES // max(num_rows * width * dtype.itemsize, 1))
    if isinstance(layer, EGNNLayer):
        message, coordinate = _weights(layer.edge_message_net.scalar_net), _weights(layer.coord_net)
        # C++ keeps the arguments of the last two activations, PyTorch arguments and values of all.
        later = message.weight2.shape[0] + coordinate.weight0.shape[0]
        numbers = later if backend == "cpp" else 2 * (message.weight0.shape[0] + later)
    else:
        assert isinstance(layer, SAGELayer | GCNLayer)
        numbers = 0 if backend == "cpp" else 2 * _weights(layer.edge_mlp).weight0.shape[0]
    of_a_layer = num_edges * numbers * dtype.itemsize
    return min(len(layers), KEPT_EDGE_BYTES // of_a_layer) if of_a_layer else len(layers)


def _weights(mlp: MLP) -> MLPWeights:
    first, _, last, *_ = mlp.mlp  # an index takes four times as long
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return MLPWeights(first.weight, _bias(first), last.weight, _bias(last))


def _bias(linear: nn.Linear) -> Tensor:
    """Zeros where it was taken away."""
    bias: Tensor | None = linear.bias
    return linear.weight.new_zeros(linear.out_features) if bias is None else bias
