"""FourierMD, the published GF-NODE model (arXiv 2411.01600)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gfnode_fast.reference.checks import Edges, check_constructor, check_forward
from gfnode_fast.reference.layers import GRAPH_LAYERS
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE, ModeRHS, Propagator
from gfnode_fast.reference.time_embedding import frame_embedding

VECTOR_CHANNELS = 2  # position and velocity


class FourierMD(nn.Module):
    """Graph Fourier Neural ODE: EGNN encoder → spectral ODE → EGNN decoder at T requested times.

    Args:
        n_layers: encoder layers, and decoder layers.
        in_node_nf: width of the node features `h`.
        in_edge_nf: width of the edge features.
        hidden_nf: hidden width K.
        activation: activation of every MLP and of the propagated signals.
        device: where the parameters are placed; `model.to(...)` moves them later.
        with_v: must be True; the model always integrates velocities.
        flat: Tanh and four times wider hidden layers in the graph layers.
        norm: normalise squared distances to 1 (EGNN only).
        num_modes: M, retained modes.
        num_timesteps: T, output times per molecule.
        time_emb_dim: Kt, width of the time embeddings, at least 4 (even for rope).
        num_atoms: N, atoms per molecule; may be set later, None until then.
        solver: any torchdiffeq method that needs no options; `rtol`, `atol` its tolerances.
        delta_frame: frames that make one unit of normalised time.
        fourier_basis: "graph" (Laplacian eigenvectors), "linear" (FFT over atoms), None with
            `no_fourier`.
        no_fourier: no transform over atoms; M must equal N.
        no_ode: one application of the right-hand side instead of a solve.
        use_vae: sample the encoded features and positions, with a KL term.
        gnn_ablation_mode: "egnn", "sage" / "graphsage" or "gcn", any case.
        mode_interaction: "no_interaction", "attention" or "concat".
        time_mode: "none", "concat", "mlp", "posenc" or "rope".
        propagate_x, propagate_h: whether positions and velocities, and features, are propagated.

    Raises:
        TypeError, ValueError: an argument with which the published model crashes; the message
            names it.

    Notes:
        Positions and velocities are in the data's own units (Å and Å/frame for MD17). The
        activation applied to propagated vectors makes the model not rotation-equivariant, as
        published. One solver call serves the whole batch, so a molecule's result depends, within
        tolerance, on its batch mates.
    """

    def __init__(
        self,
        n_layers: int,
        in_node_nf: int,
        in_edge_nf: int,
        hidden_nf: int,
        activation: nn.Module = nn.SiLU(),  # noqa: B008 - published default, stateless
        device: str | torch.device = "cpu",
        with_v: bool = False,
        flat: bool = False,
        norm: bool = False,
        num_modes: int = 2,
        num_timesteps: int = 8,
        time_emb_dim: int = 32,
        num_atoms: int | None = 5,
        solver: str = "dopri5",
        rtol: float = 1e-3,
        atol: float = 1e-4,
        delta_frame: float | None = None,
        fourier_basis: str | None = None,
        no_fourier: bool = False,
        no_ode: bool = False,
        use_vae: bool = False,
        gnn_ablation_mode: str = "EGNN",
        mode_interaction: str = "no_interaction",
        time_mode: str = "none",
        propagate_x: bool = True,
        propagate_h: bool = True,
    ) -> None:
        super().__init__()
        check_constructor(
            counts={
                "n_layers": n_layers,
                "in_node_nf": in_node_nf,
                "in_edge_nf": in_edge_nf,
                "hidden_nf": hidden_nf,
                "num_modes": num_modes,
                "num_timesteps": num_timesteps,
            },
            flags={
                "with_v": with_v,
                "flat": flat,
                "norm": norm,
                "no_fourier": no_fourier,
                "no_ode": no_ode,
                "use_vae": use_vae,
                "propagate_x": propagate_x,
                "propagate_h": propagate_h,
            },
            activation=activation,
            time_emb_dim=time_emb_dim,
            num_atoms=num_atoms,
            solver=solver,
            rtol=rtol,
            atol=atol,
            delta_frame=delta_frame,
            fourier_basis=fourier_basis,
            gnn_ablation_mode=gnn_ablation_mode,
            mode_interaction=mode_interaction,
            time_mode=time_mode,
        )
        self.n_layers = n_layers
        self.in_node_nf = in_node_nf
        self.in_edge_nf = in_edge_nf
        self.hidden_nf = hidden_nf
        self.flat = flat
        self.norm = norm
        self.num_modes = num_modes
        self.num_timesteps = num_timesteps
        self.time_emb_dim = time_emb_dim
        self.num_atoms = num_atoms
        self.solver = solver
        self.rtol = rtol
        self.atol = atol
        self.delta_frame = delta_frame
        self.fourier_basis = fourier_basis
        self.no_ode = no_ode
        self.use_vae = use_vae
        self.gnn_ablation_mode = gnn_ablation_mode.lower()
        self.mode_interaction = mode_interaction
        self.time_mode = time_mode
        self.propagate_x = propagate_x
        self.propagate_h = propagate_h

        # Registration order numbers the parameters of a saved optimizer, construction order draws
        # the initial values; the published model's differ, hence the two ModuleLists that are
        # filled later.
        self.encode_layers = nn.ModuleList()
        self.decode_layers = nn.ModuleList()
        self.embedding = nn.Linear(in_node_nf, hidden_nf)
        self._append_layers(self.encode_layers, hidden_nf, activation)
        if use_vae:
            self.fc_mu_h = nn.Linear(hidden_nf, hidden_nf)
            self.fc_logvar_h = nn.Linear(hidden_nf, hidden_nf)
            self.fc_mu_x = nn.Linear(3, 3)
            self.fc_logvar_x = nn.Linear(3, 3)
        self.freq_conv = self._propagator(hidden_nf)
        self.freq_conv_x = self._propagator(VECTOR_CHANNELS)
        self._append_layers(self.decode_layers, hidden_nf + time_emb_dim, activation)
        # Outside the module tree: its place there is inside the layers, once per MLP.
        object.__setattr__(self, "activation", activation)
        self.to(device)

    activation: nn.Module

    def _append_layers(self, layers: nn.ModuleList, width: int, activation: nn.Module) -> None:
        layer = GRAPH_LAYERS[self.gnn_ablation_mode]
        for _ in range(self.n_layers):
            layers.append(layer(width, self.in_edge_nf, activation, flat=self.flat, norm=self.norm))

    def _propagator(self, channels: int) -> Propagator:
        rhs = (
            LinearBasisRHS(channels, self.num_modes)
            if self.fourier_basis == "linear"
            else ModeRHS(
                channels, self.num_modes, self.mode_interaction, self.time_mode, self.time_emb_dim
            )
        )
        ode = ModeODE(rhs, solver=self.solver, rtol=self.rtol, atol=self.atol, no_ode=self.no_ode)
        return Propagator(self.fourier_basis, self.num_modes, ode)

    def forward(
        self,
        x: Tensor,
        h: Tensor,
        edge_index: Edges,
        edge_fea: Tensor,
        v: Tensor | None = None,
        loc_mean: Tensor | None = None,
        timeframes: Tensor | None = None,
        U_batch: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict positions, velocities and features at each molecule's T times.

        Args:
            x: (B*N, 3) positions; molecule b owns rows b*N ... b*N+N-1.
            h: (B*N, in_node_nf) node features.
            edge_index: pair of (E,) long `row, col`; messages are summed onto `row`.
            edge_fea: (E, in_edge_nf) edge features.
            v: (B*N, 3) velocities, in units of x per frame.
            loc_mean: (B*N, 3) each molecule's centroid, repeated per atom.
            timeframes: (B, T) output times in frames, > 0; not differentiable.
            U_batch: (B, N, N) Laplacian eigenvectors in columns, ascending; graph basis only.

        Returns:
            x (T*B*N, 3), v (T*B*N, 3), h (T*B*N, K+Kt), ordered [t, b, n], and the 0-dim KL term,
            0 without the VAE.
        """
        batch, num_atoms = check_forward(
            x=x,
            h=h,
            edge_index=edge_index,
            edge_fea=edge_fea,
            v=v,
            loc_mean=loc_mean,
            timeframes=timeframes,
            eigvecs=U_batch,
            num_atoms=self.num_atoms,
            num_modes=self.num_modes,
            num_timesteps=self._expected_times(),
            delta_frame=self.delta_frame,
            in_node_nf=self.in_node_nf,
            in_edge_nf=self.in_edge_nf,
            basis=self.fourier_basis,
            solves=(self.propagate_x or self.propagate_h) and not self.no_ode,
            reads_times=self._reads_times(),
            parameter=self.embedding.weight,
        )
        assert v is not None
        assert loc_mean is not None
        assert timeframes is not None
        assert self.delta_frame is not None
        row, col = edge_index
        edges = self._edges(row, col, x.shape[0])
        x, v, h = self._encode(x, v, h, row, col, edge_fea, *edges)
        h, x, kld = self._sample(h, x)
        s = timeframes / self.delta_frame
        embedding = frame_embedding(timeframes.T, self.time_emb_dim)
        shape = (batch, num_atoms)
        x, v, h = self._propagate(x, v, h, loc_mean, s, U_batch, shape, embedding)
        x, v, h = self._decode(x, v, h, row, col, edge_fea, timeframes.shape[1], *edges)
        return x, v, h, kld

    def _edges(self, row: Tensor, col: Tensor, num_nodes: int) -> tuple[()]:
        """What a faster model makes of the edges, once for `_encode` and `_decode`."""
        return ()

    def _encode(
        self, x: Tensor, v: Tensor, h: Tensor, row: Tensor, col: Tensor, edge_fea: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = self.embedding(h)
        for layer in self.encode_layers:
            x, v, h = layer(x, v, h, row, col, edge_fea)
        return x, v, h

    def _sample(self, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reparametrised h and x with their KL divergence from N(0, 1); the identity without the
        VAE.
        """
        if not self.use_vae:
            return h, x, torch.zeros((), dtype=torch.float32, device=x.device)
        h, kld_h = _reparametrise(self.fc_mu_h(h), self.fc_logvar_h(h))
        x, kld_x = _reparametrise(self.fc_mu_x(x), self.fc_logvar_x(x))
        return h, x, (kld_h + kld_x).mean()

    def _propagate(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        loc_mean: Tensor,
        s: Tensor,
        eigvecs: Tensor | None,
        batch_shape: tuple[int, int],
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Encoded state at time 0 → (T*B*N, ...) at normalised times s (B, T), residual
        included; `beside` (T, B, Kt) stands after the features of each of a molecule's atoms.
        """
        num_times = s.shape[1]
        features = h.view(*batch_shape, 1, -1)
        vectors = torch.stack((x - loc_mean, v), dim=-1).view(*batch_shape, 3, VECTOR_CHANNELS)
        if self.propagate_h:
            features_t = self._propagated(self.freq_conv, features, s, eigvecs, beside)
        else:
            features_t = side_by_side(features.expand(num_times, *features.shape), beside)
        vectors_t = vectors.expand(num_times, *vectors.shape)
        if self.propagate_x:
            vectors_t = self._propagated(self.freq_conv_x, vectors, s, eigvecs)
        x_t = vectors_t[..., 0].reshape(-1, 3) + loc_mean.repeat(num_times, 1)
        return x_t, vectors_t[..., 1].reshape(-1, 3), features_t.reshape(-1, features_t.shape[-1])

    def _expected_times(self) -> int | None:
        """The width that times are checked for, None for any."""
        return self.num_timesteps

    def _reads_times(self) -> bool:
        """Whether the values of the times are checked before the solve, which waits for a GPU."""
        return True

    def _propagated(
        self,
        propagator: Propagator,
        signal: Tensor,
        s: Tensor,
        eigvecs: Tensor | None,
        beside: Tensor | None = None,
    ) -> Tensor:
        """Signal at times s, residual included, and `beside`: the one place where a faster model
        puts its own propagation.
        """
        out: Tensor = signal + self.activation(propagator(signal, s, eigvecs))
        return side_by_side(out, beside)

    def _decode(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        edge_fea: Tensor,
        num_copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder layers on `num_copies` copies of the graph."""
        offset = torch.arange(num_copies, device=x.device) * (x.shape[0] // num_copies)
        row = (offset[:, None] + row).reshape(-1)
        col = (offset[:, None] + col).reshape(-1)
        edge_fea = edge_fea.repeat(num_copies, 1)
        for layer in self.decode_layers:
            x, v, h = layer(x, v, h, row, col, edge_fea)
        return x, v, h


def side_by_side(signal: Tensor, beside: Tensor | None) -> Tensor:
    """(T, B, N, D, C) and (T, B, W), the same for all atoms → (T, B, N, D, C + W)."""
    if beside is None:
        return signal
    beside = beside.to(signal.dtype)[:, :, None, None].expand(*signal.shape[:-1], -1)
    return torch.cat((signal, beside), dim=-1)


def _reparametrise(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    """mu + eps exp(logvar / 2) and its KL divergence from N(0, 1) per atom."""
    sample = mu + torch.randn_like(mu) * torch.exp(0.5 * logvar)
    kld = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(dim=-1)
    return sample, kld
