"""Split files: which windows of which trajectory, in JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from gfnode_fast.data.files import atomic_write
from gfnode_fast.data.trajectory import Trajectory
from gfnode_fast.data.windows import SPLIT_NAMES, Windows

FORMAT = "gfnode_fast.windows"
FORMAT_VERSION = 1


def save_windows(
    path: str | os.PathLike[str],
    windows: Mapping[str, Windows],
    trajectory: Trajectory,
    *,
    options: Mapping[str, object] | None = None,
) -> None:
    """Write windows and the content hash of their trajectory. Atomic.

    Parameters
    ----------
    path : the JSON file.
    windows : "train", "val" and "test", as `draw_windows` returns them.
    trajectory : the one they were drawn from.
    options : how they were drawn (seed, delta_frame, …), for the reader of the file; not read back.
    """
    if set(windows) != set(SPLIT_NAMES):
        raise ValueError(
            f"save_windows: `windows` must have {', '.join(SPLIT_NAMES)}, got {', '.join(windows)}"
        )
    content = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "trajectory_sha256": trajectory.content_hash(),
        "options": dict(options or {}),
        "splits": {
            name: {
                "start": windows[name].start.tolist(),
                "target": windows[name].target.tolist(),
            }
            for name in SPLIT_NAMES
        },
    }
    with atomic_write(path) as stream:
        stream.write(json.dumps(content).encode())


def load_windows(path: str | os.PathLike[str], trajectory: Trajectory) -> dict[str, Windows]:
    """Read the windows of a split file; times come from the trajectory's frame numbers.

    Raises
    ------
    ValueError
        When the file is not a split file, is of another version, belongs to another trajectory
        (the content hash differs), or has rows that the trajectory does not have.
    """
    try:
        content = json.loads(Path(path).read_bytes())
        header = (content["format"], content["version"])
        digest, splits = content["trajectory_sha256"], content["splits"]
        rows = {
            name: (
                np.array(splits[name]["start"], dtype=np.int64).reshape(-1),
                np.array(splits[name]["target"], dtype=np.int64),
            )
            for name in SPLIT_NAMES
        }
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"load_windows: `path` must be a split file of save_windows, got {path}, which is "
            f"damaged or another kind ({type(error).__name__}: {error})"
        ) from error
    if header != (FORMAT, FORMAT_VERSION):
        raise ValueError(
            f"load_windows: `path` must be {FORMAT} version {FORMAT_VERSION}, got {header[0]} "
            f"version {header[1]} in {path}"
        )
    if digest != trajectory.content_hash():
        raise ValueError(
            f"load_windows: `trajectory` must be the one the windows in {path} were drawn from "
            f"(sha256 {digest}), got {trajectory.content_hash()}; draw windows anew"
        )
    return {name: _windows(path, trajectory, *rows[name]) for name in SPLIT_NAMES}


def _windows(
    path: str | os.PathLike[str],
    trajectory: Trajectory,
    start: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    target: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
) -> Windows:
    every = np.concatenate([start, target.reshape(-1)])
    if every.size and not (every.min() >= 0 and every.max() < trajectory.num_frames):
        raise ValueError(
            f"load_windows: `path` must have rows in 0 … {trajectory.num_frames - 1}, got "
            f"{every.min()} to {every.max()} in {path}"
        )
    if target.ndim != 2 or len(target) != len(start):
        raise ValueError(
            f"load_windows: `path` must have targets of shape ({len(start)}, T), got "
            f"{target.shape} in {path}"
        )
    times = trajectory.frames[target] - trajectory.frames[start][:, None]
    return Windows(torch.from_numpy(start), torch.from_numpy(target), torch.from_numpy(times))
