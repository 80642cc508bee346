"""Molecular dynamics that can be interrupted and continued exactly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfnode_fast.data.files import atomic_write
from gfnode_fast.data.npz import read_arrays
from gfnode_fast.data.require import require
from gfnode_fast.data.trajectory import Array

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class DynamicsSettings:
    """Settings of one run; a run is only ever continued with the same ones.

    system : what is simulated (a SMILES string), for the comparison and the metadata.
    frames : frames to record, one every `stride` steps of `step_fs`, after `equilibration` steps.
    temperature_K, tau_fs : target and time constant of the Bussi thermostat.
    seed : of initial velocities and thermostat noise.
    checkpoint_every : steps between checkpoints.
    """

    system: str
    frames: int
    temperature_K: float = 500.0
    step_fs: float = 0.5
    stride: int = 1
    equilibration: int = 10_000
    tau_fs: float = 100.0
    seed: int = 0
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name, least in (
            ("frames", 2),
            ("stride", 1),
            ("equilibration", 0),
            ("seed", 0),
            ("checkpoint_every", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"simulate: `{name}` must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"simulate: `{name}` must be at least {least}, got {value}")
        for name in ("temperature_K", "step_fs", "tau_fs"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"simulate: `{name}` must be positive, got {value}")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run; the first frame is recorded after the equilibration."""
        return self.equilibration + (self.frames - 1) * self.stride


@dataclass(frozen=True, eq=False)
class DynamicsRecord:
    """What a run recorded: positions (F, N, 3) Å, energies (F,) eV, kinetic (F,) eV, all float64.

    resumed_from : the step the run was continued from, 0 for one that was not.
    """

    positions: Array
    energies: Array
    kinetic: Array
    resumed_from: int


def run_dynamics(
    atoms: Any,
    make_calculator: Callable[[], Any],
    settings: DynamicsSettings,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> DynamicsRecord:
    """Run velocity Verlet with Bussi's thermostat; continue a run that was interrupted.

    Beside `path` stand ``path.state.npz`` (positions, velocities, state of the random generator,
    step; replaced atomically) and ``path.frames`` (recorded frames; appended to, and cut back to
    the last checkpoint when continued). Call again with the same arguments to continue; call
    `discard_state` when the result is safe.

    Parameters
    ----------
    atoms : ase.Atoms, the relaxed start structure; not changed.
    make_calculator : makes a fresh ASE calculator. At every checkpoint a fresh one takes over,
        interrupted or not: a calculator may start from its last wave function, and this is what
        makes a continued run equal to an uninterrupted one bit for bit (with calculators that
        are themselves deterministic; tblite with OMP_NUM_THREADS=1).
    settings : the run.
    path : the trajectory to be; its folder must exist.
    progress : called with (steps done, steps in all).

    Raises
    ------
    ValueError
        When the state beside `path` belongs to a run with other settings or another start.
    RuntimeError
        When ASE is missing, or positions stop being finite (the step is named).

    Notes
    -----
    Initial velocities are Maxwell-Boltzmann with total momentum and angular momentum removed, and
    the thermostat holds the kinetic energy of the remaining 3N - 6 degrees of freedom (3N - 5 for
    linear molecules). Source: Bussi, Donadio, Parrinello, J. Chem. Phys. 126, 014101 (2007).
    """
    units = require("ase.units", "run_dynamics", "ase")
    bussi = require("ase.md.bussi", "run_dynamics", "ase").Bussi
    atoms = atoms.copy()
    start = np.array(atoms.positions)
    rng = np.random.Generator(np.random.PCG64(settings.seed))
    freedom = degrees_of_freedom(start)
    resumed_from = step = _restore(atoms, rng, settings, path)
    if step == 0:
        _thermalise(atoms, rng, settings.temperature_K, freedom)
    width = 3 * len(atoms) + 2
    with open(_frames_path(path), "ab") as stream:
        stream.truncate(_recorded(step, settings) * width * 8)
        while step < settings.total_steps:
            atoms.calc = make_calculator()
            dynamics = bussi(
                atoms,
                settings.step_fs * units.fs,
                settings.temperature_K,
                settings.tau_fs * units.fs,
                rng=rng,
            )
            # ASE counts 3N; momentum and angular momentum are zero and stay so.
            dynamics.ndof = freedom
            dynamics.target_kinetic_energy = 0.5 * freedom * units.kB * settings.temperature_K
            if step == 0 and settings.equilibration == 0:
                stream.write(_row(atoms))
            end = min(settings.total_steps, step + settings.checkpoint_every)
            while step < end:
                dynamics.step()
                step += 1
                if not np.isfinite(atoms.positions).all():
                    raise RuntimeError(
                        f"run_dynamics: `atoms` must stay finite, got NaN or infinity at step "
                        f"{step}; lower step_fs or the temperature"
                    )
                beyond = step - settings.equilibration
                if beyond >= 0 and beyond % settings.stride == 0:
                    stream.write(_row(atoms))
                if progress is not None:
                    progress(step, settings.total_steps)
            # The frames must be on the disk before the state that counts them.
            stream.flush()
            os.fsync(stream.fileno())
            _store(atoms, rng, settings, path, step, start)
    rows = np.fromfile(_frames_path(path), dtype="<f8").reshape(-1, width)
    return DynamicsRecord(
        positions=rows[:, :-2].reshape(settings.frames, len(atoms), 3),
        energies=rows[:, -2],
        kinetic=rows[:, -1],
        resumed_from=resumed_from,
    )


def discard_state(path: str | os.PathLike[str]) -> None:
    """Remove the state and the recorded frames beside `path`."""
    _state_path(path).unlink(missing_ok=True)
    _frames_path(path).unlink(missing_ok=True)


def degrees_of_freedom(positions: Array) -> int:
    """Degrees of freedom of N free atoms without overall motion: 3N - 6, or 3N - 5 on a line."""
    moments = np.linalg.svd(positions - positions.mean(axis=0), compute_uv=False)
    rotations = int((moments > 1e-3).sum())
    rotations = {0: 0, 1: 2}.get(rotations, 3)
    return 3 * len(positions) - 3 - rotations


def _state_path(path: str | os.PathLike[str]) -> Path:
    return Path(f"{path}.state.npz")


def _frames_path(path: str | os.PathLike[str]) -> Path:
    return Path(f"{path}.frames")


def _recorded(step: int, settings: DynamicsSettings) -> int:
    """Frames recorded by the end of `step`; none before the first step has been taken."""
    if step == 0 or step < settings.equilibration:
        return 0
    return (step - settings.equilibration) // settings.stride + 1


def _row(atoms: Any) -> bytes:
    values = [atoms.get_potential_energy(), atoms.get_kinetic_energy()]
    row: Array = np.concatenate([atoms.positions.reshape(-1), values])
    return row.astype("<f8").tobytes()


def _thermalise(atoms: Any, rng: np.random.Generator, temperature_K: float, freedom: int) -> None:
    units = require("ase.units", "run_dynamics", "ase")
    distribution = require("ase.md.velocitydistribution", "run_dynamics", "ase")
    atoms.positions -= atoms.get_center_of_mass()
    spread = np.sqrt(units.kB * temperature_K * atoms.get_masses())[:, None]
    atoms.set_momenta(rng.standard_normal((len(atoms), 3)) * spread)
    distribution.Stationary(atoms, preserve_temperature=False)
    distribution.ZeroRotation(atoms, preserve_temperature=False)
    # Removing the overall motion took energy away: start exactly at the target.
    target = 0.5 * freedom * units.kB * temperature_K
    atoms.set_momenta(atoms.get_momenta() * np.sqrt(target / atoms.get_kinetic_energy()))


def _identity(settings: DynamicsSettings, numbers: Array) -> str:
    return json.dumps({**asdict(settings), "numbers": numbers.tolist()}, sort_keys=True)


def _store(
    atoms: Any,
    rng: np.random.Generator,
    settings: DynamicsSettings,
    path: str | os.PathLike[str],
    step: int,
    start: Array,
) -> None:
    arrays = {
        "settings": np.array(_identity(settings, atoms.numbers)),
        "start": start,
        "step": np.int64(step),
        "positions": atoms.positions,
        "momenta": atoms.get_momenta(),
        "rng": np.array(json.dumps(rng.bit_generator.state)),
    }
    with atomic_write(_state_path(path)) as stream:
        np.savez(stream, **arrays)


def _restore(
    atoms: Any,
    rng: np.random.Generator,
    settings: DynamicsSettings,
    path: str | os.PathLike[str],
) -> int:
    """Set atoms and generator to the state beside `path`, if there is one; return its step."""
    state_path = _state_path(path)
    if not state_path.exists():
        return 0
    keys = ("settings", "start", "step", "positions", "momenta", "rng")
    state = read_arrays(state_path, keys)
    expected = _identity(settings, atoms.numbers)
    # A relaxed start differs in its last bits between machines and thread counts.
    same_start = np.allclose(state["start"], atoms.positions, rtol=0, atol=1e-3)
    if str(state["settings"]) != expected or not same_start:
        raise ValueError(
            f"simulate: `path` must not have the state of another run beside it, got {state_path} "
            f"of {state['settings']} for {expected}; pass the same arguments to continue that "
            "run, or delete its state to start anew"
        )
    recorded = _recorded(int(state["step"]), settings) * (3 * len(atoms) + 2) * 8
    have = _frames_path(path).stat().st_size if _frames_path(path).exists() else 0
    if have < recorded:
        raise ValueError(
            f"simulate: `path` must have all {recorded} bytes of frames that {state_path} counts "
            f"in {_frames_path(path)}, got {have}; delete both to start anew"
        )
    atoms.positions = state["positions"]
    atoms.set_momenta(state["momenta"])
    try:
        rng.bit_generator.state = json.loads(str(state["rng"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"simulate: `path` must have the state of a random generator beside it, got "
            f"{state_path} with a damaged key 'rng' ({type(error).__name__}: {error}); delete it "
            "to start anew"
        ) from error
    return int(state["step"])
