"""The one way to make inputs: real molecules, seeded, the same for every contender of a row."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.peptides import SYSTEMS, capped_peptide, vibrating
from benchmarks.registry import MODELS, PEPTIDE, Row
from gfnode_fast import reference
from gfnode_fast.data import (
    Batch,
    MolecularGraph,
    Trajectory,
    WindowDataset,
    build_graph,
    draw_windows,
    load_sample,
)

DELTA_FRAME = 3000
NUM_TIMES = 8
MAX_WINDOWS = 4096  # distinct windows; a larger batch repeats them, its union of times being full
PEPTIDE_FRAMES = 22_000  # three blocks of windows of DELTA_FRAME
SEED = 0


def dtype_of(precision: str) -> torch.dtype:
    """Of parameters and inputs: tf32 and bf16 are modes of float32 models."""
    return torch.float64 if precision == "fp64" else torch.float32


@lru_cache(maxsize=2)
def _trajectory(molecule: str) -> Trajectory:
    if molecule.startswith(PEPTIDE):
        residues = SYSTEMS[int(molecule.removeprefix(PEPTIDE))]
        return vibrating(*capped_peptide(residues), PEPTIDE_FRAMES)
    return load_sample(molecule)


def molecular_graph(molecule: str) -> MolecularGraph:
    trajectory = _trajectory(molecule)
    return build_graph(trajectory.positions[0], trajectory.numbers)


@lru_cache(maxsize=8)
def _dataset(molecule: str, times: str, dtype: torch.dtype, windows: int) -> WindowDataset:
    trajectory = _trajectory(molecule)
    graph = molecular_graph(molecule)
    drawn = draw_windows(
        trajectory,
        num_timesteps=NUM_TIMES,
        delta_frame=DELTA_FRAME,
        sampling=times,
        split="blocks",
        sizes=(windows, 1, 1),
        seed=SEED,
    )
    return WindowDataset(trajectory, graph, drawn["train"], dtype=dtype)


def make_batch(row: Row, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
    """`row.batch` windows of the row's molecule on `device`."""
    dtype = dtype or dtype_of(row.precision)
    dataset = _dataset(row.molecule, row.times, dtype, min(row.batch, MAX_WINDOWS)).to(device)
    index = torch.arange(row.batch, device=device) % len(dataset)
    return dataset.batch(index)


def normal(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Seeded normal numbers, the same up to rounding in every dtype and on every device."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def union_size(batch: Batch) -> int:
    """L, the number of distinct times in a batch."""
    return batch.timeframes.unique().numel()


def model_config(row: Row) -> dict[str, Any]:
    """Published constructor arguments of the row's model."""
    return {
        "n_layers": 5,
        "in_node_nf": 2,
        "in_edge_nf": 5,
        "hidden_nf": 64,
        "with_v": True,
        "num_modes": row.num_modes,
        "num_timesteps": NUM_TIMES,
        "time_emb_dim": 32,
        "num_atoms": _trajectory(row.molecule).num_atoms,
        "delta_frame": DELTA_FRAME,
        "fourier_basis": "graph",
        **MODELS[row.model],
    }


def initial_state(row: Row) -> dict[str, Tensor]:
    """The published initial values, the same for every contender."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return reference.FourierMD(**model_config(row)).state_dict()


def laplacians(row: Row, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(B, N, N) Laplacians of random connected graphs, degrees about 4, for "random N" rows."""
    size = int(row.molecule.split()[1])
    generator = torch.Generator().manual_seed(SEED)
    linked = torch.rand(row.batch, size, size, generator=generator) < 2 / size
    linked |= torch.eye(size, dtype=torch.bool).roll(1, dims=1)  # a ring keeps it connected
    adjacency = (linked | linked.transpose(1, 2)).to(dtype)
    adjacency.diagonal(dim1=1, dim2=2).zero_()
    return (torch.diag_embed(adjacency.sum(-1)) - adjacency).to(device)
