"""Files read through ASE and mdtraj."""

import importlib
import json

import numpy as np
import pytest

from data_builders import ETHANOL, make_trajectory
from gfnode_fast.data import MissingTimeStepError, TrajectoryError, external, load_trajectory

BASE = make_trajectory(12)


@pytest.fixture
def ase_frames():
    ase = pytest.importorskip("ase", reason="writes files with ASE")
    return [ase.Atoms(numbers=ETHANOL, positions=frame) for frame in BASE.positions]


@pytest.mark.parametrize("suffix", ["extxyz", "traj", "xyz"])
def test_ase_formats(tmp_path, ase_frames, suffix):
    from ase.io import write

    path = tmp_path / f"a.{suffix}"
    write(path, ase_frames)
    trajectory = load_trajectory(path, dt_fs=0.5)
    # extxyz rounds to 1e-8 Å, plain xyz to more digits than that.
    np.testing.assert_allclose(trajectory.positions, BASE.positions, atol=1e-7)
    np.testing.assert_array_equal(trajectory.numbers, ETHANOL)
    assert trajectory.consecutive
    with pytest.raises(MissingTimeStepError, match="`dt_fs` must be given"):
        load_trajectory(path)


def test_ase_energies_forces_and_dt_of_the_file(tmp_path, ase_frames):
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    for number, atoms in enumerate(ase_frames):
        forces = np.full((9, 3), float(number))
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * number, forces=forces)
        atoms.info["dt_fs"] = 0.25
    path = tmp_path / "a.extxyz"
    write(path, ase_frames)
    trajectory = load_trajectory(path)
    assert trajectory.dt_fs == 0.25
    np.testing.assert_allclose(trajectory.energies, -np.arange(12.0))
    np.testing.assert_allclose(trajectory.forces[:, 3, 2], np.arange(12.0))
    with pytest.raises(ValueError, match=r"`dt_fs` must agree with the 0\.25 fs"):
        load_trajectory(path, dt_fs=0.5)


def test_ase_refuses_changing_atoms(tmp_path, ase_frames):
    from ase.io import write

    ase_frames[3].numbers[0] = 8
    write(tmp_path / "a.extxyz", ase_frames)
    with pytest.raises(TrajectoryError, match="key 'numbers' must be the same .* frame 3"):
        load_trajectory(tmp_path / "a.extxyz", dt_fs=0.5)


def test_wrapped_trajectories_are_refused(tmp_path, ase_frames):
    from ase.io import write

    for number, atoms in enumerate(ase_frames):
        atoms.set_cell([10, 10, 10])
        atoms.pbc = True
        atoms.positions += 0.4 * number
    write(tmp_path / "whole.extxyz", ase_frames)
    assert load_trajectory(tmp_path / "whole.extxyz", dt_fs=0.5).num_frames == 12
    for atoms in ase_frames:
        atoms.wrap()
    write(tmp_path / "wrapped.extxyz", ase_frames)
    with pytest.raises(TrajectoryError, match="key 'positions' must be unwrapped"):
        load_trajectory(tmp_path / "wrapped.extxyz", dt_fs=0.5)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.extxyz", b"9\nno\nC 0 0"), ("a.traj", b"- of Ulm nothing"), ("a.what", b"\x80\x04."),
     ("a.xyz", b"")],
)  # fmt: skip
def test_damaged_files_name_the_file(tmp_path, name, content):
    pytest.importorskip("ase", reason="reads files with ASE")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TrajectoryError, match=name):
        load_trajectory(tmp_path / name, dt_fs=0.5)


def test_oversized_files_are_refused(tmp_path, ase_frames, monkeypatch):
    from ase.io import write

    write(tmp_path / "a.extxyz", ase_frames)
    monkeypatch.setattr(external, "MAX_ARRAY_BYTES", 5 * 9 * 3 * 8)
    with pytest.raises(TrajectoryError, match="key 'positions' must have at most 1080 bytes"):
        load_trajectory(tmp_path / "a.extxyz", dt_fs=0.5)


@pytest.fixture
def mdtraj_run(tmp_path):
    mdtraj = pytest.importorskip("mdtraj", reason="the extra mdtraj is not installed")
    topology = mdtraj.Topology()
    residue = topology.add_residue("ETH", topology.add_chain())
    for number in ETHANOL:
        element = mdtraj.element.Element.getByAtomicNumber(int(number))
        topology.add_atom(element.symbol, element, residue)
    xyz = (BASE.positions / 10).astype(np.float32)
    run = mdtraj.Trajectory(xyz, topology, time=np.arange(12) * 0.5e-3)
    run[0].save(str(tmp_path / "top.pdb"))
    return run


@pytest.mark.parametrize("suffix", ["dcd", "xtc", "trr"])
def test_mdtraj_formats(tmp_path, mdtraj_run, suffix):
    path = tmp_path / f"a.{suffix}"
    mdtraj_run.save(str(path))
    timed = suffix != "dcd"
    trajectory = load_trajectory(path, topology=tmp_path / "top.pdb", dt_fs=None if timed else 0.5)
    atol = 6e-3 if suffix == "xtc" else 1e-5
    np.testing.assert_allclose(trajectory.positions, BASE.positions, atol=atol)
    np.testing.assert_array_equal(trajectory.numbers, ETHANOL)
    assert trajectory.dt_fs == pytest.approx(0.5, rel=1e-3)
    if timed:
        with pytest.raises(ValueError, match="`dt_fs` must agree with"):
            load_trajectory(path, topology=tmp_path / "top.pdb", dt_fs=2.0)
    else:
        with pytest.raises(MissingTimeStepError, match="`dt_fs` must be given"):
            load_trajectory(path, topology=tmp_path / "top.pdb")


def test_mdtraj_refusals(tmp_path, mdtraj_run, monkeypatch):
    path, top = tmp_path / "a.dcd", tmp_path / "top.pdb"
    mdtraj_run.save(str(path))
    with pytest.raises(ValueError, match=r"`topology` must be given, because \.dcd files"):
        load_trajectory(path, dt_fs=0.5)
    with pytest.raises(FileNotFoundError, match="`topology` must be an existing file"):
        load_trajectory(path, dt_fs=0.5, topology=tmp_path / "none.pdb")
    with pytest.raises(ValueError, match="`topology` must be a PDB or similar"):
        load_trajectory(path, dt_fs=0.5, topology="a.h5")
    mdtraj_run.atom_slice([0, 1])[0].save(str(tmp_path / "small.pdb"))
    with pytest.raises(TrajectoryError, match=r"a\.dcd"):
        load_trajectory(path, dt_fs=0.5, topology=tmp_path / "small.pdb")
    monkeypatch.setattr(external, "MAX_ARRAY_BYTES", 100)
    with pytest.raises(TrajectoryError, match="must have at most 100 bytes"):
        load_trajectory(path, dt_fs=0.5, topology=top)
    monkeypatch.undo()
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(TrajectoryError, match=r"a\.dcd: must be a trajectory that mdtraj reads"):
        load_trajectory(path, dt_fs=0.5, topology=top)


def test_times_with_a_jump_are_refused(tmp_path, mdtraj_run):
    mdtraj_run.time = np.concatenate([np.arange(6), 100 + np.arange(6)]) * 1e-3
    mdtraj_run.save(str(tmp_path / "a.trr"))
    with pytest.raises(TrajectoryError, match="key 'time' must ascend in equal steps"):
        load_trajectory(tmp_path / "a.trr", topology=tmp_path / "top.pdb")


@pytest.fixture
def hdf5(tmp_path):
    """A file in mdtraj's HDF5 layout."""
    h5py = pytest.importorskip("h5py", reason="the extra mdtraj is not installed")
    pytest.importorskip("mdtraj", reason="the extra mdtraj is not installed")
    symbols = ["C", "C", "O", *["H"] * 6]
    atoms = [{"index": i, "name": s, "element": s} for i, s in enumerate(symbols)]
    layout = {"chains": [{"index": 0, "residues": [{"index": 0, "name": "E", "atoms": atoms}]}]}
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["coordinates"] = (BASE.positions / 10).astype(np.float32)
        file["coordinates"].attrs["units"] = "nanometers"
        file["time"] = (np.arange(12) * 0.5e-3).astype(np.float32)
        file["topology"] = np.array([json.dumps(layout).encode()])
    return h5py, path


def test_hdf5(hdf5):
    h5py, path = hdf5
    trajectory = load_trajectory(path)
    np.testing.assert_allclose(trajectory.positions, BASE.positions, atol=1e-5)
    np.testing.assert_array_equal(trajectory.numbers, ETHANOL)
    assert trajectory.dt_fs == pytest.approx(0.5, rel=1e-3)
    with h5py.File(path, "a") as file:
        file["coordinates"].attrs["units"] = "angstroms"
    with pytest.raises(TrajectoryError, match="key 'coordinates' must be in nanometers"):
        load_trajectory(path)
    with h5py.File(path, "a") as file:
        del file["topology"]
    with pytest.raises(TrajectoryError, match="key 'topology' is missing"):
        load_trajectory(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(TrajectoryError, match=r"a\.h5: must be a trajectory that mdtraj reads"):
        load_trajectory(path)


@pytest.mark.parametrize(
    ("module", "name", "install"),
    [
        ("mdtraj", "a.dcd", r"pip install gfnode-fast\[mdtraj\]"),
        ("ase.io", "a.extxyz", "pip install ase"),
    ],
)
def test_a_missing_package_names_the_command(tmp_path, monkeypatch, module, name, install):
    (tmp_path / name).write_bytes(b"x")
    real = importlib.import_module

    def absent(wanted, *rest):
        if wanted == module:
            raise ImportError(f"No module named {wanted!r}")
        return real(wanted, *rest)

    monkeypatch.setattr("gfnode_fast.data.require.import_module", absent)
    with pytest.raises(RuntimeError, match=install):
        load_trajectory(tmp_path / name, dt_fs=0.5, topology="top.pdb" if "dcd" in name else None)
