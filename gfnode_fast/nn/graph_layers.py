"""The reference's layer modules on the graph layer operations: their parameters, our arithmetic."""

from __future__ import annotations

from torch import Tensor, nn

from gfnode_fast.ops.graph_layers import egnn_layer, gcn_layer, sage_layer
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights, State
from gfnode_fast.ops.topology import Topology
from gfnode_fast.reference.layers import MLP, EGNNLayer, GCNLayer, SAGELayer


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
        activation = message.mlp[1]
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
    assert isinstance(layer, SAGELayer | GCNLayer)
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


def _weights(mlp: MLP) -> MLPWeights:
    first, last = mlp.mlp[0], mlp.mlp[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    return MLPWeights(first.weight, first.bias, last.weight, last.bias)
