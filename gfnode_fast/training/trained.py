"""A trained model with what it takes to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gfnode_fast.data import MolecularGraph
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.config import TrainConfig, config_from_dict
from gfnode_fast.training.molecules import stored_molecules
from gfnode_fast.training.problem import build_model, resolve_device, torch_dtype


@dataclass(frozen=True)
class TrainedModel:
    """A model read from a checkpoint.

    Attributes:
        model: in evaluation mode, on the requested device.
        graph: of the training, with the eigenvector basis that the weights belong to.
        config: of the training.
        dt_fs: time between frames of the training trajectory, fs.
        data_hashes: of the training trajectory and windows.
        step, epoch: of the checkpoint.
        path: the manifest it was read from.
        molecule: name of the one that this is for, where the run has several.
        largest_number: as of `WindowDataset`.
    """

    model: FourierMD
    graph: MolecularGraph
    config: TrainConfig
    dt_fs: float
    data_hashes: dict[str, str]
    step: int
    epoch: int
    path: Path
    molecule: str | None = None
    largest_number: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's precision."""
        return next(self.model.parameters()).dtype


def load_model(
    path: str | Path,
    *,
    molecule: str | int | None = None,
    device: str = "auto",
    backend: str | None = None,
) -> TrainedModel:
    """Read a trained model from a run's directory (its best, else its last) or a manifest.

    Args:
        path: the run or ``.../best.json`` or ``.../last.json``.
        molecule: name or number, from 0, of the one that is meant, in a run of several.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: of :class:`gfnode_fast.FourierMD`; ``None``: as in training.

    Raises:
        CheckpointError: missing or damaged. RuntimeError: no such device. ValueError: a molecule
            that the run does not have, or none where it has several.
    """
    return choose_model(load_models(path, device=device, backend=backend), molecule)


def load_models(
    path: str | Path, *, device: str = "auto", backend: str | None = None
) -> dict[str, TrainedModel]:
    """The model of a run as it is used for each of its molecules, by name; as :func:`load_model`.

    The weights are the same: a GFNODE's parameters are a FourierMD's.
    """
    checkpoint = read_checkpoint(path)
    manifest: dict[str, Any] = checkpoint.manifest
    config = config_from_dict(manifest["config"])
    place, dtype = resolve_device(device), torch_dtype(config)
    models = {}
    for (name, molecule), data in zip(
        stored_molecules(checkpoint).items(), config.data.by_molecule().values(), strict=True
    ):
        own = replace(config, data=data)
        with torch.random.fork_rng(devices=[]):
            model = build_model(own, molecule.num_atoms, backend=backend)
        model.load_state_dict(checkpoint.model)
        models[name] = TrainedModel(
            model=model.to(place, dtype).eval(),
            graph=molecule.graph,
            config=own,
            dt_fs=molecule.dt_fs,
            data_hashes=molecule.data_hashes,
            step=manifest["position"]["step"],
            epoch=manifest["position"]["epoch"],
            path=checkpoint.path,
            molecule=name if config.data.is_mixed else None,
            largest_number=molecule.largest_number,
        )
    return models


def choose_model(
    models: Mapping[str, TrainedModel],
    molecule: str | int | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> TrainedModel:
    """The one of a run's models that is meant.

    Args:
        models: of :func:`load_models`.
        molecule: name, or number from 0 (also as text); None: the only one, or that of `numbers`.
        numbers: (N,) atomic numbers at hand.

    Raises:
        ValueError: it is not there, or it is not clear which one is meant.
    """
    names = list(models)
    if isinstance(molecule, str) and molecule.isdecimal():
        molecule = int(molecule)
    if isinstance(molecule, int) and 0 <= molecule < len(names):
        return models[names[molecule]]
    if isinstance(molecule, str) and molecule in models:
        return models[molecule]
    if molecule is None:
        fitting = [
            name
            for name, model in models.items()
            if numbers is None or model.graph.numbers.tolist() == list(numbers)
        ]
        if len(names) == 1 or len(fitting) == 1:
            return models[(fitting or names)[0]]
    raise ValueError(
        f"load_model: `molecule` must be one of {', '.join(names)}, or its number from 0, got "
        f"{molecule!r}; name the one that is meant"
    )
