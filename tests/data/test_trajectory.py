"""`Trajectory`: what it accepts, derives, saves and refuses."""

import dataclasses
import hashlib
import os

import numpy as np
import pytest

from data_builders import ETHANOL, make_trajectory
from gfnode_fast.data import Trajectory, TrajectoryError, load_trajectory
from gfnode_fast.data.files import atomic_write


def test_defaults_and_derived_values():
    trajectory = make_trajectory(50)
    assert trajectory.num_frames == 50
    assert trajectory.num_atoms == 9
    assert trajectory.consecutive
    np.testing.assert_array_equal(trajectory.starts(), np.arange(49))
    plain = Trajectory(positions=trajectory.positions, numbers=ETHANOL, dt_fs=0.5)
    np.testing.assert_array_equal(plain.frames, np.arange(50))


def test_velocity_is_the_forward_difference_and_never_crosses_a_gap():
    trajectory = make_trajectory(frames=[0, 1, 5, 6, 9])
    np.testing.assert_array_equal(trajectory.starts(), [0, 2])
    expected = trajectory.positions[[1, 3]] - trajectory.positions[[0, 2]]
    np.testing.assert_array_equal(trajectory.velocities([0, 2]), expected)
    for row in (1, 4):
        with pytest.raises(ValueError, match="`rows` must be followed by the next frame"):
            trajectory.velocities([row])


def test_velocities_of_the_file_win_over_differences():
    base = make_trajectory(20)
    given = np.random.default_rng(0).standard_normal((2, 9, 3))
    trajectory = dataclasses.replace(base, start_rows=[4, 9], start_velocities=given)
    np.testing.assert_array_equal(trajectory.velocities([9, 4]), given[[1, 0]])
    with pytest.raises(ValueError, match="`rows` must be start rows"):
        trajectory.velocities([5])


def test_heavy_atoms_drop_hydrogens_everywhere():
    base = make_trajectory(20)
    trajectory = dataclasses.replace(
        base,
        start_rows=[1],
        start_velocities=np.ones((1, 9, 3)),
        forces=np.ones((20, 9, 3)),
        energies=np.ones(20),
    ).heavy_atoms()
    np.testing.assert_array_equal(trajectory.numbers, [6, 6, 8])
    np.testing.assert_array_equal(trajectory.positions, base.positions[:, :3])
    assert trajectory.start_velocities.shape == (1, 3, 3)
    assert trajectory.forces.shape == (20, 3, 3)
    assert trajectory.heavy_atoms() is trajectory
    with pytest.raises(TrajectoryError, match="beside hydrogen"):
        make_trajectory(5, [1, 1]).heavy_atoms()


def test_content_hash_follows_the_content_and_nothing_else():
    trajectory = make_trajectory(20)
    digest = trajectory.content_hash()
    assert digest == make_trajectory(20).content_hash()
    assert digest == dataclasses.replace(trajectory, metadata={"a": 1}).content_hash()
    moved = trajectory.positions.copy()
    moved[3, 2, 1] = np.nextafter(moved[3, 2, 1], np.inf)
    for change in (
        {"positions": moved},
        {"dt_fs": 1.0},
        {"frames": trajectory.frames + 1},
        {"start_rows": np.arange(19)},
        {"numbers": trajectory.numbers[::-1]},
    ):
        assert dataclasses.replace(trajectory, **change).content_hash() != digest


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_save_and_load_are_exact(tmp_path, dtype):
    base = make_trajectory(frames=[3, 4, 9, 20], dtype=dtype)
    trajectory = dataclasses.replace(
        base,
        start_rows=[0, 2],
        start_velocities=np.ones((2, 9, 3), dtype),
        energies=np.arange(4.0),
        forces=np.ones((4, 9, 3)),
        metadata={"name": "é", "list": [1, 2]},
    )
    trajectory.save(tmp_path / "run.npz")
    loaded = load_trajectory(tmp_path / "run.npz")
    assert loaded.content_hash() == trajectory.content_hash()
    assert loaded.positions.dtype == dtype
    np.testing.assert_array_equal(loaded.energies, trajectory.energies)
    np.testing.assert_array_equal(loaded.forces, trajectory.forces)
    assert loaded.metadata == trajectory.metadata
    with pytest.raises(ValueError, match=r"`path` must end in \.npz"):
        trajectory.save(tmp_path / "run.xyz")


def test_saving_is_deterministic_and_leaves_no_temporary_files(tmp_path):
    trajectory = make_trajectory(10)
    digests = []
    for name in ("a.npz", "b.npz"):
        trajectory.save(tmp_path / name)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as stream:
        stream.write(b"new")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


POSITIONS = np.zeros((4, 2, 3)) + np.arange(2)[:, None]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"positions": [[0.0]]}, TypeError, "`positions` must be a NumPy array"),
        ({"positions": np.zeros((4, 2, 2))}, TrajectoryError, "`positions` must have shape"),
        ({"positions": np.zeros((0, 2, 3))}, TrajectoryError, "`positions` must have shape"),
        ({"positions": POSITIONS.astype(np.float16)}, TypeError, "float32 or float64"),
        ({"positions": POSITIONS.astype(">f8")}, TypeError, "float32 or float64 array, got >f8"),
        ({"positions": POSITIONS.astype(int)}, TypeError, "`positions` must be a float32"),
        ({"positions": POSITIONS * np.nan}, TrajectoryError, "finite, got NaN .* row 0"),
        ({"numbers": [6]}, TrajectoryError, r"`numbers` must have shape \(2,\)"),
        ({"numbers": [6.0, 6.0]}, TypeError, "`numbers` must be integers"),
        ({"numbers": [6, 0]}, TrajectoryError, "atomic numbers 1 to 118, got 0 to 6"),
        ({"numbers": [6, 119]}, TrajectoryError, "atomic numbers 1 to 118"),
        ({"dt_fs": 0.0}, TrajectoryError, "`dt_fs` must be a positive time"),
        ({"dt_fs": np.inf}, TrajectoryError, "`dt_fs` must be a positive time"),
        ({"dt_fs": "0.5"}, TypeError, "`dt_fs` must be a number"),
        ({"dt_fs": True}, TypeError, "`dt_fs` must be a number"),
        ({"frames": [0, 1]}, TrajectoryError, r"`frames` must have shape \(4,\)"),
        ({"frames": [0, 1, 1, 2]}, TrajectoryError, "`frames` must be strictly ascending"),
        ({"frames": [0.0, 1.0, 2.0, 3.0]}, TypeError, "`frames` must be integers"),
        ({"start_rows": [2, 1]}, TrajectoryError, "`start_rows` must be 1-D and strictly"),
        ({"start_rows": [1, 4]}, TrajectoryError, r"`start_rows` must lie in 0 … 3"),
        ({"start_velocities": POSITIONS}, TrajectoryError, "must come with `start_rows`"),
        (
            {"start_rows": [1], "start_velocities": POSITIONS},
            TrajectoryError,
            r"`start_velocities` must have shape \(1, 2, 3\)",
        ),
        ({"energies": np.zeros(3)}, TrajectoryError, r"`energies` must have shape \(4,\)"),
        ({"forces": np.zeros((4, 2))}, TrajectoryError, r"`forces` must have shape \(4, 2, 3\)"),
    ],
)
def test_refusals(change, error, message):
    arguments = {"positions": POSITIONS, "numbers": np.array([6, 6]), "dt_fs": 0.5}
    with pytest.raises(error, match=message):
        Trajectory(**{**arguments, **change})


def test_content_reaches_the_disk_before_its_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "x") as stream:
        stream.write(b"1")
    assert events == ["fsync", "rename", "fsync"]
