"""A trained model with what it takes to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gfnode_fast.data import MolecularGraph, Trajectory
from gfnode_fast.data.readers import detect_format
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.config import DataConfig, TrainConfig, config_from_dict
from gfnode_fast.training.molecules import stored_molecules
from gfnode_fast.training.problem import (
    build_model,
    read_trajectory,
    resolve_device,
    torch_dtype,
)


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
    config = config_from_dict(checkpoint.value("config", dict))
    place, dtype = resolve_device(device), torch_dtype(config)
    models = {}
    for (name, molecule), data in zip(
        stored_molecules(checkpoint).items(), config.data.by_molecule().values(), strict=True
    ):
        own = replace(config, data=data)
        with torch.random.fork_rng(devices=[]):
            model = build_model(own, molecule.num_atoms, backend=backend).to(place, dtype)
        checkpoint.load_weights(model)
        models[name] = TrainedModel(
            model=model.eval(),
            graph=molecule.graph,
            config=own,
            dt_fs=molecule.dt_fs,
            data_hashes=molecule.data_hashes,
            step=checkpoint.value("position.step", int),
            epoch=checkpoint.value("position.epoch", int),
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
    fitting = names
    if molecule is None:
        if len(names) > 1 and numbers is not None:
            fitting = [name for name in names if _has_atoms(models[name], numbers)]
        if len(fitting) == 1:
            return models[fitting[0]]
    raise _unclear(names, molecule, numbers, fitting)


def model_for_trajectory(
    models: Mapping[str, TrainedModel],
    path: str | Path,
    *,
    dt_fs: float | None = None,
    molecule: str | int | None = None,
) -> tuple[TrainedModel, Trajectory]:
    """The one of a run's models whose atoms a trajectory has, and the trajectory.

    Args:
        models: of :func:`load_models`; a single one is taken whatever the atoms.
        path: a file or sample. It is read as the training's: without hydrogens where those were
            dropped, and with its topology where the format needs one.
        dt_fs: time between frames, fs, where the file does not say.
        molecule: the one that is meant, as of :func:`choose_model`, in place of asking the atoms.

    Raises:
        ValueError: none or several of the models have the atoms; a molecule that the run does not
            have; as :func:`gfnode_fast.data.load_trajectory`.
    """
    if molecule is not None:
        models = {"": choose_model(models, molecule)}
    read: dict[tuple[bool, str | None], Trajectory] = {}
    fitting: dict[str, tuple[TrainedModel, Trajectory]] = {}
    for name, model in models.items():
        data = model.config.data
        topology = data.topology
        if topology is not None and detect_format(path) != "mdtraj":
            topology = None  # such files name their atoms
        how = (data.heavy_only, topology)
        if how not in read:
            asked = DataConfig(str(path), dt_fs, topology=topology, heavy_only=data.heavy_only)
            read[how] = read_trajectory(asked)
        if len(models) == 1 or _has_atoms(model, read[how].numbers.tolist()):
            fitting[name] = model, read[how]
    if len(fitting) != 1:
        first = next(iter(read.values())).numbers.tolist()
        raise _unclear(list(models), None, first, list(fitting))
    return next(iter(fitting.values()))


def _has_atoms(model: TrainedModel, numbers: Sequence[int]) -> bool:
    return model.graph.numbers.tolist() == list(numbers)


def _unclear(
    names: list[str],
    molecule: str | int | None,
    numbers: Sequence[int] | None,
    fitting: list[str],
) -> ValueError:
    got = repr(molecule)
    if numbers is not None:
        got += f" and the atoms {list(numbers)}, those of {' and '.join(fitting) or 'none of them'}"
    return ValueError(
        f"load_model: `molecule` must be one of {', '.join(names)}, or its number from 0, got "
        f"{got}; name the one that is meant"
    )
