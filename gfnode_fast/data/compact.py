"""Compact coding of a consecutive trajectory: integer positions, second differences, deflate."""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np

from gfnode_fast.data.files import atomic_write
from gfnode_fast.data.npz import read_metadata, read_number
from gfnode_fast.data.trajectory import Array, Trajectory, TrajectoryError

COMPACT_VERSION = 1
COMPACT_KEYS = ("compact", "planes", "shape", "quantum", "numbers", "dt_fs", "sha256", "metadata")


def write_compact(
    trajectory: Trajectory, path: str | os.PathLike[str], *, quantum: float = 1e-5
) -> None:
    """Write a trajectory's positions in 5 to 10 times less space than float32. Atomic.

    Positions become integers in units of `quantum`; of these the second differences in time are
    kept (a smooth motion has small ones), zigzag coded (small negative numbers become small
    unsigned ones), their four bytes in separate planes, and deflated. Rounding to `quantum` is the
    only loss: at most quantum / 2 per coordinate (1e-5 Å: 0.1 % of a thermal velocity at 0.5 fs).

    Parameters
    ----------
    trajectory : consecutive frames, starting at frame 0, without start rows of its own; energies
        and forces are not kept.
    path : ends in ``.npz``.
    quantum : Å.

    Raises
    ------
    ValueError
        For another suffix, trajectories with missing frames, a quantum that is not positive or so
        small that positions do not fit 29 bits.
    """
    if not str(path).endswith(".npz"):
        raise ValueError(f"write_compact: `path` must end in .npz, got {path}")
    if not quantum > 0:
        raise ValueError(f"write_compact: `quantum` must be positive, got {quantum}")
    if not trajectory.consecutive or trajectory.frames[0] != 0 or trajectory.start_rows is not None:
        raise ValueError(
            "write_compact: `trajectory` must have consecutive frames from 0 and no start rows of "
            "its own; use Trajectory.save"
        )
    scaled = np.rint(trajectory.positions.astype(np.float64) / quantum)
    # Second differences are up to four times larger than positions and must fit 32 bits.
    if np.abs(scaled).max() >= 2**29:
        least = np.abs(trajectory.positions).max() / 2**29
        raise ValueError(
            f"write_compact: `quantum` must be above {least:.3g} for positions this far from the "
            f"origin, got {quantum}; centre them or raise it"
        )
    integers = scaled.astype(np.int64)
    second = np.diff(np.diff(integers, axis=0, prepend=0), axis=0, prepend=0)
    zigzag = ((second << 1) ^ (second >> 63)).astype("<u4")
    # Coordinate by coordinate: one atom's motion compresses better than neighbours' mixed.
    by_coordinate = zigzag.reshape(trajectory.num_frames, -1).T
    planes = np.ascontiguousarray(by_coordinate).view(np.uint8).reshape(-1, 4).T
    arrays = {
        "compact": np.int64(COMPACT_VERSION),
        "planes": np.ascontiguousarray(planes),
        "shape": np.array(integers.shape, dtype=np.int64),
        "quantum": np.float64(quantum),
        "numbers": trajectory.numbers,
        "dt_fs": np.float64(trajectory.dt_fs),
        "sha256": np.array(_digest(integers)),
        "metadata": np.array(json.dumps(trajectory.metadata)),
    }
    with atomic_write(path) as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def decode_compact(arrays: dict[str, Array], path: str) -> Trajectory:
    """Decode the arrays of a file that `write_compact` wrote; `path` is for messages.

    Returns
    -------
    Trajectory with float32 positions.

    Raises
    ------
    TrajectoryError
        For another version, sizes that disagree, or positions whose hash is not the recorded one.
    """
    version = read_number(arrays, "compact", path)
    if version != COMPACT_VERSION:
        raise TrajectoryError(
            f"{path}: key 'compact' must be version {COMPACT_VERSION}, got {version:g}; update "
            "gfnode_fast"
        )
    if arrays["shape"].dtype.kind not in "iu":
        raise TrajectoryError(
            f"{path}: key 'shape' must hold integers, got {arrays['shape'].dtype}"
        )
    shape = tuple(arrays["shape"].reshape(-1).tolist())
    planes = arrays["planes"]
    size = int(np.prod(shape, dtype=np.int64))
    if len(shape) != 3 or planes.dtype != np.uint8 or planes.shape != (4, size):
        raise TrajectoryError(
            f"{path}: key 'planes' must be uint8 of shape (4, {size}) for the recorded shape "
            f"{shape}, got {planes.dtype} {planes.shape}"
        )
    zigzag = np.ascontiguousarray(planes.T).view("<u4").reshape(shape[1] * shape[2], shape[0])
    second = (zigzag >> 1).astype(np.int64) ^ -(zigzag & 1).astype(np.int64)
    integers = np.cumsum(np.cumsum(second, axis=1), axis=1).T.reshape(shape)
    if _digest(integers) != str(arrays["sha256"]):
        raise TrajectoryError(f"{path}: key 'sha256' must match the positions; the file is damaged")
    return Trajectory(
        positions=(integers * read_number(arrays, "quantum", path)).astype(np.float32),
        numbers=arrays["numbers"],
        dt_fs=read_number(arrays, "dt_fs", path),
        metadata=read_metadata(arrays, path),
    )


def _digest(integers: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(integers, dtype="<i8").tobytes()).hexdigest()
