"""Small random inputs for whole-model tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def constructor(**changes: Any) -> dict[str, Any]:
    """A small working FourierMD configuration, with changes."""
    return {
        "n_layers": 1,
        "in_node_nf": 2,
        "in_edge_nf": 3,
        "hidden_nf": 8,
        "activation": nn.SiLU(),
        "with_v": True,
        "num_modes": 3,
        "num_timesteps": 4,
        "time_emb_dim": 6,
        "num_atoms": 5,
        "delta_frame": 100,
        "fourier_basis": "graph",
    } | changes


def inputs(
    batch: int = 2,
    num_atoms: int = 5,
    num_timesteps: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    delta_frame: int = 100,
) -> dict[str, Any]:
    """Ring molecules with second neighbours, random features, irregular times."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    atoms = torch.arange(num_atoms)
    steps = [1, -1, 2, -2]
    row = atoms.repeat(len(steps))
    col = torch.cat([(atoms + step) % num_atoms for step in steps])
    offset = torch.arange(batch)[:, None] * num_atoms
    row, col = (row + offset).reshape(-1), (col + offset).reshape(-1)
    x = randn(batch * num_atoms, 3)
    laplacian = torch.diag(torch.full((num_atoms,), 4.0, dtype=torch.float64))
    laplacian[row[row < num_atoms], col[row < num_atoms]] = -1.0
    eigvecs = torch.linalg.eigh(laplacian)[1].to(dtype)
    centroid = x.view(batch, num_atoms, 3).mean(dim=1, keepdim=True)
    times = torch.stack(
        [
            torch.randperm(delta_frame, generator=generator)[:num_timesteps].sort().values + 1
            for _ in range(batch)
        ]
    )
    return {
        "x": x,
        "h": randn(batch * num_atoms, 2),
        "edge_index": (row, col),
        "edge_fea": randn(row.shape[0], 3),
        "v": randn(batch * num_atoms, 3),
        "loc_mean": centroid.expand(-1, num_atoms, -1).reshape(-1, 3).contiguous(),
        "timeframes": times.to(dtype),
        "U_batch": eigvecs.expand(batch, -1, -1).contiguous(),
    }


def moved(given: dict[str, Any], device: str | torch.device) -> dict[str, Any]:
    """The same inputs on a device."""
    return {
        key: tuple(t.to(device) for t in value) if isinstance(value, tuple) else value.to(device)
        for key, value in given.items()
    }
