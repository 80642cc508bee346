"""Make a trajectory of a small molecule with GFN2-xTB."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gfnode_fast.data.dynamics import (
    DynamicsRecord,
    DynamicsSettings,
    Progress,
    degrees_of_freedom,
    discard_state,
    run_dynamics,
)
from gfnode_fast.data.graph import bonded_pairs
from gfnode_fast.data.require import require
from gfnode_fast.data.trajectory import Array, Trajectory

_EXTRA = "gfnode-fast[simulate]"
# Bonds may breathe by this much of their relaxed length: a C-H bond at 500 K keeps within 25 %.
BOND_RATIOS = (0.7, 1.4)
# Atoms this much farther apart than bonded ones (in covalent radii) belong to different fragments.
_FRAGMENT_FACTOR = 1.7
_CHECKED_FRAMES = 1000


class SimulationError(RuntimeError):
    """A run ended in something unphysical; `report` says what, and where the frames were kept."""

    def __init__(self, message: str, report: SimulationReport) -> None:
        super().__init__(message)
        self.report = report


@dataclass(frozen=True)
class SimulationReport:
    """What a run did and whether it is physical.

    mean_temperature_K is of the recorded frames and should be within temperature_tolerance_K of
    the target (5 %, or five standard errors when the run is short). bond_ratio_min and _max are
    the extreme lengths of any bond over its relaxed length; fragments, the largest number of
    pieces the molecule was in.
    """

    path: str
    smiles: str
    frames: int
    resumed_from_step: int
    target_temperature_K: float
    mean_temperature_K: float
    temperature_tolerance_K: float
    bond_ratio_min: float
    bond_ratio_max: float
    fragments: int
    warnings: tuple[str, ...]
    errors: tuple[str, ...]


def simulate(
    smiles: str,
    frames: int,
    path: str | os.PathLike[str],
    *,
    temperature_K: float = 500.0,
    step_fs: float = 0.5,
    stride: int = 1,
    equilibration: int = 10_000,
    tau_fs: float = 100.0,
    seed: int = 0,
    checkpoint_every: int = 1000,
    progress: Progress | None = None,
) -> SimulationReport:
    """Simulate one molecule with GFN2-xTB at constant temperature and write its trajectory.

    The structure is embedded by RDKit, relaxed with GFN2-xTB, equilibrated, and recorded. An
    interrupted run is continued, exactly, by the same call (see `run_dynamics`).

    Parameters
    ----------
    smiles : one molecule; hydrogens are added. Charge and unpaired electrons are those of the text.
    frames : frames to record, one every `stride` steps.
    path : the npz to write, readable by `load_trajectory`; must not exist.
    temperature_K, tau_fs : target and time constant of the Bussi thermostat.
    step_fs : time step of velocity Verlet; 0.5 fs suits molecules with hydrogen.
    equilibration : steps before the first recorded frame.
    seed : of the embedding, the velocities and the thermostat.
    checkpoint_every : steps between checkpoints.
    progress : called with (steps done, steps in all).

    Returns
    -------
    SimulationReport, with warnings where a bond was stretched unusually.

    Raises
    ------
    RuntimeError
        When tblite, ase or rdkit is missing (``pip install gfnode-fast[simulate]``).
    ValueError
        For SMILES that are not one molecule, options out of range, a path that exists or does not
        end in .npz, and a state of another run beside it.
    SimulationError
        When the molecule fell apart or the temperature is wrong; the frames are then written to
        ``<path without .npz>.failed.npz``.

    Notes
    -----
    Cost: 1.4 ms (ethanol) to 11 ms (aspirin) a step on one core. Deterministic for a seed with
    OMP_NUM_THREADS=1 and the same package versions. Source: GFN2-xTB, Bannwarth, Ehlert, Grimme,
    J. Chem. Theory Comput. 15, 1652 (2019).
    """
    settings = DynamicsSettings(
        system=smiles,
        frames=frames,
        temperature_K=temperature_K,
        step_fs=step_fs,
        stride=stride,
        equilibration=equilibration,
        tau_fs=tau_fs,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    path = Path(path)
    if path.suffix != ".npz" or path.exists():
        raise ValueError(
            f"simulate: `path` must be a new file that ends in .npz, got {path}"
            + (" which exists; choose another name or delete it" if path.exists() else "")
        )
    if not path.parent.is_dir():
        raise ValueError(f"simulate: `path` must be in an existing folder, got {path}")
    tblite = require("tblite.ase", "simulate", _EXTRA)
    atoms, charge, multiplicity = _embed(smiles, seed)

    def make_calculator() -> Any:
        return tblite.TBLite(
            method="GFN2-xTB", charge=charge, multiplicity=multiplicity, verbosity=0
        )

    atoms.calc = make_calculator()
    relax = require("ase.optimize", "simulate", _EXTRA).BFGS(atoms, logfile=None)
    relax.run(fmax=0.02, steps=500)
    relaxed = np.array(atoms.positions)
    record = run_dynamics(atoms, make_calculator, settings, path, progress=progress)
    return finish(record, settings, relaxed, atoms.numbers, path)


def finish(
    record: DynamicsRecord, settings: DynamicsSettings, relaxed: Array, numbers: Array, path: Path
) -> SimulationReport:
    """Judge a record, write its trajectory, remove the run's state; raise if it is unphysical."""
    target = path
    report = check_physics(record, settings, relaxed, numbers, str(path))
    if report.errors:
        target = path.with_suffix(".failed.npz")
    _trajectory(record, settings, numbers, report).save(target)
    discard_state(path)
    if report.errors:
        raise SimulationError(
            f"simulate: the run of {settings.system} must be physical, but "
            + "; ".join(report.errors)
            + f". Its frames are in {target}; lower temperature_K or step_fs, or lengthen "
            "equilibration",
            report,
        )
    return report


def check_physics(
    record: DynamicsRecord, settings: DynamicsSettings, relaxed: Array, numbers: Array, path: str
) -> SimulationReport:
    """Compare temperature, bond lengths and connectivity of a record with what they should be."""
    units = require("ase.units", "simulate", "ase")
    freedom = degrees_of_freedom(relaxed)
    target = settings.temperature_K
    temperature = float(2.0 * record.kinetic.mean() / (freedom * units.kB))
    # Canonical fluctuations of the kinetic energy, decorrelating within the thermostat's time.
    duration = settings.frames * settings.stride * settings.step_fs
    independent = max(1.0, duration / (2.0 * settings.tau_fs))
    error = target * np.sqrt(2.0 / freedom / independent)
    tolerance = float(max(0.05 * target, 5.0 * error))

    i, j = np.nonzero(np.triu(bonded_pairs(relaxed, numbers)))
    lowest, highest = 1.0, 1.0
    if len(i):
        length = np.linalg.norm(record.positions[:, i] - record.positions[:, j], axis=-1)
        ratio = length / np.linalg.norm(relaxed[i] - relaxed[j], axis=-1)
        lowest, highest = float(ratio.min()), float(ratio.max())
    rows = np.unique(np.linspace(0, len(record.positions) - 1, _CHECKED_FRAMES).astype(np.int64))
    pieces = max(_fragments(record.positions[row], numbers) for row in rows)

    errors, warnings = [], []
    if abs(temperature - target) > tolerance:
        errors.append(
            f"its mean temperature is {temperature:.0f} K, not {target:.0f} ± {tolerance:.0f} K"
        )
    if pieces > _fragments(relaxed, numbers):
        errors.append(f"it fell into {pieces} pieces")
    if lowest < BOND_RATIOS[0] or highest > BOND_RATIOS[1]:
        warnings.append(
            f"bond lengths reached {lowest:.2f} to {highest:.2f} times their relaxed values, "
            f"outside {BOND_RATIOS[0]} to {BOND_RATIOS[1]}: a bond may have broken or an atom moved"
        )
    return SimulationReport(
        path=path,
        smiles=settings.system,
        frames=settings.frames,
        resumed_from_step=record.resumed_from,
        target_temperature_K=target,
        mean_temperature_K=temperature,
        temperature_tolerance_K=tolerance,
        bond_ratio_min=lowest,
        bond_ratio_max=highest,
        fragments=pieces,
        warnings=tuple(warnings),
        errors=tuple(errors),
    )


def _trajectory(
    record: DynamicsRecord, settings: DynamicsSettings, numbers: Array, report: SimulationReport
) -> Trajectory:
    checks = asdict(report)
    metadata: dict[str, object] = {
        **asdict(settings),
        "smiles": settings.system,
        "method": "GFN2-xTB",
        "thermostat": "Bussi stochastic velocity rescaling",
        "ke_convention": "<KE> = (3N - 6)/2 kB T, P = 0, L = 0",
        "r_unit": "Ang",
        "e_unit": "eV",
        "mean_temperature_K": checks["mean_temperature_K"],
        "bond_ratios": [checks["bond_ratio_min"], checks["bond_ratio_max"]],
        "warnings": list(report.warnings),
        "errors": list(report.errors),
    }
    return Trajectory(
        positions=record.positions.astype(np.float32),
        numbers=np.asarray(numbers, dtype=np.int64),
        dt_fs=settings.step_fs * settings.stride,
        energies=np.ascontiguousarray(record.energies),
        metadata=metadata,
    )


def _fragments(positions: Array, numbers: Array) -> int:
    """Number of connected pieces, with bonds stretched far still counted as bonds."""
    reach = bonded_pairs(positions, numbers, factor=_FRAGMENT_FACTOR)
    np.fill_diagonal(reach, True)
    # Squaring the reachability doubles the path length it covers.
    for _ in range(max(1, int(np.ceil(np.log2(len(numbers)))))):
        reach = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
    return len(np.unique(reach, axis=0))


def _embed(smiles: str, seed: int) -> tuple[Any, int, int]:
    """Structure of a SMILES: ase.Atoms, charge, number of unpaired electrons + 1."""
    ase = require("ase", "simulate", _EXTRA)
    chem = require("rdkit.Chem", "simulate", _EXTRA)
    forcefield = require("rdkit.Chem.AllChem", "simulate", _EXTRA)
    logger = require("rdkit.rdBase", "simulate", _EXTRA)
    # RDKit prints its complaints; the error below carries them.
    with logger.BlockLogs():
        molecule = chem.MolFromSmiles(smiles)
    if molecule is None or molecule.GetNumAtoms() == 0:
        raise ValueError(
            f"simulate: `smiles` must be a valid SMILES string, got {smiles!r}; check brackets, "
            "ring numbers and valences"
        )
    if len(chem.GetMolFrags(molecule)) != 1:
        raise ValueError(
            f"simulate: `smiles` must be one molecule, got {smiles!r} with "
            f"{len(chem.GetMolFrags(molecule))} parts"
        )
    molecule = chem.AddHs(molecule)
    if molecule.GetNumAtoms() < 2:
        raise ValueError(f"simulate: `smiles` must have at least two atoms, got {smiles!r}")
    with logger.BlockLogs():
        if forcefield.EmbedMolecule(molecule, randomSeed=seed % 2**31) != 0:
            raise ValueError(
                f"simulate: `smiles` must be a molecule RDKit can embed in space, got {smiles!r}; "
                "try another seed"
            )
        # A better start where the force field has parameters; xTB relaxes the rest.
        if forcefield.MMFFHasAllMoleculeParams(molecule):
            forcefield.MMFFOptimizeMolecule(molecule)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    unpaired = sum(atom.GetNumRadicalElectrons() for atom in molecule.GetAtoms())
    atoms = ase.Atoms(numbers=numbers, positions=molecule.GetConformer().GetPositions())
    return atoms, int(chem.GetFormalCharge(molecule)), unpaired + 1
