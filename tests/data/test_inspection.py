"""`inspect_trajectory`: what it says about good and odd files."""

import dataclasses
import json

import numpy as np
import pytest

from data_builders import ETHANOL, make_trajectory, sparse_frames
from gfnode_fast.data import TrajectoryError, inspect_trajectory


def test_a_plain_run(tmp_path):
    trajectory = dataclasses.replace(make_trajectory(101), metadata={"name": "ethanol"})
    trajectory.save(tmp_path / "a.npz")
    found = inspect_trajectory(tmp_path / "a.npz", horizon=20)
    assert found.format == "native"
    assert found.formula == "C2H6O"
    assert (found.num_frames, found.num_atoms, found.start_rows) == (101, 9, 100)
    assert found.consecutive
    assert found.missing_frames == 0
    assert (found.dt_fs, found.duration_ps) == (0.5, 0.05)
    assert found.unit_guess == "Å"
    assert found.keys["positions"] == "float64 (101, 9, 3)"
    assert found.content_hash == trajectory.content_hash()
    assert found.warnings == ()
    heavy = trajectory.positions[:, :3]
    assert found.horizon == 20
    assert found.nothing_moves == pytest.approx(((heavy[20:] - heavy[:-20]) ** 2).mean())
    step = np.diff(trajectory.positions, axis=0)
    assert found.step == pytest.approx(np.sqrt((step**2).mean()))
    assert json.loads(json.dumps(found.as_dict()))["formula"] == "C2H6O"


def test_unknown_dt_is_reported_not_refused(tmp_path):
    np.savez(tmp_path / "a.npz", R=make_trajectory(20).positions, z=ETHANOL)
    found = inspect_trajectory(tmp_path / "a.npz")
    assert found.dt_fs is None
    assert found.duration_ps is None
    assert any("pass dt_fs" in warning for warning in found.warnings)
    assert inspect_trajectory(tmp_path / "a.npz", dt_fs=0.5).dt_fs == 0.5


def test_shuffled_and_incomplete(tmp_path):
    frames = sparse_frames(500, 80)
    truth = make_trajectory(frames=frames)
    order = np.random.default_rng(0).permutation(len(frames))
    np.savez(
        tmp_path / "a.npz",
        coords=truth.positions[order] + 150.0,
        nuclear_charges=ETHANOL,
        old_indices=frames[order],
    )
    found = inspect_trajectory(tmp_path / "a.npz", dt_fs=0.5)
    assert found.format == "rmd17"
    assert found.shuffled
    assert not found.consecutive
    assert found.missing_frames == frames[-1] - frames[0] + 1 - len(frames)
    assert found.start_rows == int((np.diff(frames) == 1).sum())
    text = " ".join(found.warnings)
    for phrase in ("were shuffled", "are missing", "from the origin"):
        assert phrase in text


@pytest.mark.parametrize(("scale", "unit"), [(0.1, "nm"), (1 / 0.529177, "bohr"), (1, "Å")])
def test_units_are_guessed_from_bonds(tmp_path, scale, unit):
    base = make_trajectory(10)
    dataclasses.replace(base, positions=base.positions * scale).save(tmp_path / "a.npz")
    found = inspect_trajectory(tmp_path / "a.npz")
    assert found.unit_guess == unit
    assert any("not Å" in warning for warning in found.warnings) == (unit != "Å")


def test_single_atoms_single_frames_and_no_velocities(tmp_path):
    make_trajectory(1, [6]).save(tmp_path / "a.npz")
    found = inspect_trajectory(tmp_path / "a.npz")
    assert found.unit_guess == "unknown"
    assert found.step is None
    assert found.nothing_moves is None
    assert any("no windows" in warning for warning in found.warnings)


def test_damaged_files_raise(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"PK")
    with pytest.raises(TrajectoryError, match="damaged"):
        inspect_trajectory(tmp_path / "a.npz")
