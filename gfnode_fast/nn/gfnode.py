"""GFNODE: FourierMD's parameters and numbers for molecules of different size in one batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.nn.backends import COORDINATES, FEATURES
from gfnode_fast.nn.fourier_md import FourierMD
from gfnode_fast.ops.graph_fourier_torch import side_by_side
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.ops.topology import Topology
from gfnode_fast.reference.checks import (
    Edges,
    check_delta_frame,
    check_edges,
    check_tensor,
    check_times,
    describe,
    refuse,
)
from gfnode_fast.reference.propagator import Propagator
from gfnode_fast.reference.time_embedding import frame_embedding
from gfnode_fast.solvers.transfers import to_device

SIGNATURE = inspect.signature(FourierMD)
SIGNATURE = SIGNATURE.replace(
    parameters=[p for name, p in SIGNATURE.parameters.items() if name != "num_atoms"]
)


class GFNODE(FourierMD):
    """GF-NODE for batches of different molecules: flat atoms, with offsets.

    Constructor, parameters and state_dict are those of `FourierMD`, so that weights move both ways;
    batches of one molecule give the same numbers. The graph basis only, and no `num_atoms`.

    Args:
        solver_mode, and the others: as of `FourierMD`. With "joint" one error norm over the whole
            batch chooses the steps, so that an answer depends on its batch mates within the
            solver's tolerance; with "exact", "per_molecule" and `fixed(step_size)` it does not.

    Raises:
        ValueError: num_atoms is given; another basis; backend="reference".

    Notes:
        Deterministic on the CPU. On a GPU PyTorch's sums over neighbours are not; with
        backend="triton" all is but the gradient of x. Time and memory linear in atoms, edges and
        output times. A molecule with fewer atoms than modes has zeros for the modes it lacks. Not
        for torch.compile.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        num_atoms = kwargs.pop("num_atoms", None)
        if num_atoms is not None:
            refuse(ValueError, "num_atoms", "None", num_atoms, "offsets say it: leave it out")
        # Bound here: the published default of num_atoms is 5, and it has a place among the others.
        super().__init__(**SIGNATURE.bind(*args, **kwargs).arguments, num_atoms=None)
        if self.fourier_basis != "graph":
            refuse(
                ValueError,
                "fourier_basis",
                "'graph' for molecules of different size",
                repr(self.fourier_basis),
                "use FourierMD for the others",
            )
        if self.backend == "reference":
            refuse(
                ValueError,
                "backend",
                "another than 'reference', which has molecules of one size only",
                repr(self.backend),
                "use 'torch'",
            )

    def forward(  # type: ignore[override]  # another layout, hence other arguments
        self,
        x: Tensor,
        h: Tensor,
        edge_index: Edges | Topology,
        edge_fea: Tensor,
        v: Tensor,
        ptr: Tensor,
        timeframes: Tensor,
        eigvecs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Predict every molecule at its own T times.

        Args:
            x: (ΣN, 3) positions of all molecules' atoms, one molecule after the other.
            h: (ΣN, in_node_nf) node features.
            edge_index: pair of (E,) long `row, col`, flat atoms; messages are summed onto `row`. Or
                their `Topology`, for callers that know the order of the edges.
            edge_fea: (E, in_edge_nf) edge features.
            v: (ΣN, 3) velocities, in units of x per frame.
            ptr: (B + 1,) int64, molecule b has the atoms ptr[b] ... ptr[b+1] - 1. On the model's
                device or the host; there, reading it waits for no GPU.
            timeframes: (B, T) output times in frames, > 0; not differentiable.
            eigvecs: (ΣN²,) the molecules' Laplacian eigenvectors, each (N, N) in columns,
                ascending, flattened, one after the other.

        Returns:
            x (T, ΣN, 3), v (T, ΣN, 3), h (T, ΣN, K+Kt), and the 0-dim KL term, 0 without the VAE.
        """
        self._check(x, h, edge_index, edge_fea, v, ptr, timeframes, eigvecs)
        assert self.delta_frame is not None
        if isinstance(edge_index, Topology):
            edges: Topology | None = edge_index
            row, col = edge_index.unsorted
        else:
            row, col = edge_index
            (edges,) = self._edges(row, col, len(x))
        offsets, num_times = to_device(ptr, x.device), timeframes.shape[1]
        sizes = offsets.diff()
        ptr = offsets if "triton" in (self.backend, self._transforms) else ptr
        # unsafe: without a look at the sizes, which would wait for a GPU.
        centre = torch.segment_reduce(x, "mean", lengths=sizes, axis=0, unsafe=True)
        centre = centre.repeat_interleave(sizes, dim=0, output_size=len(x))
        x, v, h = self._encode(x, v, h, row, col, edge_fea, edges)
        h, x, kld = self._sample(h, x)
        s = timeframes / self.delta_frame
        features = h[:, None, :]
        vectors = torch.stack((x - centre, v), dim=-1)
        embedding = frame_embedding(timeframes.T, self.time_emb_dim).to(h.dtype)
        if self.propagate_h:
            features_t = self._propagated_flat(self.freq_conv, features, s, eigvecs, ptr, embedding)
        else:
            features_t = side_by_side(h.expand(num_times, *h.shape), embedding, ptr)
        vectors_t = vectors.expand(num_times, *vectors.shape)
        if self.propagate_x:
            vectors_t = self._propagated_flat(self.freq_conv_x, vectors, s, eigvecs, ptr)
        state = self._decode(
            (vectors_t[..., 0] + centre).reshape(-1, 3),
            vectors_t[..., 1].reshape(-1, 3),
            features_t.flatten(2).flatten(0, 1),
            row,
            col,
            edge_fea,
            num_copies=num_times,
            edges=edges,
        )
        x_t, v_t, h_t = (part.view(num_times, len(x), -1) for part in state)
        return x_t, v_t, h_t, kld

    def _propagated_flat(
        self,
        propagator: Propagator,
        signal: Tensor,
        s: Tensor,
        eigvecs: Tensor,
        ptr: Tensor,
        beside: Tensor | None = None,
    ) -> Tensor:
        is_features = propagator is self.freq_conv
        part = "freq_conv" if is_features else "freq_conv_x"
        self._refuse_changes(part, "activation")
        stats = self.last_solve[part]
        stats.reset()
        with torch.autocast(signal.device.type, enabled=False):
            return propagate(
                propagator,
                signal.to(self.embedding.weight.dtype),
                s,
                eigvecs,
                stats,
                backend=self._parts()[FEATURES if is_features else COORDINATES].backend,
                transforms=self._transforms,
                solver_mode=self.solver_mode,
                max_attempts=self.max_attempts,
                activation=self.activation,
                beside=None if beside is None else beside.to(self.embedding.weight.dtype),
                ptr=ptr,
            )

    def _check(
        self,
        x: Tensor,
        h: Tensor,
        edge_index: Edges | Topology,
        edge_fea: Tensor,
        v: Tensor,
        ptr: Tensor,
        timeframes: Tensor,
        eigvecs: Tensor,
    ) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "GFNODE: `model` must run outside of torch.compile, got a graph being traced; "
                "use FourierMD for molecules of one size, or backend='compiled'"
            )
        parameter = self.embedding.weight
        dtype = None if torch.is_autocast_enabled(parameter.device.type) else parameter.dtype
        check_delta_frame(self.delta_frame)
        check_tensor("x", x, (None, 3), dtype, "positions (ΣN, 3)")
        total = len(x)
        check_tensor("h", h, (total, self.in_node_nf), dtype, "node features (ΣN, in_node_nf)")
        check_tensor("v", v, (total, 3), dtype, "velocities (ΣN, 3)")
        if isinstance(edge_index, Topology):
            if edge_index.num_nodes != total:
                expected = f"a topology of x's {total} nodes"
                refuse(ValueError, "edge_index", expected, edge_index.num_nodes, "build it of them")
            edge_index = edge_index.row, edge_index.col
        check_edges(edge_index, edge_fea, self.in_edge_nf, dtype)
        check_tensor("ptr", ptr, (None,), torch.int64, "each molecule's first atom, and ΣN")
        check_tensor("eigvecs", eigvecs, (None,), dtype, "Laplacian eigenvectors (ΣN²,)")
        solves = (self.propagate_x or self.propagate_h) and not self.no_ode
        batch, reads = len(ptr) - 1, self._reads_times()
        check_times(timeframes, batch, self.num_timesteps, solves, reads_values=reads)
        row, col = edge_index
        for name, value in {
            "x": x, "h": h, "v": v, "edge_index[0]": row, "edge_index[1]": col,
            "edge_fea": edge_fea, "ptr": ptr, "timeframes": timeframes, "eigvecs": eigvecs,
        }.items():  # fmt: skip
            if value.device != parameter.device and (name, value.device.type) != ("ptr", "cpu"):
                expected = f"on {parameter.device}, the model's device"
                refuse(ValueError, name, expected, describe(value), "move it there")
        if ptr.device.type == "cpu":  # elsewhere the look would wait for the device
            sizes = ptr.diff()
            if len(ptr) < 2 or ptr[0] != 0 or ptr[-1] != total or bool((sizes < 1).any()):
                expected = f"ascending from 0 to x's {total} rows"
                refuse(ValueError, "ptr", expected, ptr.tolist()[:8], "pass the running sum")
            if len(eigvecs) != int(sizes.square().sum()):
                expected = f"of shape ({int(sizes.square().sum())},), Σ N² of ptr"
                refuse(ValueError, "eigvecs", expected, describe(eigvecs), "flatten and join them")


GFNODE.__signature__ = SIGNATURE  # type: ignore[attr-defined]
