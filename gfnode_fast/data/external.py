"""Trajectory formats read through other packages: ASE, and mdtraj as an optional extra."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from gfnode_fast.data.elements import SYMBOLS
from gfnode_fast.data.npz import MAX_ARRAY_BYTES
from gfnode_fast.data.require import MissingPackageError, require
from gfnode_fast.data.trajectory import Array, Trajectory, TrajectoryError, agree_dt

NM_TO_ANGSTROM = 10.0
_HDF5_SUFFIXES = (".h5", ".hdf5")
# Formats whose times, in ps, come from the simulation; for others mdtraj counts frames.
_TIMED_SUFFIXES = (".xtc", ".trr", *_HDF5_SUFFIXES)


def read_ase(path: Path, dt_fs: float | None) -> Trajectory:
    """Read every frame of a file with `ase.io.iread`; errors as `load_trajectory` documents.

    dt is the caller's or ``atoms.info["dt_fs"]``. Energies (eV) and forces (eV/Å) are kept when
    every frame has them.
    """
    iread = require("ase.io", "load_trajectory", "ase").iread
    positions: list[Array] = []
    energies: list[float] = []
    forces: list[Array] = []
    cells: list[Array] = []
    numbers: Array | None = None
    found: float | None = None
    with _naming(path, "ASE"):
        for atoms in iread(str(path), index=":"):
            if numbers is None:
                numbers = np.asarray(atoms.numbers, dtype=np.int64)
                found = atoms.info.get("dt_fs")
            elif not np.array_equal(numbers, atoms.numbers):
                raise TrajectoryError(
                    f"{path}: key 'numbers' must be the same in all frames, got other atoms in "
                    f"frame {len(positions)}; reorder them or split the file"
                )
            positions.append(np.asarray(atoms.positions, dtype=np.float64))
            _refuse_large(path, (len(positions), len(numbers), 3), 8)
            results = {} if atoms.calc is None else atoms.calc.results
            if "energy" in results:
                energies.append(float(results["energy"]))
            if "forces" in results:
                forces.append(np.asarray(results["forces"], dtype=np.float64))
            cells.append(np.where(atoms.pbc, atoms.cell.lengths(), 0.0))
    if numbers is None:
        raise TrajectoryError(f"{path}: key 'positions' must have at least one frame, got none")
    stacked = np.stack(positions)
    _refuse_wrapped(path, stacked, np.stack(cells))
    return Trajectory(
        positions=stacked,
        numbers=numbers,
        dt_fs=agree_dt(path, dt_fs, found),
        energies=np.array(energies) if len(energies) == len(positions) else None,
        forces=np.stack(forces) if len(forces) == len(positions) else None,
        metadata={"reader": "ase", "r_unit": "Ang", "e_unit": "eV", "f_unit": "eV/Ang"},
    )


def read_mdtraj(
    path: Path, dt_fs: float | None, topology: str | os.PathLike[str] | None
) -> Trajectory:
    """Read DCD, XTC, TRR, NetCDF or HDF5 and convert nm to Å; errors as `load_trajectory`.

    mdtraj's HDF5 layout is read with h5py: PyTables would unpickle attributes of the file.
    """
    mdtraj = require("mdtraj", "load_trajectory", "gfnode-fast[mdtraj]")
    hdf5 = path.suffix.lower() in _HDF5_SUFFIXES
    if topology is None and not hdf5:
        raise ValueError(
            f"load_trajectory: `topology` must be given, because {path.suffix} files do not name "
            "their atoms; pass topology='molecule.pdb' or the like"
        )
    if topology is not None and Path(topology).suffix.lower() in _HDF5_SUFFIXES:
        raise ValueError(
            f"load_trajectory: `topology` must be a PDB or similar file, got {topology}; HDF5 "
            "trajectories name their atoms themselves"
        )
    numbers: Array | None = None
    if topology is not None:
        if not Path(topology).is_file():
            raise FileNotFoundError(
                f"load_trajectory: `topology` must be an existing file, got {topology}"
            )
        with _naming(Path(topology), "mdtraj"):
            atoms = list(mdtraj.load_topology(str(topology)).atoms)
        numbers = _atomic_numbers(Path(topology), [atom.element for atom in atoms])
    read = _read_hdf5 if hdf5 else _read_with_topology
    with _naming(path, "mdtraj"):
        xyz, time, cell, own_numbers = read(mdtraj, path, topology)
    if numbers is None:
        numbers = own_numbers
    positions = xyz.astype(np.float64) * NM_TO_ANGSTROM
    if numbers is None or positions.shape[1] != len(numbers):
        raise TrajectoryError(
            f"{path}: key 'coordinates' must have the {0 if numbers is None else len(numbers)} "
            f"atoms of the topology, got {positions.shape[1]}"
        )
    if cell is not None:
        _refuse_wrapped(path, positions, np.asarray(cell, dtype=np.float64) * NM_TO_ANGSTROM)
    found = None
    if time is not None and path.suffix.lower() in _TIMED_SUFFIXES:
        found = _uniform_dt(path, np.asarray(time, dtype=np.float64) * 1000.0, dt_fs)
    return Trajectory(
        positions=positions,
        numbers=numbers,
        dt_fs=agree_dt(path, dt_fs, found),
        metadata={"reader": "mdtraj", "r_unit": "Ang"},
    )


def _read_with_topology(
    mdtraj: Any, path: Path, topology: str | os.PathLike[str] | None
) -> tuple[Array, Array | None, Array | None, None]:
    top = mdtraj.load_topology(str(topology))
    with mdtraj.open(str(path)) as stream:
        _refuse_large(path, (len(stream), top.n_atoms, 3), 8)
    loaded = mdtraj.load(str(path), top=top)
    return loaded.xyz, loaded.time, loaded.unitcell_lengths, None


def _read_hdf5(
    _mdtraj: Any, path: Path, topology: str | os.PathLike[str] | None
) -> tuple[Array, Array | None, Array | None, Array | None]:
    h5py = require("h5py", "load_trajectory", "gfnode-fast[mdtraj]")
    with h5py.File(path, "r") as file:
        for key in ("coordinates", "topology"):
            if key not in file and not (key == "topology" and topology is not None):
                raise TrajectoryError(f"{path}: key '{key}' is missing; the file has {list(file)}")
        coordinates = file["coordinates"]
        _refuse_large(path, coordinates.shape, 8)
        units = coordinates.attrs.get("units", "nanometers")
        units = units.decode() if isinstance(units, bytes) else str(units)
        if units not in ("nanometers", "nm"):
            raise TrajectoryError(f"{path}: key 'coordinates' must be in nanometers, got {units!r}")
        numbers = None
        if topology is None:
            layout = json.loads(np.asarray(file["topology"]).reshape(-1)[0])
            symbols = {
                int(atom["index"]): str(atom["element"])
                for chain in layout["chains"]
                for residue in chain["residues"]
                for atom in residue["atoms"]
            }
            numbers = np.array([SYMBOLS.index(symbols[i]) + 1 for i in range(len(symbols))])
        time = np.asarray(file["time"]) if "time" in file else None
        cell = np.asarray(file["cell_lengths"]) if "cell_lengths" in file else None
        return np.asarray(coordinates), time, cell, numbers


@contextmanager
def _naming(path: Path, reader: str) -> Iterator[None]:
    """Name the file in whatever a foreign reader raises about its contents."""
    try:
        yield
    except (TrajectoryError, FileNotFoundError, MissingPackageError, MemoryError):
        raise
    except Exception as error:
        raise TrajectoryError(
            f"{path}: must be a trajectory that {reader} reads, but it is damaged, truncated or "
            f"another kind ({type(error).__name__}: {error})"
        ) from error


def _refuse_large(path: Path, shape: tuple[int, ...], itemsize: int) -> None:
    size = itemsize
    for extent in shape:
        size *= int(extent)
    if size > MAX_ARRAY_BYTES:
        raise TrajectoryError(
            f"{path}: key 'positions' must have at most {MAX_ARRAY_BYTES} bytes, got shape "
            f"{tuple(shape)} ({size} bytes); split the trajectory"
        )


def _refuse_wrapped(path: Path, positions: Array, cells: Array) -> None:
    """Refuse atoms that jump through a periodic boundary; `cells` (F, 3) Å, 0 where open."""
    if len(positions) < 2 or not cells.any():
        return
    jump = np.abs(np.diff(positions, axis=0)).max(axis=1)
    wrapped = ((cells[1:] > 0) & (jump > 0.5 * cells[1:])).any(axis=1)
    if wrapped.any():
        raise TrajectoryError(
            f"{path}: key 'positions' must be unwrapped, got an atom that jumps by more than half "
            f"the cell before frame {int(np.argmax(wrapped)) + 1}; unwrap the trajectory first"
        )


def _atomic_numbers(path: Path, elements: list[Any]) -> Array:
    numbers = [0 if element is None else int(element.atomic_number) for element in elements]
    if not numbers or min(numbers) < 1:
        raise TrajectoryError(
            f"{path}: key 'element' must be known for every atom, got "
            + (f"none for atom {numbers.index(0)}" if numbers else "no atoms")
        )
    return np.array(numbers, dtype=np.int64)


def _uniform_dt(path: Path, time_fs: Array, given: float | None) -> float | None:
    """Time step of the file's own times, or None when they carry none (one frame, all equal)."""
    if len(time_fs) < 2 or np.ptp(time_fs) == 0:
        return None
    dt = float(time_fs[-1] - time_fs[0]) / (len(time_fs) - 1)
    # Files keep times in float32 picoseconds.
    tolerance = 1e-3 * abs(dt) + 4 * np.finfo(np.float32).eps * np.abs(time_fs).max()
    if dt <= 0 or np.abs(np.diff(time_fs) - dt).max() > tolerance:
        raise TrajectoryError(
            f"{path}: key 'time' must ascend in equal steps, got steps of "
            f"{np.diff(time_fs).min():.6g} to {np.diff(time_fs).max():.6g} fs; split the "
            "trajectory where it jumps"
        )
    return dt if given is None or not np.isclose(given, dt, rtol=0, atol=tolerance) else given
