"""The compact coding and the samples shipped in it."""

import dataclasses
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import make_trajectory
from gfnode_fast.data import TrajectoryError, load_sample, load_trajectory, write_compact

SAMPLES = {
    # name: atoms, frames, mean squared displacement over 3000 frames in Å² per coordinate
    "aspirin": (13, 60_000, 0.24),
    "ethanol": (3, 100_000, 0.059),
}


@settings(deadline=None, max_examples=25)
@given(
    num_frames=st.integers(1, 50),
    num_atoms=st.integers(1, 8),
    quantum=st.sampled_from([1e-6, 1e-5, 1e-3]),
    offset=st.floats(-400, 400),
    seed=st.integers(0, 1000),
)
def test_round_trip_rounds_to_the_quantum(
    tmp_path_factory, num_frames, num_atoms, quantum, offset, seed
):
    numbers = np.full(num_atoms, 6)
    trajectory = make_trajectory(num_frames, numbers, seed=seed, offset=offset)
    trajectory = dataclasses.replace(trajectory, metadata={"name": "x"})
    path = tmp_path_factory.mktemp("compact") / "a.npz"
    write_compact(trajectory, path, quantum=quantum)
    loaded = load_trajectory(path)
    # Half a quantum, and float32's own rounding.
    bound = 0.5 * quantum * (1 + 1e-6) + np.abs(trajectory.positions).max() * 2.0**-24
    assert np.abs(loaded.positions - trajectory.positions).max() <= bound
    np.testing.assert_array_equal(loaded.numbers, trajectory.numbers)
    assert (loaded.dt_fs, loaded.metadata) == (trajectory.dt_fs, trajectory.metadata)


def test_random_motion_survives_too(tmp_path):
    positions = np.random.default_rng(0).uniform(-50, 50, size=(40, 2, 3))
    trajectory = dataclasses.replace(make_trajectory(40, [6, 6]), positions=positions)
    write_compact(trajectory, tmp_path / "a.npz", quantum=1e-7)
    loaded = load_trajectory(tmp_path / "a.npz")
    np.testing.assert_array_equal(loaded.positions, (np.rint(positions / 1e-7) * 1e-7).astype("f4"))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_samples(name):
    num_atoms, num_frames, moved = SAMPLES[name]
    sample = load_sample(name)
    assert (sample.num_frames, sample.num_atoms) == (num_frames, num_atoms)
    assert sample.dt_fs == 0.5
    assert sample.consecutive
    assert sample.positions.dtype == np.float32
    assert (sample.numbers > 1).all()
    assert sample.metadata["method"] == "GFN2-xTB"
    assert {"license", "source", "smiles"} <= set(sample.metadata)
    step = np.diff(sample.positions, axis=0)
    assert 1e-3 < np.sqrt((step**2).mean()) < 4e-3
    assert np.abs(step).max() < 0.02
    ahead = sample.positions[3000:] - sample.positions[:-3000]
    assert abs(float((ahead.astype(float) ** 2).mean()) / moved - 1) < 0.02


def test_samples_fit_the_package():
    folder = files("gfnode_fast.data").joinpath("samples")
    sizes = [len(entry.read_bytes()) for entry in folder.iterdir() if entry.is_file()]
    assert len(sizes) == 3  # two trajectories and their README
    assert sum(sizes) <= 4 * 2**20


def test_damage_is_named(tmp_path):
    write_compact(make_trajectory(20), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        arrays = dict(file)
    for change, message in (
        ({"planes": arrays["planes"] ^ np.uint8(1)}, "key 'sha256' must match the positions"),
        ({"planes": arrays["planes"][:, :-1]}, r"key 'planes' must be uint8 of shape \(4, 540\)"),
        ({"shape": np.array([20, 9])}, "key 'planes' must be uint8"),
        ({"shape": np.array("20")}, "key 'shape' must hold integers"),
        ({"compact": np.int64(2)}, "key 'compact' must be version 1, got 2"),
        ({"compact": np.array("x")}, "key 'compact' must be one number"),
        ({"quantum": np.array("x")}, "key 'quantum' must be one number"),
        ({"dt_fs": np.ones(2)}, "key 'dt_fs' must be one number"),
        ({"metadata": np.array("{")}, "key 'metadata' must be a string with a JSON object"),
        ({"metadata": np.array("[]")}, "key 'metadata' must be a string with a JSON object"),
    ):
        np.savez(tmp_path / "b.npz", **{**arrays, **change})
        with pytest.raises(TrajectoryError, match=message):
            load_trajectory(tmp_path / "b.npz")
    for key in arrays:
        np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if k != key})
        with pytest.raises(TrajectoryError, match=rf"b\.npz: key '{key}' is missing; the file has"):
            load_trajectory(tmp_path / "b.npz", format="compact")


def test_refusals(tmp_path):
    trajectory = make_trajectory(20)
    with pytest.raises(ValueError, match="`name` must be one of aspirin, ethanol, got 'water'"):
        load_sample("water")
    with pytest.raises(ValueError, match=r"`path` must end in \.npz"):
        write_compact(trajectory, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="`quantum` must be positive, got 0"):
        write_compact(trajectory, tmp_path / "a.npz", quantum=0)
    with pytest.raises(ValueError, match="`quantum` must be above"):
        write_compact(trajectory, tmp_path / "a.npz", quantum=1e-10)
    for change in ({"frames": np.arange(0, 40, 2)}, {"start_rows": [1]}):
        with pytest.raises(ValueError, match="`trajectory` must have consecutive frames from 0"):
            write_compact(dataclasses.replace(trajectory, **change), tmp_path / "a.npz")
    write_compact(trajectory, tmp_path / "a.npz")
    with pytest.raises(ValueError, match=r"`dt_fs` must agree with the 0\.5 fs"):
        load_trajectory(tmp_path / "a.npz", dt_fs=1.0)
