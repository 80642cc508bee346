"""A model of the published kind written by somebody else: the same attributes and state_dict, no
code in common with this package (EGNN, graph basis, one ODE per mode).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchdiffeq import odeint


class TwoLayer(nn.Module):
    def __init__(self, wide: int, hidden: int, out: int, *, last: bool = False) -> None:
        super().__init__()
        modules = [nn.Linear(wide, hidden), nn.SiLU(), nn.Linear(hidden, out)]
        self.mlp = nn.Sequential(*modules, *([nn.SiLU()] if last else []))

    def forward(self, z: Tensor) -> Tensor:
        return self.mlp(z)


class MessageNet(nn.Module):
    def __init__(self, wide: int, hidden: int) -> None:
        super().__init__()
        self.scalar_net = TwoLayer(wide, hidden, hidden, last=True)


class Layer(nn.Module):
    def __init__(self, width: int, edge_width: int) -> None:
        super().__init__()
        self.edge_message_net = MessageNet(2 * width + 1 + edge_width, width)
        self.coord_net = TwoLayer(width, width, 1)
        self.node_v_net = TwoLayer(width, width, 1)
        self.node_net = TwoLayer(2 * width, width, width)

    def forward(self, x: Tensor, v: Tensor, h: Tensor, row: Any, col: Any, e: Tensor) -> Any:
        difference = x[row] - x[col]
        distance = difference.square().sum(1, keepdim=True)
        message = self.edge_message_net.scalar_net(torch.cat((distance, h[row], h[col], e), 1))
        incidence = (torch.arange(len(x))[:, None] == row).to(x.dtype)
        force = incidence @ (difference * self.coord_net(message))
        force = force / incidence.sum(1, keepdim=True).clamp(min=1)
        x = x + self.node_v_net(h) * v + force.clamp(-100, 100)
        return x, v, self.node_net(torch.cat((h, incidence @ message), 1))


class Dynamics(nn.Module):
    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.weights1 = nn.Parameter(torch.rand(modes, channels, channels) / channels**2)

    def forward(self, s: Tensor, y: Tensor) -> Tensor:
        return y @ self.weights1


class TimeConv(nn.Module):
    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.ode_func = Dynamics(channels, modes)


class FrequencyConv(nn.Module):
    def __init__(self, channels: int, modes: int) -> None:
        super().__init__()
        self.t_conv = TimeConv(channels, modes)


class ForeignMD(nn.Module):
    """The published model; constructor arguments as in `model_inputs.constructor`."""

    def __init__(self, **c: Any) -> None:
        super().__init__()
        width, self.time_width = c["hidden_nf"], c["time_emb_dim"]
        self.encode_layers, self.decode_layers = nn.ModuleList(), nn.ModuleList()
        self.embedding = nn.Linear(c["in_node_nf"], width)
        for _ in range(c["n_layers"]):
            self.encode_layers.append(Layer(width, c["in_edge_nf"]))
        self.freq_conv = FrequencyConv(width, c["num_modes"])
        self.freq_conv_x = FrequencyConv(2, c["num_modes"])
        for _ in range(c["n_layers"]):
            self.decode_layers.append(Layer(width + self.time_width, c["in_edge_nf"]))
        self.activation, self.solver, self.rtol, self.atol = nn.SiLU(), "dopri5", 1e-3, 1e-4
        self.num_modes, self.num_timesteps = c["num_modes"], c["num_timesteps"]
        self.num_atoms, self.delta_frame = c["num_atoms"], c["delta_frame"]
        self.fourier_basis, self.norm, self.no_ode = "graph", False, False
        self.propagate_x = self.propagate_h = True

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        edge_index: Any,
        edge_fea: Tensor,
        v: Tensor,
        loc_mean: Tensor,
        timeframes: Tensor,
        U_batch: Tensor,
    ) -> tuple[Tensor, ...]:
        row, col = edge_index
        num_times, total = timeframes.shape[1], len(x)
        h = self.embedding(h)
        for layer in self.encode_layers:
            x, v, h = layer(x, v, h, row, col, edge_fea)
        s = timeframes / self.delta_frame
        batch, n = len(U_batch), self.num_atoms
        features = self._propagate(self.freq_conv, h.view(batch, n, 1, -1), s, U_batch)
        vectors = torch.stack((x - loc_mean, v), -1).view(batch, n, 3, 2)
        vectors = self._propagate(self.freq_conv_x, vectors, s, U_batch).reshape(-1, 3, 2)
        x, v = vectors[..., 0] + loc_mean.repeat(num_times, 1), vectors[..., 1]
        half = self.time_width // 2
        f = torch.exp(torch.arange(half) * -(math.log(10_000) / (half - 1)))
        angle = timeframes.T.float().unsqueeze(-1) * f
        when = torch.cat((angle.sin(), angle.cos()), -1).repeat_interleave(n, 1).flatten(0, 1)
        h = torch.cat((features.reshape(num_times * total, -1), when.to(h.dtype)), 1)
        offset = torch.arange(num_times)[:, None] * total
        row, col = (offset + row).flatten(), (offset + col).flatten()
        for layer in self.decode_layers:
            x, v, h = layer(x, v, h, row, col, edge_fea.repeat(num_times, 1))
        return x, v, h, torch.zeros(())

    def _propagate(self, conv: FrequencyConv, signal: Tensor, s: Tensor, u: Tensor) -> Tensor:
        u = u[:, :, : self.num_modes]
        y0 = torch.einsum("bnm,bndc->mbdc", u, signal)
        union, position = torch.unique(s, return_inverse=True)
        times = torch.cat((union.new_zeros(1), union))
        options = {"rtol": self.rtol, "atol": self.atol, "method": self.solver}
        y = odeint(conv.t_conv.ode_func, y0.flatten(1, 2), times, **options).view(-1, *y0.shape)
        own = y[position.T + 1, :, torch.arange(len(s))]
        return signal + self.activation(torch.einsum("bnm,tbmdc->tbndc", u, own))
