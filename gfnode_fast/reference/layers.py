"""Graph layers of the encoder and decoder: EGNN, GraphSAGE, GCN.

Shapes: n nodes, E directed edges; messages run from `col` and are summed onto `row`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_DISPLACEMENT = 100.0
NORM_EPSILON = 1e-12
COORDINATE_WIDTH = 6  # x and v, carried beside h by GraphSAGE and GCN


class MLP(nn.Module):
    """Linear(in, hidden) → act → Linear(hidden, out), with `act` again at the end if
    `activate_last`.

    `flat` widens the hidden layer four times and uses Tanh for every activation.
    """

    def __init__(
        self,
        in_width: int,
        hidden_width: int,
        out_width: int,
        activation: nn.Module,
        *,
        flat: bool,
        activate_last: bool = False,
    ) -> None:
        super().__init__()
        if flat:
            activation, hidden_width = nn.Tanh(), 4 * hidden_width
        modules = [
            nn.Linear(in_width, hidden_width),
            activation,
            nn.Linear(hidden_width, out_width),
        ]
        if activate_last:
            modules.append(activation)
        self.mlp = nn.Sequential(*modules)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.mlp(z)
        return out


class EdgeMessage(nn.Module):
    """m = MLP([q, h_row, h_col, edge features])."""

    def __init__(self, width: int, edge_width: int, activation: nn.Module, *, flat: bool) -> None:
        super().__init__()
        self.scalar_net = MLP(
            2 * width + 1 + edge_width, width, width, activation, flat=flat, activate_last=True
        )

    def forward(self, z: Tensor) -> Tensor:
        message: Tensor = self.scalar_net(z)
        return message


def sum_onto_nodes(values: Tensor, row: Tensor, num_nodes: int) -> Tensor:
    """Sum edge values (E, C) onto their row; (num_nodes, C)."""
    return values.new_zeros(num_nodes, values.shape[1]).index_add(0, row, values)


def mean_onto_nodes(values: Tensor, row: Tensor, num_nodes: int) -> Tensor:
    """Mean of edge values (E, C) over each row's edges, 0 for a node without edges; (num_nodes,
    C).
    """
    degree = sum_onto_nodes(torch.ones_like(values[:, :1]), row, num_nodes)
    return sum_onto_nodes(values, row, num_nodes) / degree.clamp(min=1)


def difference(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """x_row - x_col, (E, 3)."""
    return x[row] - x[col]


class EGNNLayer(nn.Module):
    """Equivariant layer with velocities (E(n)-GNN, arXiv 2102.09844, as used by the published
    model).
    """

    def __init__(
        self, width: int, edge_width: int, activation: nn.Module, *, flat: bool, norm: bool
    ) -> None:
        super().__init__()
        self.norm = norm
        self.difference = difference  # replaceable: see nn/fourier_md.py
        self.edge_message_net = EdgeMessage(width, edge_width, activation, flat=flat)
        self.coord_net = MLP(width, width, 1, activation, flat=flat)
        self.node_v_net = MLP(width, width, 1, activation, flat=flat)
        self.node_net = MLP(2 * width, width, width, activation, flat=flat)

    def forward(
        self, x: Tensor, v: Tensor, h: Tensor, row: Tensor, col: Tensor, edge_fea: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, v (n, 3); h (n, width); row, col (E,); edge_fea (E, edge_width) → new x, v, h."""
        num_nodes = x.shape[0]
        r = self.difference(x, row, col)
        q = (r * r).sum(dim=-1, keepdim=True)
        if self.norm:
            q = q / q.abs().clamp(min=NORM_EPSILON)
        message = self.edge_message_net(torch.cat((q, h[row], h[col], edge_fea), dim=-1))
        displacement = mean_onto_nodes(r * self.coord_net(message), row, num_nodes)
        displacement = displacement.clamp(-MAX_DISPLACEMENT, MAX_DISPLACEMENT)
        x = x + self.node_v_net(h) * v + displacement
        h = self.node_net(torch.cat((h, sum_onto_nodes(message, row, num_nodes)), dim=-1))
        return x, v, h


class _CoordinateFeatureLayer(nn.Module):
    """Message passing on c = [x, v, h], residual, coordinates treated as features."""

    concatenate_self: (
        bool  # whether the node MLP sees the node's own c beside its neighbourhood mean
    )

    def __init__(
        self, width: int, edge_width: int, activation: nn.Module, *, flat: bool, norm: bool
    ) -> None:
        # `norm` concerns distances, which these layers do not form; the published model ignores it
        # here.
        super().__init__()
        c = width + COORDINATE_WIDTH
        self.edge_mlp = MLP(2 * c + edge_width, c, c, activation, flat=flat)
        self.node_mlp = MLP(2 * c if self.concatenate_self else c, c, c, activation, flat=flat)

    def forward(
        self, x: Tensor, v: Tensor, h: Tensor, row: Tensor, col: Tensor, edge_fea: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x, v (n, 3); h (n, width); row, col (E,); edge_fea (E, edge_width) → new x, v, h."""
        c = torch.cat((x, v, h), dim=-1)
        message = self.edge_mlp(torch.cat((c[row], c[col], edge_fea), dim=-1))
        neighbourhood = mean_onto_nodes(message, row, c.shape[0])
        if self.concatenate_self:
            neighbourhood = torch.cat((c, neighbourhood), dim=-1)
        x, v, h = (c + self.node_mlp(neighbourhood)).split((3, 3, h.shape[1]), dim=-1)
        return x, v, h


class SAGELayer(_CoordinateFeatureLayer):
    """GraphSAGE: c' = c + MLP([c, mean message])."""

    concatenate_self = True


class GCNLayer(_CoordinateFeatureLayer):
    """GCN: c' = c + MLP(mean message)."""

    concatenate_self = False


GraphLayer = EGNNLayer | SAGELayer | GCNLayer
GRAPH_LAYERS: dict[str, type[GraphLayer]] = {
    "egnn": EGNNLayer,
    "sage": SAGELayer,
    "graphsage": SAGELayer,
    "gcn": GCNLayer,
}
