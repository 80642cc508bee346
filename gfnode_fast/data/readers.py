"""`load_trajectory`: from files to a `Trajectory`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from gfnode_fast.data.compact import COMPACT_KEYS, decode_compact
from gfnode_fast.data.external import read_ase, read_mdtraj
from gfnode_fast.data.npz import read_arrays, read_headers, read_metadata, read_number
from gfnode_fast.data.trajectory import Array, Trajectory, TrajectoryError, agree_dt, checked_dt

Format = Literal["native", "compact", "md17", "rmd17", "md22", "sparse", "ase", "mdtraj"]

_MDTRAJ_SUFFIXES = (".dcd", ".xtc", ".trr", ".h5", ".hdf5", ".nc", ".netcdf")
_ANGSTROM = ("ang", "angstrom", "a", "å")
# Keys by which a format is known, the most special first, and the keys it may have besides.
_NATIVE_OPTIONAL = ("start_rows", "start_velocities", "energies", "forces", "metadata")
_KNOWN_BY: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("compact", COMPACT_KEYS),
    ("native", ("positions", "numbers", "frames", "dt_fs")),
    ("rmd17", ("coords", "nuclear_charges", "old_indices")),
    ("sparse", ("R", "z", "frame", "start", "v0")),
    ("md17", ("R", "z")),
)


def load_trajectory(
    path: str | os.PathLike[str],
    *,
    dt_fs: float | None = None,
    topology: str | os.PathLike[str] | None = None,
    format: Format | None = None,
    heavy_only: bool = False,
) -> Trajectory:
    """Read a trajectory.

    Parameters
    ----------
    path : the file.
    dt_fs : time between two successive frames, fs. Needed when the file does not say; when it does
        and says otherwise, that is an error.
    topology : a file with the atoms (PDB, …), for formats without them (DCD, XTC).
    format : how to read it; by default told by the keys of an npz file, or by the suffix:

        * ``"native"``: what `Trajectory.save` wrote; ``"compact"``: what `write_compact` wrote.
        * ``"md17"``, ``"md22"``: npz with R (frames, atoms, 3) and z; E, F, dt_fs and
          metadata where they are there.
        * ``"rmd17"``: npz with coords, nuclear_charges and old_indices. The rows of these files are
          shuffled: they are sorted by old_indices, which become the frame numbers.
        * ``"sparse"``: md17 with the frame number of each row (frame), rows usable as starts
          (start) and their velocities (v0, Å/frame).
        * ``"ase"``: anything ASE reads, such as extxyz and .traj (needs the package ase).
        * ``"mdtraj"``: DCD, XTC, TRR, NetCDF, HDF5 (needs ``pip install gfnode-fast[mdtraj]``).
          XTC rounds to 0.01 Å by default, too coarse for velocities of successive frames.
    heavy_only : drop hydrogens.

    Returns
    -------
    Trajectory, positions in Å and in the precision of the file.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    TrajectoryError
        When the file is damaged, holds pickles, is too large, lacks keys, disagrees with itself,
        or has numbers that are not finite. The text names the file and the key.
    ValueError
        When dt_fs or topology is missing or contradicts the file, and for unknown formats.
    RuntimeError
        When a package that the format needs is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"load_trajectory: `path` must be an existing file, got {path}")
    if dt_fs is not None:
        dt_fs = checked_dt(dt_fs)
    if format is not None and format not in get_args(Format):
        raise ValueError(
            f"load_trajectory: `format` must be one of {', '.join(get_args(Format))}, got "
            f"{format!r}"
        )
    if format is None:
        format = detect_format(path)
    if topology is not None and format != "mdtraj":
        raise ValueError(
            f"load_trajectory: `topology` must be None for format {format!r}, whose files name "
            f"their atoms, got {topology}"
        )
    trajectory = _named(path, lambda: _read(path, format, dt_fs, topology))
    return trajectory.heavy_atoms() if heavy_only else trajectory


def _read(
    path: Path,
    format: Format,
    dt_fs: float | None,
    topology: str | os.PathLike[str] | None,
) -> Trajectory:
    if format == "ase":
        return read_ase(path, dt_fs)
    if format == "mdtraj":
        return read_mdtraj(path, dt_fs, topology)
    keys = read_headers(path)
    if format == "compact":
        trajectory = decode_compact(read_arrays(path, COMPACT_KEYS), str(path))
        agree_dt(path, dt_fs, trajectory.dt_fs)
        return trajectory
    if format == "native":
        return _read_native(path, keys, dt_fs)
    if format == "rmd17":
        return _read_rmd17(path, keys, dt_fs)
    return _read_md17(path, keys, dt_fs, sparse=format == "sparse")


def _named(path: Path, read: Callable[[], Trajectory]) -> Trajectory:
    """Put the file's name before complaints of `Trajectory` about its contents."""
    try:
        return read()
    except (TrajectoryError, TypeError) as error:
        if str(path) in str(error):
            raise
        raise TrajectoryError(f"{path}: {error}") from error


def detect_format(path: str | os.PathLike[str]) -> Format:
    """Format of a file: by the keys of an npz, by the suffix otherwise (unknown ones: ASE).

    Raises
    ------
    TrajectoryError
        When an npz file has the keys of no known format, or cannot be read.
    """
    suffix = Path(path).suffix.lower()
    if suffix != ".npz":
        return "mdtraj" if suffix in _MDTRAJ_SUFFIXES else "ase"
    keys = read_headers(path)
    for name, needed in _KNOWN_BY:
        if all(key in keys for key in needed):
            return name
    raise TrajectoryError(
        f"{path}: keys must be those of a known format ("
        + "; ".join(f"{name}: {', '.join(needed)}" for name, needed in _KNOWN_BY)
        + f"), got {', '.join(sorted(keys)) or 'none'}"
    )


def _found_dt(arrays: dict[str, Array], metadata: dict[str, object], path: Path) -> float | None:
    """Time between frames as the file has it.

    In metadata, `dt_fs` is the integrator's step and `stride` the steps between saved frames;
    `frame_dt_fs` is their product.
    """
    if "dt_fs" in arrays:
        return read_number(arrays, "dt_fs", path)
    try:
        if "frame_dt_fs" in metadata:
            return float(metadata["frame_dt_fs"])  # type: ignore[arg-type]
        if "dt_fs" in metadata:
            return float(metadata["dt_fs"]) * float(metadata.get("stride", 1))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TrajectoryError(
            f"{path}: key 'metadata' must have a number as dt_fs, stride and frame_dt_fs, "
            f"got {error}"
        ) from error
    return None


def _text(array: Array) -> str:
    value = array.reshape(-1)[0] if array.size else ""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _refuse_other_units(arrays: dict[str, Array], metadata: dict[str, object], path: Path) -> None:
    unit = _text(arrays["r_unit"]) if "r_unit" in arrays else str(metadata.get("r_unit", "Ang"))
    if unit.lower() not in _ANGSTROM:
        raise TrajectoryError(
            f"{path}: key 'r_unit' must be Å (Ang), got {unit!r}; convert the positions"
        )


def _typed(array: Array, kinds: str, path: Path, key: str) -> Array:
    if array.dtype.kind not in kinds:
        wanted = "integers" if kinds == "iu" else "floating-point numbers"
        raise TrajectoryError(f"{path}: key '{key}' must hold {wanted}, got {array.dtype}")
    return array


def _values(arrays: dict[str, Array], key: str, path: Path, shape: tuple[int, ...]) -> Array | None:
    """Optional floating-point array `key`, checked against `shape`; (F, 1) serves for (F,)."""
    if key not in arrays:
        return None
    array = _floats(arrays[key], path, key)
    if array.shape == (*shape, 1):
        array = array[..., 0]
    if array.shape != shape:
        raise TrajectoryError(f"{path}: key '{key}' must have shape {shape}, got {array.shape}")
    _refuse_nan(array, path, key)
    return array


def _floats(array: Array, path: Path, key: str) -> Array:
    _typed(array, "f", path, key)
    if array.dtype.itemsize not in (4, 8):
        raise TrajectoryError(f"{path}: key '{key}' must be float32 or float64, got {array.dtype}")
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _positions(array: Array, path: Path, key: str) -> Array:
    array = _floats(array, path, key)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise TrajectoryError(
            f"{path}: key '{key}' must have shape (frames, atoms, 3), got {array.shape}"
        )
    _refuse_nan(array, path, key)
    return array


def _refuse_nan(array: Array, path: Path, key: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise TrajectoryError(
            f"{path}: key '{key}' must be finite, got NaN or infinity, first in row "
            f"{np.argwhere(~finite)[0][0]}"
        )


def _numbers(array: Array, path: Path, key: str, num_atoms: int) -> Array:
    _typed(array, "iu", path, key)
    if array.shape != (num_atoms,):
        raise TrajectoryError(
            f"{path}: key '{key}' must have shape ({num_atoms},), one number per atom of the "
            f"positions, got {array.shape}"
        )
    return array.astype(np.int64)


def _optional(keys: Collection[str], names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in keys)


def _read_native(path: Path, keys: Collection[str], dt_fs: float | None) -> Trajectory:
    needed = ("positions", "numbers", "frames", "dt_fs")
    arrays = read_arrays(path, needed + _optional(keys, _NATIVE_OPTIONAL))
    metadata = read_metadata(arrays, path)
    return Trajectory(
        positions=_positions(arrays["positions"], path, "positions"),
        numbers=arrays["numbers"],
        dt_fs=agree_dt(path, dt_fs, _found_dt(arrays, metadata, path)),
        frames=arrays["frames"],
        start_rows=arrays.get("start_rows"),
        start_velocities=arrays.get("start_velocities"),
        energies=arrays.get("energies"),
        forces=arrays.get("forces"),
        metadata=metadata,
    )


def _read_rmd17(path: Path, keys: Collection[str], dt_fs: float | None) -> Trajectory:
    optional = _optional(keys, ("energies", "forces", "dt_fs", "metadata"))
    arrays = read_arrays(path, ("coords", "nuclear_charges", "old_indices", *optional))
    metadata = read_metadata(arrays, path)
    positions = _positions(arrays["coords"], path, "coords")
    num_frames, num_atoms, _ = positions.shape
    frames = _typed(arrays["old_indices"], "iuf", path, "old_indices")
    if frames.shape != (num_frames,) or (frames != np.rint(frames)).any():
        raise TrajectoryError(
            f"{path}: key 'old_indices' must be {num_frames} integers, one per row of coords, got "
            f"{frames.dtype} of shape {frames.shape}"
        )
    frames = frames.astype(np.int64)
    order = np.argsort(frames, kind="stable")
    frames = frames[order]
    twice = np.flatnonzero(np.diff(frames) == 0)
    if twice.size:
        raise TrajectoryError(
            f"{path}: key 'old_indices' must name each frame once, got {frames[twice[0]]} twice"
        )
    energies = _values(arrays, "energies", path, (num_frames,))
    forces = _values(arrays, "forces", path, (num_frames, num_atoms, 3))
    return Trajectory(
        positions=positions[order],
        numbers=_numbers(arrays["nuclear_charges"], path, "nuclear_charges", num_atoms),
        dt_fs=agree_dt(path, dt_fs, _found_dt(arrays, metadata, path)),
        frames=frames,
        energies=None if energies is None else energies[order],
        forces=None if forces is None else forces[order],
        metadata={**metadata, "shuffled_in_file": bool((np.diff(order) != 1).any())},
    )


def _read_md17(
    path: Path, keys: Collection[str], dt_fs: float | None, *, sparse: bool
) -> Trajectory:
    optional = _optional(keys, ("E", "F", "dt_fs", "r_unit", "metadata"))
    needed = ("R", "z", "frame", "start", "v0") if sparse else ("R", "z")
    if not sparse and "frame" in keys:
        raise TrajectoryError(
            f"{path}: key 'frame' says that frames are missing, but 'start' and 'v0' are not both "
            "there; this is not an MD17 file with every frame"
        )
    arrays = read_arrays(path, needed + optional + _optional(keys, ("v_gap",) if sparse else ()))
    metadata = read_metadata(arrays, path)
    _refuse_other_units(arrays, metadata, path)
    positions = _positions(arrays["R"], path, "R")
    num_frames, num_atoms, _ = positions.shape
    frames = np.empty(0, dtype=np.int64)  # Every frame is there, from 0.
    start = velocities = None
    if sparse:
        frames = _typed(arrays["frame"], "iu", path, "frame")
        start = _typed(arrays["start"], "iu", path, "start")
        velocities = _values(arrays, "v0", path, (len(start), num_atoms, 3))
        if "v_gap" in arrays:
            metadata["v_gap"] = arrays["v_gap"].tolist()
    return Trajectory(
        positions=positions,
        numbers=_numbers(arrays["z"], path, "z", num_atoms),
        dt_fs=agree_dt(path, dt_fs, _found_dt(arrays, metadata, path)),
        frames=frames,
        start_rows=start,
        start_velocities=velocities,
        energies=_values(arrays, "E", path, (num_frames,)),
        forces=_values(arrays, "F", path, (num_frames, num_atoms, 3)),
        metadata=metadata,
    )
