"""A molecular-dynamics trajectory in memory."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfnode_fast.data.files import atomic_write

Array = npt.NDArray[Any]

WELL_KNOWN_DT = (
    "MD17 and rMD17: 0.5, but paracetamol and azobenzene 1.0; MD22: 1.0; "
    "alanine dipeptide saved every picosecond: 1000.0"
)


class MissingTimeStepError(ValueError):
    """Neither the caller nor the file says the time between two frames."""


class TrajectoryError(ValueError):
    """A trajectory, or the file it came from, cannot be used; the text names the file and key."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Positions of one molecule over time, with real times.

    Attributes
    ----------
    positions : (F, N, 3) float32 or float64, Å, as the file has them. They are not shifted here:
        `WindowDataset` centres systems far from the origin in float64 before it rounds to float32.
    numbers : (N,) int64, atomic numbers, 1 to 118.
    dt_fs : time between two successive frame *numbers*, fs.
    frames : (F,) int64, frame number of each row, strictly ascending. Row r was taken at the time
        ``frames[r] * dt_fs``. Default (an empty array): 0 … F-1.
    start_rows : (S,) int64, strictly ascending rows usable as the start of a window, or None:
        every row whose successor is the next frame (so that a velocity exists).
    start_velocities : (S, N, 3), Å/frame, velocity at each start row, or None: the difference of
        two successive frames.
    energies : (F,) or None; forces : (F, N, 3) or None; in the units of the file (see `metadata`).
    metadata : what the file says about itself; JSON-serialisable.

    Raises
    ------
    TypeError
        For wrong array types.
    TrajectoryError
        For shapes that disagree, numbers that are not finite, and times that do not ascend.
    """

    positions: Array
    numbers: Array
    dt_fs: float
    frames: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    start_rows: Array | None = None
    start_velocities: Array | None = None
    energies: Array | None = None
    forces: Array | None = None
    metadata: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A frozen instance is completed (defaults, integer widths) through object.__setattr__.
        _check_positions(self.positions)
        num_frames, num_atoms, _ = self.positions.shape
        if np.size(self.frames) == 0:
            object.__setattr__(self, "frames", np.arange(num_frames, dtype=np.int64))
        for name in ("numbers", "frames", "start_rows"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integers(name, getattr(self, name)))
        object.__setattr__(self, "dt_fs", checked_dt(self.dt_fs))
        if self.numbers.shape != (num_atoms,):
            raise TrajectoryError(
                f"Trajectory: `numbers` must have shape ({num_atoms},), one entry per atom of "
                f"`positions`, got {self.numbers.shape}"
            )
        if not ((self.numbers >= 1) & (self.numbers <= 118)).all():
            raise TrajectoryError(
                "Trajectory: `numbers` must be atomic numbers 1 to 118, got "
                f"{self.numbers.min()} to {self.numbers.max()}"
            )
        if self.frames.shape != (num_frames,):
            raise TrajectoryError(
                f"Trajectory: `frames` must have shape ({num_frames},), got {self.frames.shape}"
            )
        if (np.diff(self.frames) <= 0).any():
            raise TrajectoryError(
                "Trajectory: `frames` must be strictly ascending; sort the rows by frame number "
                "and drop duplicates"
            )
        self._check_starts()
        _check_float("energies", self.energies, (num_frames,))
        _check_float("forces", self.forces, (num_frames, num_atoms, 3))

    def _check_starts(self) -> None:
        if self.start_rows is None:
            if self.start_velocities is not None:
                raise TrajectoryError(
                    "Trajectory: `start_velocities` must come with `start_rows`, the rows they "
                    "belong to, got None"
                )
            return
        rows = self.start_rows
        if rows.ndim != 1 or (np.diff(rows) <= 0).any():
            raise TrajectoryError("Trajectory: `start_rows` must be 1-D and strictly ascending")
        if rows.size and (rows[0] < 0 or rows[-1] >= self.num_frames):
            raise TrajectoryError(
                f"Trajectory: `start_rows` must lie in 0 … {self.num_frames - 1}, got "
                f"{rows[0]} to {rows[-1]}"
            )
        shape = (rows.size, self.num_atoms, 3)
        _check_float("start_velocities", self.start_velocities, shape)

    @property
    def num_frames(self) -> int:
        """Number of rows F."""
        return int(self.positions.shape[0])

    @property
    def num_atoms(self) -> int:
        """Number of atoms N."""
        return int(self.positions.shape[1])

    @property
    def consecutive(self) -> bool:
        """Whether every row is the frame after the one before it."""
        return int(self.frames[-1] - self.frames[0]) == self.num_frames - 1

    def starts(self) -> Array:
        """Rows usable as the start of a window: (S,) int64, ascending.

        `start_rows`, or every row whose successor is the next frame.
        """
        if self.start_rows is not None:
            return self.start_rows
        return np.flatnonzero(np.diff(self.frames) == 1)

    def velocities(self, rows: Array) -> Array:
        """Velocity at each of `rows`: (len(rows), N, 3) float64, Å/frame.

        The file's own start velocities where it has them, otherwise the forward difference
        ``positions[r + 1] - positions[r]`` formed in float64.

        Raises
        ------
        ValueError
            When a row is not a start: it has neither a velocity nor a next frame.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if self.start_velocities is not None and self.start_rows is not None:
            place = np.searchsorted(self.start_rows, rows)
            place = np.minimum(place, max(self.start_rows.size - 1, 0))
            known = self.start_rows[place] == rows if self.start_rows.size else rows < 0
            if not known.all():
                raise ValueError(
                    "velocities: `rows` must be start rows of the trajectory, got "
                    f"{rows[~known][0]}; draw windows from this trajectory"
                )
            return self.start_velocities[place].astype(np.float64)
        following = np.minimum(rows + 1, self.num_frames - 1)
        known = self.frames[following] == self.frames[rows] + 1
        if not known.all():
            raise ValueError(
                f"velocities: `rows` must be followed by the next frame, got row {rows[~known][0]} "
                "which is not; draw windows from this trajectory"
            )
        difference: Array = self.positions[following].astype(np.float64) - self.positions[rows]
        return difference

    def heavy_atoms(self) -> Trajectory:
        """Return the trajectory without hydrogens (the published preparation of MD17 and rMD17).

        Raises
        ------
        TrajectoryError
            When every atom is a hydrogen.
        """
        heavy = self.numbers > 1
        if heavy.all():
            return self
        if not heavy.any():
            raise TrajectoryError("heavy_atoms: the molecule must have atoms beside hydrogen")
        velocities, forces = self.start_velocities, self.forces
        return replace(
            self,
            positions=np.ascontiguousarray(self.positions[:, heavy]),
            numbers=self.numbers[heavy],
            start_velocities=None if velocities is None else velocities[:, heavy],
            forces=None if forces is None else forces[:, heavy],
            metadata={**self.metadata, "atoms": "heavy atoms only"},
        )

    def content_hash(self) -> str:
        """SHA-256 of everything windows depend on, in hexadecimal; the same on every platform.

        Covers numbers, dt, frame numbers, positions, start rows and velocities; not the metadata,
        energies and forces.
        """
        digest = hashlib.sha256()
        for array in (
            self.numbers,
            np.float64(self.dt_fs),
            self.frames,
            self.positions,
            self.start_rows,
            self.start_velocities,
        ):
            if array is None:
                digest.update(b"none")
                continue
            little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            digest.update(f"{little.dtype.str}{little.shape}".encode())
            digest.update(little.tobytes())
        return digest.hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed npz that `load_trajectory` reads back exactly. Atomic.

        Raises
        ------
        ValueError
            When `path` does not end in ``.npz``.
        TypeError
            When the metadata is not JSON-serialisable.
        """
        if not str(path).endswith(".npz"):
            raise ValueError(f"save: `path` must end in .npz, got {path}")
        arrays: dict[str, Array] = {
            "positions": self.positions,
            "numbers": self.numbers,
            "dt_fs": np.float64(self.dt_fs),  # type: ignore[dict-item]
            "frames": self.frames,
            "metadata": np.array(json.dumps(self.metadata)),
        }
        for name in ("start_rows", "start_velocities", "energies", "forces"):
            if getattr(self, name) is not None:
                arrays[name] = getattr(self, name)
        with atomic_write(path) as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]


def agree_dt(path: Path, given: float | None, found: float | None) -> float:
    """Return the caller's dt or the file's; one must be there, and both must agree."""
    if given is None and found is None:
        raise MissingTimeStepError(
            f"load_trajectory: `dt_fs` must be given, because {path} does not say the time "
            f"between its frames; pass dt_fs=... ({WELL_KNOWN_DT})"
        )
    if given is None or found is None:
        return float(given if found is None else found)  # type: ignore[arg-type]
    if not np.isclose(given, found, rtol=1e-3, atol=0):
        raise ValueError(
            f"load_trajectory: `dt_fs` must agree with the {found} fs that {path} says, got "
            f"{given}; leave it out, or correct the trajectory with dataclasses.replace"
        )
    return float(given)


def checked_dt(dt_fs: object) -> float:
    """Return a time step as a float; TypeError or TrajectoryError when it is not a positive one."""
    if isinstance(dt_fs, bool) or not isinstance(dt_fs, (int, float, np.integer, np.floating)):
        raise TypeError(f"Trajectory: `dt_fs` must be a number, got {type(dt_fs).__name__}")
    if not (np.isfinite(dt_fs) and dt_fs > 0):
        raise TrajectoryError(
            f"Trajectory: `dt_fs` must be a positive time in fs, got {dt_fs} ({WELL_KNOWN_DT})"
        )
    return float(dt_fs)


def _check_positions(positions: object) -> None:
    if not isinstance(positions, np.ndarray):
        raise TypeError(
            f"Trajectory: `positions` must be a NumPy array, got {type(positions).__name__}"
        )
    if positions.ndim != 3 or positions.shape[2] != 3 or 0 in positions.shape:
        raise TrajectoryError(
            "Trajectory: `positions` must have shape (frames, atoms, 3) with at least one frame "
            f"and atom, got {positions.shape}"
        )
    _check_float("positions", positions, positions.shape)


def _check_float(name: str, array: object, shape: tuple[int, ...]) -> None:
    if array is None:
        return
    if not isinstance(array, np.ndarray) or array.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"Trajectory: `{name}` must be a float32 or float64 array, got "
            f"{getattr(array, 'dtype', type(array).__name__)}"
        )
    if array.shape != shape:
        raise TrajectoryError(f"Trajectory: `{name}` must have shape {shape}, got {array.shape}")
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise TrajectoryError(
            f"Trajectory: `{name}` must be finite, got NaN or infinity, first in row {row}"
        )


def _integers(name: str, array: Array) -> Array:
    array = np.asarray(array)
    if array.dtype.kind not in "iu":
        raise TypeError(f"Trajectory: `{name}` must be integers, got dtype {array.dtype}")
    return array.astype(np.int64)
