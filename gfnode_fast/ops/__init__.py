"""The operations: one public function each, which checks, dispatches and differentiates.

Some share their module's name. `gfnode_fast.ops.propagate` is the function, and
`from gfnode_fast.ops.propagate import ...` still reaches the module.
"""

from gfnode_fast.ops.eigh import eigh_batched
from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
from gfnode_fast.ops.graph_layers import egnn_layer, gcn_layer, sage_layer
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights
from gfnode_fast.ops.joint_status import check_joint_status
from gfnode_fast.ops.matrix_function import matrix_function
from gfnode_fast.ops.mode_rhs import mode_rhs
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.ops.propagate_attention import propagate_attention
from gfnode_fast.ops.propagate_exact import check_status, propagate_exact
from gfnode_fast.ops.propagate_joint import propagate_joint
from gfnode_fast.ops.topology import Topology, topology

__all__ = [
    "EGNNWeights",
    "MLPWeights",
    "MeanWeights",
    "Topology",
    "check_joint_status",
    "check_status",
    "egnn_layer",
    "eigh_batched",
    "gcn_layer",
    "graph_fourier",
    "inverse_graph_fourier",
    "matrix_function",
    "mode_rhs",
    "propagate",
    "propagate_attention",
    "propagate_exact",
    "propagate_joint",
    "sage_layer",
    "topology",
]
