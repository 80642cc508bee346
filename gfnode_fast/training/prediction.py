"""Predictions at any list of times from any start frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gfnode_fast.data import Trajectory, WindowDataset, Windows
from gfnode_fast.solvers.tableau import ADAPTIVE
from gfnode_fast.training.problem import (
    check_graph,
    check_time_step,
    forked_random_state,
    molecule_graph,
)
from gfnode_fast.training.trained import TrainedModel, choose_model, load_models

Array = npt.NDArray[Any]


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
        model: a loaded model, or a run: of several molecules the one whose atomic numbers `atoms`
            have.
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
    trained = _trained(model, _numbers(atoms))
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
        if trained.config.model.solver not in ADAPTIVE:
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
        trajectory,
        trained.graph,
        windows,
        dtype=trained.dtype,
        device=trained.device,
        largest_number=trained.largest_number,
    )


def _trained(model: TrainedModel | str | Path, numbers: Sequence[int] | None) -> TrainedModel:
    if isinstance(model, TrainedModel):
        return model
    return choose_model(load_models(model), numbers=numbers)


def _numbers(atoms: Any) -> Sequence[int] | None:
    """Of ase.Atoms, or of the first of a list of them."""
    first = atoms[0] if isinstance(atoms, (list, tuple)) and len(atoms) else atoms
    return list(first.numbers) if hasattr(first, "get_positions") else None


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


@dataclass(frozen=True)
class TrajectoryPrediction:
    """Predictions from frames of a trajectory.

    Attributes:
        starts: (S,) frame numbers started from.
        times: (L,) frames after the start.
        positions: (S, L, N, 3), predicted, A.
        true: (S, L, N, 3), NaN where the trajectory does not have the frame.
        known: (S, L), whether it has.
    """

    starts: Array
    times: Array
    positions: Array
    true: Array
    known: Array


def predict_from_trajectory(
    model: TrainedModel | str | Path,
    trajectory: Trajectory,
    starts: Sequence[int] | Array,
    times: Sequence[int] | Array,
) -> TrajectoryPrediction:
    """Predict from frames of a trajectory, with the true frames beside where it has them.

    Args:
        model: a loaded model, or a run: of several molecules that of the trajectory.
        trajectory: of the molecule of the training.
        starts: frame numbers that have a velocity in the trajectory.
        times: frames after each start, as for :func:`predict`.

    Raises:
        ValueError: as :func:`predict`; another molecule or time step; a start that the trajectory
            does not have or has no velocity for.
            GraphMismatchError: the same atoms bonded otherwise in the trajectory's first frame.
    """
    trained = _trained(model, trajectory.numbers.tolist())
    if trajectory.numbers.tolist() != trained.graph.numbers.tolist():
        raise ValueError(
            f"predict: `trajectory` must be of the model's atoms {trained.graph.numbers.tolist()}, "
            f"got {trajectory.numbers.tolist()}; use its molecule and atom order"
        )
    check_graph(trained.graph, molecule_graph(trajectory, trained.config.data))
    check_time_step("predict", trained.dt_fs, trajectory)
    wanted = np.asarray(starts, dtype=np.int64)
    usable = trajectory.frames[trajectory.starts()]
    bad = wanted[~np.isin(wanted, usable)]
    if len(bad) or wanted.ndim != 1 or len(wanted) == 0:
        raise ValueError(
            f"predict: `starts` must be frame numbers with a velocity, got "
            f"{bad[0] if len(bad) else starts}; the first such frame is "
            f"{usable[0] if len(usable) else 'missing'}"
        )
    frames = _checked_times(trained, times)
    rows = np.searchsorted(trajectory.frames, wanted)
    positions = predict(trained, trajectory.positions[rows], trajectory.velocities(rows), frames)
    ahead = wanted[:, None] + frames
    place = np.minimum(np.searchsorted(trajectory.frames, ahead), trajectory.num_frames - 1)
    known = trajectory.frames[place] == ahead
    true = np.where(known[..., None, None], trajectory.positions[place].astype(np.float64), np.nan)
    return TrajectoryPrediction(wanted, frames, positions, true, known)
