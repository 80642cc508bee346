"""Spectral propagation: transform over the atoms, one ODE per retained mode, transform back at T
times.

Shapes: B molecules, N atoms, M modes, T times, C channels, D = 1 for node features and 3 for the
Cartesian components, which ride along as extra batch entries (channels are then position and
velocity).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchdiffeq import odeint

from gfnode_fast.reference.time_embedding import SolverTimeEmbedding

MLP_WIDTH = 128
MODE_INTERACTIONS = ("no_interaction", "attention", "concat")
FOURIER_BASES = ("graph", "linear")


class ModeRHS(nn.Module):
    """Right-hand side dy/ds = g(s, y) of the graph basis (and of no basis): y (M, B, C), s 0-dim
    or None.

    z = [y, e(s)], mixed across modes by attention or an MLP, then one matrix per mode:
    dy/ds[m] = z[m] @ weights1[m].
    """

    def __init__(
        self, channels: int, num_modes: int, mode_interaction: str, time_mode: str, time_width: int
    ) -> None:
        super().__init__()
        width = channels + (0 if time_mode == "none" else time_width)
        self.mode_interaction = mode_interaction
        self.time_mode = time_mode
        self.time_embedding = (
            None if time_mode == "none" else SolverTimeEmbedding(time_mode, time_width)
        )
        self.weights1 = nn.Parameter(torch.rand(num_modes, width, channels) / (channels * channels))
        if mode_interaction == "attention":
            self.attn = nn.MultiheadAttention(width, num_heads=1)
            self.post_attn_linear = nn.Linear(width, width)
        elif mode_interaction == "concat":
            flat = num_modes * width
            self.mlp = nn.Sequential(
                nn.Linear(flat, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, flat)
            )
        self.time_mlp = (
            nn.Sequential(nn.Linear(1, MLP_WIDTH), nn.ReLU(), nn.Linear(MLP_WIDTH, time_width))
            if time_mode == "mlp"
            else None
        )

    def forward(self, s: Tensor | None, y: Tensor) -> Tensor:
        z = y
        if self.time_embedding is not None:
            assert s is not None
            e = self.time_embedding(s, self.time_mlp).to(y.dtype)
            z = torch.cat((y, e.expand(*y.shape[:2], -1)), dim=-1)
        if self.mode_interaction == "attention":
            z = self.post_attn_linear(self.attn(z, z, z)[0])
        elif self.mode_interaction == "concat":
            num_modes, batch, width = z.shape
            z = self.mlp(z.transpose(0, 1).reshape(batch, -1))
            z = z.view(batch, num_modes, width).transpose(0, 1)
        return torch.einsum("mbi,mio->mbo", z, self.weights1)


class LinearBasisRHS(nn.Module):
    """Right-hand side of the linear (FFT) basis: dy/ds[m] = y[m] @ W[..., m], complex y (M, B,
    C).
    """

    def __init__(self, channels: int, num_modes: int) -> None:
        super().__init__()
        self.weights1 = nn.Parameter(
            torch.rand(channels, channels, num_modes, 2) / (channels * channels)
        )

    def forward(self, s: Tensor | None, y: Tensor) -> Tensor:
        return torch.einsum("mbi,iom->mbo", y, torch.view_as_complex(self.weights1))


class ModeODE(nn.Module):
    """One torchdiffeq solve for the whole batch on the union of all molecules' times."""

    def __init__(
        self,
        ode_func: ModeRHS | LinearBasisRHS,
        *,
        solver: str,
        rtol: float,
        atol: float,
        no_ode: bool,
    ) -> None:
        super().__init__()
        self.ode_func = ode_func
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.no_ode = no_ode

    def forward(self, y0: Tensor, s: Tensor) -> Tensor:
        """y0 (M, B, D, C), s (B, T) normalised times > 0 → (T, B, M, D, C)."""
        return self.solve(self.ode_func, y0, s)

    def solve(self, function: Callable[..., Tensor], y0: Tensor, s: Tensor) -> Tensor:
        """`forward` with another right-hand side."""
        num_modes, batch, components, channels = y0.shape
        num_times = s.shape[1]
        state = y0.reshape(num_modes, batch * components, channels)
        if self.no_ode:
            y: Tensor = function(None, state).view_as(y0).transpose(0, 1)
            return y.expand(num_times, *y.shape)
        union, position = torch.unique(s, sorted=True, return_inverse=True)
        times = torch.cat((union.new_zeros(1), union))
        solution = odeint(
            function, state, times, rtol=self.rtol, atol=self.atol, method=self.solver
        )
        solution = solution.view(-1, *y0.shape).transpose(1, 2)  # (L, B, M, D, C)
        molecule = torch.arange(batch, device=s.device)
        own: Tensor = solution[position.T + 1, molecule]
        return own


class Propagator(nn.Module):
    """Transform, solve, transform back: (B, N, D, C) at time 0 → (T, B, N, D, C).

    `basis` is "graph" (Laplacian eigenvectors), "linear" (rfft over the atom axis) or None (no
    transform).
    """

    def __init__(self, basis: str | None, num_modes: int, t_conv: ModeODE) -> None:
        super().__init__()
        self.basis = basis
        self.num_modes = num_modes
        self.t_conv = t_conv

    def forward(self, signal: Tensor, s: Tensor, eigvecs: Tensor | None) -> Tensor:
        modes = self.t_conv(self.transform(signal, eigvecs), s)
        return self.transform_back(modes, signal.shape[1], eigvecs)

    def transform(self, signal: Tensor, eigvecs: Tensor | None) -> Tensor:
        """(B, N, D, C) → (M, B, D, C)."""
        if self.basis is None:
            return signal.transpose(0, 1)
        if self.basis == "linear":
            spectrum: Tensor = torch.fft.rfft(signal, dim=1)
            return spectrum[:, : self.num_modes].transpose(0, 1)
        assert eigvecs is not None
        return torch.einsum("bnm,bndc->mbdc", eigvecs, signal)[: self.num_modes]

    def transform_back(self, modes: Tensor, num_atoms: int, eigvecs: Tensor | None) -> Tensor:
        """(T, B, M, D, C) → (T, B, N, D, C)."""
        if self.basis is None:
            return modes
        if self.basis == "linear":
            signal: Tensor = torch.fft.irfft(modes, n=num_atoms, dim=2)
            return signal
        assert eigvecs is not None
        return torch.einsum("bnm,tbmdc->tbndc", eigvecs[:, :, : self.num_modes], modes)
