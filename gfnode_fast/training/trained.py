"""A trained model with what it takes to use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gfnode_fast.data import MolecularGraph
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.checkpoint import read_checkpoint
from gfnode_fast.training.config import TrainConfig, config_from_dict
from gfnode_fast.training.problem import (
    build_model,
    graph_from_tensors,
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
    """

    model: FourierMD
    graph: MolecularGraph
    config: TrainConfig
    dt_fs: float
    data_hashes: dict[str, str]
    step: int
    epoch: int
    path: Path

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The model's precision."""
        return next(self.model.parameters()).dtype


def load_model(
    path: str | Path, *, device: str = "auto", backend: str | None = None
) -> TrainedModel:
    """Read a trained model from a run's directory (its best, else its last) or a manifest.

    Args:
        path: the run or ``.../best.json`` or ``.../last.json``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        backend: of :class:`gfnode_fast.FourierMD`; ``None``: as in training.

    Raises:
        CheckpointError: missing or damaged. RuntimeError: no such device.
    """
    checkpoint = read_checkpoint(path)
    manifest: dict[str, Any] = checkpoint.manifest
    config = config_from_dict(manifest["config"])
    with torch.random.fork_rng(devices=[]):
        model = build_model(config, manifest["num_atoms"], backend=backend)
    model.load_state_dict(checkpoint.model)
    model = model.to(resolve_device(device), torch_dtype(config)).eval()
    return TrainedModel(
        model=model,
        graph=graph_from_tensors(checkpoint.section("graph")),
        config=config,
        dt_fs=manifest["dt_fs"],
        data_hashes=manifest["data"],
        step=manifest["position"]["step"],
        epoch=manifest["position"]["epoch"],
        path=checkpoint.path,
    )
