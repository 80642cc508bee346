from __future__ import annotations

from dataclasses import replace

import ase
import ase.io
import numpy as np
import pytest
import torch

from gfnode_fast.training import (
    GraphMismatchError,
    load_model,
    predict,
    predict_from_trajectory,
    train,
    write_extxyz,
)
from gfnode_fast.training.problem import load_problem
from small_run import HORIZON, NUM_TIMES, small_config, small_trajectory


@pytest.fixture(scope="module")
def trained(finished_run):
    return load_model(finished_run, device="cpu")


@pytest.fixture(scope="module")
def start():
    trajectory = small_trajectory()
    rows = np.array([5, 100, 300])
    return trajectory.positions[rows].astype(np.float64), trajectory.velocities(rows)


def test_equals_the_model_on_its_own_windows(trained):
    problem = load_problem(trained.config.data)
    windows = problem.windows["test"]
    dataset = problem.dataset("test", dtype=torch.float32, device=torch.device("cpu"))
    for k in range(2):
        batch = dataset.batch(torch.tensor([k]))
        with torch.no_grad():
            expected = trained.model(**batch.inputs())[0].view(NUM_TIMES, 3, 3).numpy()
        row = windows.start[k].item()
        found = predict(
            trained,
            problem.trajectory.positions[row],
            problem.trajectory.velocities(np.array([row]))[0],
            windows.times[k],
        )
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 20])
def test_any_number_of_times_in_any_order(trained, start, count):
    """A list cut into groups and filled up gives what each time gives alone."""
    times = np.random.default_rng(count).permutation(HORIZON)[:count] + 1
    found = predict(trained, start[0][0], start[1][0], times)
    assert found.shape == (count, 3, 3)
    for k, t in enumerate(times):
        alone = predict(trained, start[0][0], start[1][0], [t])
        np.testing.assert_allclose(found[k], alone[0], atol=2e-5)


def test_fixed_step_solvers_see_the_whole_list_as_one_grid(trajectory_file, tmp_path, start):
    """Cut into two groups, a list of 8 gives what a model with T = 8 gives at once."""
    config = small_config(trajectory_file, tmp_path / "run", model={"solver": "rk4"}, max_steps=1)
    train(config)
    four = load_model(tmp_path / "run", device="cpu")
    times = [1, 2, 4, 7, 11, 13, 17, 20]
    found = predict(four, start[0][0], start[1][0], times)
    eight = load_model(tmp_path / "run", device="cpu")
    eight.model.num_timesteps = 8
    data = replace(eight.config.data, num_timesteps=8)
    eight = replace(eight, config=replace(eight.config, data=data))
    expected = predict(eight, start[0][0], start[1][0], times)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_repeated_times(trained, start):
    found = predict(trained, start[0][0], start[1][0], [7, 3, 7])
    np.testing.assert_array_equal(found[0], found[2])


def test_frames_do_not_depend_on_each_other(trained, start):
    together = predict(trained, start[0], start[1], [1, 5, 9, 13, 20])
    assert together.shape == (3, 5, 3, 3)
    for k in range(3):
        alone = predict(trained, start[0][k], start[1][k], [1, 5, 9, 13, 20])
        np.testing.assert_array_equal(together[k], alone)


def test_far_from_the_origin(trained, start):
    near = predict(trained, start[0][0], start[1][0], [4])
    far = predict(trained, start[0][0] + 1000.0, start[1][0], [4])
    np.testing.assert_allclose(far - 1000.0, near, atol=1e-4)


def test_ase_atoms_and_tensors(trained, start):
    expected = predict(trained, start[0], start[1], [2, 8])
    atoms = [ase.Atoms("CCO", positions=positions) for positions in start[0]]
    np.testing.assert_array_equal(predict(trained, atoms, start[1], [2, 8]), expected)
    np.testing.assert_array_equal(predict(trained, atoms[0], start[1][0], [2, 8]), expected[0])
    tensors = [torch.from_numpy(values) for values in start]
    np.testing.assert_array_equal(predict(trained, *tensors, torch.tensor([2, 8])), expected)


def test_a_path_will_do(finished_run, trained, start):
    expected = predict(trained, start[0][0], start[1][0], [3])
    np.testing.assert_allclose(predict(finished_run, start[0][0], start[1][0], [3]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"atoms": np.zeros((4, 3))}, "`atoms` must have shape"),
        ({"atoms": ase.Atoms("CCN", positions=np.eye(3))}, "`atoms` must be the model's"),
        ({"velocities": np.zeros((2, 3, 3))}, "`velocities` must have the shape"),
        ({"velocities": np.full((3, 3), np.nan)}, "must be finite"),
        ({"times": []}, "`times` must have shape"),
        ({"times": [0]}, "`times` must be whole frames in 1 ... 20"),
        ({"times": [21]}, "got 21"),
        ({"times": [1.5]}, "got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(trained, start, change, message):
    arguments = {"atoms": start[0][0], "velocities": start[1][0], "times": [1]} | change
    with pytest.raises(ValueError, match=message):
        predict(trained, **arguments)


def test_vae_groups_share_their_noise(trajectory_file, tmp_path, start):
    for solver in ("dopri5", "rk4"):
        model = {"use_vae": True, "solver": solver}
        train(small_config(trajectory_file, tmp_path / solver, model=model, max_steps=1))
    adaptive, fixed = (load_model(tmp_path / s, device="cpu") for s in ("dopri5", "rk4"))
    found = predict(adaptive, start[0][0], start[1][0], range(1, 9))
    alone = predict(adaptive, start[0][0], start[1][0], [8])
    np.testing.assert_allclose(found[-1], alone[0], atol=2e-5)
    assert predict(fixed, start[0][0], start[1][0], [1, 2]).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="`times` must be at most 4"):
        predict(fixed, start[0][0], start[1][0], range(1, 9))


def test_from_a_trajectory_with_the_truth_beside(trained):
    trajectory = small_trajectory()
    found = predict_from_trajectory(trained, trajectory, [10, 390], [5, 15])
    assert found.known.tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(found.true[0, 1], trajectory.positions[25].astype(np.float64))
    assert np.isnan(found.true[1, 1]).all()
    np.testing.assert_array_equal(
        found.positions[0],
        predict(
            trained, trajectory.positions[10], trajectory.velocities(np.array([10]))[0], [5, 15]
        ),
    )
    with pytest.raises(ValueError, match="`starts` must be frame numbers with a velocity, got 399"):
        predict_from_trajectory(trained, trajectory, [10, 399], [5])
    with pytest.raises(ValueError, match="`trajectory` must have the training's 0.5 fs"):
        predict_from_trajectory(trained, replace(trajectory, dt_fs=1.0), [10], [5])
    other = replace(trajectory, numbers=np.array([8, 6, 6]))
    with pytest.raises(ValueError, match="`trajectory` must be of the model's atoms"):
        predict_from_trajectory(trained, other, [10], [5])
    bent = trajectory.positions.copy()
    bent[:, 2] += np.float32([-3.0, -0.35, 0.0])  # an isomer: bonded to the other carbon
    with pytest.raises(GraphMismatchError, match="`edges` must be the checkpoint's"):
        predict_from_trajectory(trained, replace(trajectory, positions=bent), [10], [5])


def test_extxyz_opens_in_ase(tmp_path):
    positions = np.random.default_rng(0).normal(size=(2, 3, 3))
    infos = [{"time_fs": 1.5, "name": "two words"}, {"time_fs": 2.5, "name": "x"}]
    write_extxyz(tmp_path / "x.extxyz", positions, np.array([6, 6, 8]), infos=infos)
    frames = ase.io.read(tmp_path / "x.extxyz", index=":")
    assert [frame.get_chemical_formula() for frame in frames] == ["C2O", "C2O"]
    for frame, expected, info in zip(frames, positions, infos, strict=True):
        np.testing.assert_allclose(frame.positions, expected, atol=1e-8)
        assert frame.info == info
        assert not frame.pbc.any()
    with pytest.raises(ValueError, match="`positions` must have shape"):
        write_extxyz(tmp_path / "x", positions[0], np.array([6, 6, 8]), infos=infos)
    with pytest.raises(ValueError, match="`infos` must have one entry"):
        write_extxyz(tmp_path / "x", positions, np.array([6, 6, 8]), infos=infos[:1])
