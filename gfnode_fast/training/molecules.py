"""What a run is trained on, one molecule or several, and what its checkpoints say of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.data import MixedDataset, MolecularGraph, WindowDataset, save_windows
from gfnode_fast.training.checkpoint import Checkpoint, CheckpointError
from gfnode_fast.training.config import ConfigError, TrainConfig, config_from_dict, config_to_dict
from gfnode_fast.training.problem import (
    Problem,
    graph_from_tensors,
    graph_to_tensors,
    load_problem,
    warn_if_modes_cut,
)


@dataclass(frozen=True)
class StoredMolecule:
    """What a checkpoint says of a molecule.

    Attributes:
        graph: with the eigenvector basis of the training.
        num_atoms: N.
        dt_fs: time between frames of its trajectory, fs.
        data_hashes: of its trajectory and windows.
        largest_number: the atomic number that the node features are scaled by; None: its own.
    """

    graph: MolecularGraph
    num_atoms: int
    dt_fs: float
    data_hashes: dict[str, str]
    largest_number: int | None


def stored_molecules(checkpoint: Checkpoint) -> dict[str, StoredMolecule]:
    """The molecules of a checkpoint, by name.

    Raises:
        CheckpointError: it lacks something of them.
    """
    data = config_from_dict(checkpoint.value("config", dict)).data
    names = list(data.by_molecule())
    entries, sections = [""], ["graph"]
    if data.is_mixed:
        entries = [f"molecules.{k}." for k in range(len(names))]
        sections = [f"graph.{k}" for k in range(len(names))]
    parts = [field.name for field in fields(MolecularGraph)]
    graphs = [graph_from_tensors(checkpoint.section(section, parts)) for section in sections]
    largest = _largest_number(graphs) if data.is_mixed else None
    return {
        name: StoredMolecule(
            graph=graph,
            num_atoms=checkpoint.value(f"{entry}num_atoms", int),
            dt_fs=checkpoint.value(f"{entry}dt_fs", int | float),
            data_hashes={
                part: checkpoint.value(f"{entry}data.{part}", str)
                for part in ("trajectory", "windows")
            },
            largest_number=largest,
        )
        for name, entry, graph in zip(names, entries, graphs, strict=True)
    }


class Molecules:
    """The molecules of a run with their graphs and windows.

    Args:
        config: of the run.
        checkpoint: to go on from: its graphs are used, and its data must be the same.

    Attributes:
        problems: by name.

    Raises:
        ConfigError: trajectories of several time steps; more modes than a molecule has atoms.
        CheckpointError: data that have changed since the checkpoint.
    """

    def __init__(self, config: TrainConfig, checkpoint: Checkpoint | None = None) -> None:
        self._config = config
        self.is_mixed = config.data.is_mixed
        stored = {} if checkpoint is None else stored_molecules(checkpoint)
        self.problems: dict[str, Problem] = {
            name: load_problem(data, stored_graph=stored[name].graph if stored else None)
            for name, data in config.data.by_molecule().items()
        }
        _check_time_steps(self.problems)
        _check_modes(config, self.problems)
        for name, molecule in stored.items():
            _check_unchanged(name if self.is_mixed else None, molecule, self.problems[name])

    @property
    def names(self) -> list[str]:
        """Of the molecules where there are several, else empty."""
        return list(self.problems) if self.is_mixed else []

    @property
    def num_atoms(self) -> int:
        """Of the smallest molecule."""
        return min(problem.trajectory.num_atoms for problem in self.problems.values())

    def dataset(
        self, split: str, *, dtype: torch.dtype, device: torch.device
    ) -> WindowDataset | MixedDataset:
        """The windows of one part of all molecules as tensors on a device."""
        problems = list(self.problems.values())
        if not self.is_mixed:
            return problems[0].dataset(split, dtype=dtype, device=device)
        largest = _largest_number([problem.graph for problem in problems])
        return MixedDataset(
            [p.dataset(split, dtype=dtype, device=device, largest_number=largest) for p in problems]
        )

    def save_windows(self, directory: Path) -> None:
        """Write ``windows.json``, or ``windows-NAME.json`` of each of several molecules."""
        options = config_to_dict(self._config)["data"]
        for name, problem in self.problems.items():
            file = f"windows-{name}.json" if self.is_mixed else "windows.json"
            save_windows(directory / file, problem.windows, problem.trajectory, options=options)

    def warn_if_modes_cut(self) -> None:
        """Log a warning where the model's M modes end inside an eigenspace of a molecule."""
        for name, problem in self.problems.items():
            prefix = f"{name}: " if self.is_mixed else ""
            warn_if_modes_cut(self._config, problem.graph, prefix)

    def tensors(self) -> dict[str, Tensor]:
        """The graphs, for the state of a checkpoint."""
        return {
            f"graph.{k}.{name}" if self.is_mixed else f"graph.{name}": tensor
            for k, problem in enumerate(self.problems.values())
            for name, tensor in graph_to_tensors(problem.graph).items()
        }

    def manifest(self) -> dict[str, Any]:
        """Sizes, time steps and hashes, for the manifest of a checkpoint."""
        entries = {
            name: {
                "num_atoms": problem.trajectory.num_atoms,
                "dt_fs": problem.trajectory.dt_fs,
                "data": problem.hashes,
            }
            for name, problem in self.problems.items()
        }
        if not self.is_mixed:
            return next(iter(entries.values()))
        return {"molecules": [{"name": name, **entry} for name, entry in entries.items()]}


def _largest_number(graphs: list[MolecularGraph]) -> int:
    return max(int(graph.numbers.max()) for graph in graphs)


def _check_time_steps(problems: Mapping[str, Problem]) -> None:
    steps = {name: problem.trajectory.dt_fs for name, problem in problems.items()}
    first = next(iter(steps.values()))
    if not all(math.isclose(step, first, rel_tol=1e-3) for step in steps.values()):
        found = ", ".join(f"{name} {step:g}" for name, step in steps.items())
        raise ConfigError(
            f"config: `data.molecules` must have one time between frames, got {found} fs; times "
            "and velocities are counted in frames: use frames of one spacing"
        )


def _check_modes(config: TrainConfig, problems: Mapping[str, Problem]) -> None:
    model = config.model
    name, smallest = min(problems.items(), key=lambda item: item[1].trajectory.num_atoms)
    num_atoms = smallest.trajectory.num_atoms
    most = num_atoms // 2 + 1 if model.fourier_basis == "linear" else num_atoms
    if model.num_modes > most:
        which, remedy = "the molecule", "lower it"
        if config.data.is_mixed:
            which, remedy = f"{name}, the smallest molecule", "lower it, or leave that molecule out"
        raise ConfigError(
            f"config: `model.num_modes` must be at most {most} for the {num_atoms} atoms of "
            f"{which}, got {model.num_modes}; {remedy}"
        )


def _check_unchanged(name: str | None, stored: StoredMolecule, found: Problem) -> None:
    for part, digest in found.hashes.items():
        before = stored.data_hashes[part]
        if before != digest:
            whose = part if name is None else f"{part} of {name}"
            raise CheckpointError(
                f"train: `data` must be what the run was started with, got another {whose} "
                f"(hash {digest[:16]}… instead of {before[:16]}…); "
                "restore the data or start a new run"
            )
