"""Predictions at any list of times from any start frames, and their extxyz files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gfnode_fast.data import Trajectory, WindowDataset, Windows
from gfnode_fast.training.checkpoint import write_atomically
from gfnode_fast.training.problem import forked_random_state
from gfnode_fast.training.trained import TrainedModel, load_model

Array = npt.NDArray[Any]

ADAPTIVE_SOLVERS = ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")


def predict(
    model: TrainedModel | str | Path,
    atoms: Any,
    velocities: Array | Tensor,
    times: Sequence[int] | Array | Tensor,
) -> Array:
    """Predict the positions of start frames at the given times.

    The model answers ``num_timesteps`` times at once. Longer lists are cut into as many groups,
    all of one start frame go through the model together (so one solve covers the union of its
    times, and the fixed-step solvers' grid is the full list), and the last group is filled by
    repeating its last time, which adds no time to the union. Each start frame is predicted on its
    own: the answer does not depend on which other frames are asked for.

    Args:
        model: a loaded model, or what :func:`load_model` takes.
        atoms: start frames, A: an array or tensor (N, 3) or (S, N, 3), an ``ase.Atoms`` or a list
            of them (whose atomic numbers are then compared with the model's).
        velocities: of the same shape, A per frame (the difference of successive frames; for
            velocities in A/fs multiply by ``model.dt_fs``).
        times: (L,) whole frames after the start, in 1 ... delta_frame, in any order; the same
            for all start frames.

    Returns:
        Positions, (L, N, 3) for one frame or (S, L, N, 3), float64, in the order of ``times``.

    Raises:
        ValueError: shapes, atoms or times that do not fit the model; more than ``num_timesteps``
            times from a VAE model with a fixed-step solver (its groups must share their noise, so
            they cannot share a grid).

    Deterministic: the VAE's noise comes from the seed of the training.
    """
    trained = model if isinstance(model, TrainedModel) else load_model(model)
    start = _start_frames(trained, atoms)
    single = start.ndim == 2
    start = start[None] if single else start
    velocity = _array(velocities)
    if velocity.shape != (start.shape[1:] if single else start.shape):
        raise ValueError(
            f"predict: `velocities` must have the shape of the atoms' positions, "
            f"{start.shape[1:] if single else start.shape}, got {velocity.shape}; "
            "give one vector per atom, A per frame"
        )
    if not (np.isfinite(start).all() and np.isfinite(velocity).all()):
        raise ValueError(
            "predict: `atoms` and `velocities` must be finite, got NaN or infinity; check the input"
        )
    frames = _checked_times(trained, times)
    distinct, order = np.unique(frames, return_inverse=True)
    dataset = _start_dataset(trained, start, velocity.reshape(start.shape))
    predicted = np.stack([_predict_one(trained, dataset, s, distinct) for s in range(len(start))])[
        :, order
    ]
    return predicted[0] if single else predicted


def _predict_one(trained: TrainedModel, dataset: WindowDataset, index: int, times: Array) -> Array:
    """(L, N, 3) positions at ascending distinct times."""
    width = trained.config.data.num_timesteps
    groups = -(-len(times) // width)
    padded = np.concatenate((times, np.repeat(times[-1:], groups * width - len(times))))
    timeframes = torch.tensor(
        padded.reshape(groups, width), dtype=trained.dtype, device=trained.device
    )
    together = [timeframes]
    if trained.config.model.use_vae and groups > 1:
        if trained.config.model.solver not in ADAPTIVE_SOLVERS:
            raise ValueError(
                f"predict: `times` must be at most {width} different ones for a VAE model with "
                f"the fixed-step solver {trained.config.model.solver}, got {len(times)}; "
                "ask in several calls"
            )
        together = list(timeframes.split(1))
    parts = []
    for rows in together:
        start = torch.full((len(rows),), index, device=trained.device)
        batch = dataset.batch(start)._replace(timeframes=rows)
        with torch.no_grad(), forked_random_state(trained.device):
            torch.manual_seed(trained.config.optim.seed)
            positions = trained.model(**batch.inputs())[0]
        shape = (width, len(rows), dataset.num_atoms, 3)
        parts.append(positions.view(shape).transpose(0, 1).flatten(0, 1))
    result = torch.cat(parts)[: len(times)].double() + dataset.origin[index]
    return result.cpu().numpy()


def _start_dataset(trained: TrainedModel, start: Array, velocity: Array) -> WindowDataset:
    """The start frames with the features of training; the one target time is a placeholder."""
    size = len(start)
    rows = torch.arange(size)
    trajectory = Trajectory(
        positions=np.concatenate((start, start[-1:])),
        numbers=trained.graph.numbers.numpy(),
        dt_fs=trained.dt_fs,
        start_rows=np.arange(size),
        start_velocities=velocity,
    )
    windows = Windows(start=rows, target=rows[:, None] + 1, times=torch.ones_like(rows)[:, None])
    return WindowDataset(
        trajectory, trained.graph, windows, dtype=trained.dtype, device=trained.device
    )


def _start_frames(trained: TrainedModel, atoms: Any) -> Array:
    """(N, 3) or (S, N, 3) float64."""
    structures = atoms if isinstance(atoms, (list, tuple)) else [atoms]
    if structures and all(hasattr(item, "get_positions") for item in structures):
        expected = trained.graph.numbers.tolist()
        for item in structures:
            if list(item.numbers) != expected:
                raise ValueError(
                    f"predict: `atoms` must be the model's {expected}, got {list(item.numbers)}; "
                    "use its molecule and atom order (and drop hydrogens if it was trained so)"
                )
        positions = [np.asarray(item.get_positions(), dtype=np.float64) for item in structures]
        return positions[0] if structures is not atoms else np.stack(positions)
    start = _array(atoms)
    num_atoms = len(trained.graph.numbers)
    if start.ndim not in (2, 3) or start.shape[-2:] != (num_atoms, 3) or len(start) == 0:
        raise ValueError(
            f"predict: `atoms` must have shape ({num_atoms}, 3) or (S, {num_atoms}, 3), "
            f"got {start.shape}; use the molecule that the model was trained on"
        )
    return start


def _checked_times(trained: TrainedModel, times: Sequence[int] | Array | Tensor) -> Array:
    frames = _array(times)
    limit = trained.config.data.delta_frame
    if frames.ndim != 1 or len(frames) == 0:
        raise ValueError(
            f"predict: `times` must have shape (L,) with L > 0, got {frames.shape}; "
            "give a list of frames"
        )
    good = (frames >= 1) & (frames <= limit) & (frames == np.floor(frames))
    if not good.all():
        raise ValueError(
            f"predict: `times` must be whole frames in 1 ... {limit} (delta_frame of the model), "
            f"got {frames[~good][0]:g}; ask within the horizon that was trained"
        )
    return frames.astype(np.int64)


def _array(values: Any) -> Array:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def write_extxyz(
    path: str | Path, positions: Array, numbers: Array, *, infos: Sequence[dict[str, object]]
) -> None:
    """Write frames as extended XYZ (opens in ASE and OVITO), atomically.

    Args:
        path: the file.
        positions: (F, N, 3), A.
        numbers: (N,) atomic numbers.
        infos: F dictionaries, the key=value pairs of each frame's comment line.

    Raises:
        ValueError: the three do not fit together.
    """
    positions = np.asarray(positions)
    if positions.ndim != 3 or positions.shape[1:] != (len(numbers), 3):
        raise ValueError(
            f"write_extxyz: `positions` must have shape (F, {len(numbers)}, 3), "
            f"got {positions.shape}; give one row per atom"
        )
    if len(infos) != len(positions):
        raise ValueError(
            f"write_extxyz: `infos` must have one entry for each of {len(positions)} frames, "
            f"got {len(infos)}; give them"
        )
    symbols = _symbols(numbers)
    lines = []
    for frame, info in zip(positions, infos, strict=True):
        pairs = " ".join(f"{key}={_quoted(value)}" for key, value in info.items())
        lines += [str(len(symbols)), f'Properties=species:S:1:pos:R:3 pbc="F F F" {pairs}'.rstrip()]
        lines += [
            f"{symbol:<2} {x:15.8f} {y:15.8f} {z:15.8f}"
            for symbol, (x, y, z) in zip(symbols, frame.tolist(), strict=True)
        ]
    write_atomically(Path(path), ("\n".join(lines) + "\n").encode())


def _quoted(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)


def _symbols(numbers: Array) -> list[str]:
    from ase.data import chemical_symbols

    return [chemical_symbols[int(number)] for number in numbers]
