"""`draw_windows`: what is drawn, from where, and that nothing leaks."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import make_trajectory, sparse_frames
from gfnode_fast.data import Trajectory, Windows, draw_windows
from gfnode_fast.data.windows import SPLIT_NAMES, _subsets, _Uniform


def point(frames):
    """A one-atom trajectory: only its times matter."""
    frames = np.asarray(frames, dtype=np.int64)
    positions = np.zeros((len(frames), 1, 3), np.float32)
    return Trajectory(positions=positions, numbers=np.array([6]), dt_fs=0.5, frames=frames)


def check_window(trajectory, windows, num_timesteps, delta_frame):
    """What every window of every split and sampling must fulfil."""
    frames = trajectory.frames
    start, target, times = (
        value.numpy() for value in (windows.start, windows.target, windows.times)
    )
    assert target.shape == times.shape == (len(start), num_timesteps)
    np.testing.assert_array_equal(frames[target] - frames[start][:, None], times)
    assert (times >= 1).all()
    assert (times <= delta_frame).all()
    assert (np.diff(times, axis=1) > 0).all()
    assert np.isin(start, trajectory.starts()).all()
    assert len(np.unique(start)) == len(start)


@st.composite
def cases(draw):
    delta_frame = draw(st.integers(1, 40))
    num_timesteps = draw(st.integers(1, min(6, delta_frame)))
    length = draw(st.integers(20 * (delta_frame + 1), 60 * (delta_frame + 1)))
    first = draw(st.integers(0, 1000))
    if draw(st.booleans()):
        frames = np.arange(length)
    else:
        frames = sparse_frames(length, max(4, (3 * length) // 4), draw(st.integers(0, 99)))
    return point(frames + first), num_timesteps, delta_frame, draw(st.integers(0, 2**63 - 1))


@settings(deadline=None, max_examples=60)
@given(cases())
def test_blocks_do_not_leak(case):
    trajectory, num_timesteps, delta_frame, seed = case
    windows = draw_windows(
        trajectory,
        num_timesteps=num_timesteps,
        delta_frame=delta_frame,
        sizes=(None, None, None),
        seed=seed,
    )
    last_seen = None
    for name in SPLIT_NAMES:
        check_window(trajectory, windows[name], num_timesteps, delta_frame)
        begin = trajectory.frames[windows[name].start.min()]
        end = trajectory.frames[windows[name].start.max()] + delta_frame
        if last_seen is not None:
            # At least one whole window (delta_frame + 1 frames) lies between the blocks.
            assert begin - last_seen > delta_frame + 1
        last_seen = end


@settings(deadline=None, max_examples=40)
@given(cases())
def test_published_split_draws_distinct_interior_starts(case):
    trajectory, num_timesteps, delta_frame, seed = case
    windows = draw_windows(
        trajectory,
        num_timesteps=num_timesteps,
        delta_frame=delta_frame,
        split="published",
        sizes=(3, 2, 2),
        seed=seed,
    )
    frames = trajectory.frames
    margin = (frames[-1] - frames[0] + 1) // 10
    for name in SPLIT_NAMES:
        check_window(trajectory, windows[name], num_timesteps, delta_frame)
        start = frames[windows[name].start]
        assert (start >= frames[0] + margin).all()
        assert (start <= frames[-1] - max(margin, delta_frame)).all()
    every = torch.cat([windows[name].start for name in SPLIT_NAMES])
    assert len(every.unique()) == 7


def test_published_margin_is_ten_thousand_frames_on_long_trajectories():
    trajectory = point(np.arange(150_000))
    windows = draw_windows(
        trajectory,
        num_timesteps=2,
        delta_frame=3000,
        split="published",
        sizes=(60_000, 30_000, None),
        seed=1,
    )
    every = torch.cat([windows[name].start for name in SPLIT_NAMES])
    assert int(every.min()) == 10_000
    assert int(every.max()) == 149_999 - 10_000
    assert len(every) == 130_000


@settings(deadline=None, max_examples=30)
@given(cases())
def test_regular_times(case):
    trajectory, num_timesteps, delta_frame, seed = case
    trajectory = point(np.arange(trajectory.frames[-1] - trajectory.frames[0] + 1))
    windows = draw_windows(
        trajectory,
        num_timesteps=num_timesteps,
        delta_frame=delta_frame,
        sampling="regular",
        sizes=(2, 2, 2),
        seed=seed,
    )
    expected = [k * delta_frame // num_timesteps for k in range(1, num_timesteps + 1)]
    for name in SPLIT_NAMES:
        check_window(trajectory, windows[name], num_timesteps, delta_frame)
        assert windows[name].times.tolist() == [expected, expected]


def test_regular_times_on_a_trajectory_with_gaps_use_only_starts_that_have_them():
    frames = np.setdiff1d(np.arange(400), np.arange(3, 400, 7))
    windows = draw_windows(
        point(frames), num_timesteps=2, delta_frame=10, sampling="regular", sizes=(9,) * 3, seed=0
    )
    for split in windows.values():
        assert split.times.tolist() == [[5, 10]] * 9


def test_irregular_targets_on_a_sparse_trajectory_exist_and_vary():
    trajectory = point(sparse_frames(4000, 1500))
    windows = draw_windows(trajectory, num_timesteps=4, delta_frame=60, sizes=(50,) * 3, seed=0)
    check_window(trajectory, windows["train"], 4, 60)
    assert len(windows["train"].times.unique(dim=0)) > 45


def test_start_rows_of_the_trajectory_are_the_only_starts():
    rows = np.arange(0, 3000, 11)
    trajectory = replace(point(np.arange(3000)), start_rows=rows)
    windows = draw_windows(
        trajectory, num_timesteps=2, delta_frame=20, sizes=(None, None, None), seed=0
    )
    for split in windows.values():
        assert (split.start % 11 == 0).all()


def test_same_seed_same_windows_and_global_random_state_untouched():
    trajectory = point(np.arange(2000))
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    options = {"num_timesteps": 8, "delta_frame": 100, "sizes": (50, 20, 20)}
    first = draw_windows(trajectory, seed=3, **options)
    again = draw_windows(trajectory, seed=3, **options)
    other = draw_windows(trajectory, seed=4, **options)
    assert random.getstate() == states[0]
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    for name in SPLIT_NAMES:
        for field in ("start", "target", "times"):
            assert torch.equal(getattr(first[name], field), getattr(again[name], field))
        assert not torch.equal(first[name].start, other[name].start)


def test_the_stream_is_pinned():
    """The windows of a seed are part of the interface: published runs name a seed."""
    windows = draw_windows(
        point(np.arange(1000)), num_timesteps=3, delta_frame=50, sizes=(2, 1, 1), seed=0
    )
    assert windows["train"].start.tolist() == [269, 11]
    assert windows["train"].times.tolist() == [[17, 28, 30], [15, 29, 31]]


def test_subsets_are_uniform():
    # All 10 subsets of 2 out of 5 equally often, all 6 of 2 out of 4 in the same call.
    available = np.array([5, 4] * 20_000)
    chosen = _subsets(_Uniform(7), available, 2)
    for row, count, subsets in ((0, 5, 10), (1, 4, 6)):
        codes, counts = np.unique(chosen[row::2] @ [count, 1], return_counts=True)
        assert len(codes) == subsets
        expected = 20_000 / subsets
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert chi_square < 35  # 99.99 % quantile for 9 degrees of freedom: 33.7
    assert (_subsets(_Uniform(0), np.array([8, 8]), 8) == np.arange(8)).all()


def test_fractions_and_sizes_are_kept():
    trajectory = point(np.arange(10_000))
    windows = draw_windows(
        trajectory,
        num_timesteps=1,
        delta_frame=10,
        sizes=(5, None, 7),
        fractions=(1, 2, 1),
        seed=0,
    )
    assert [len(windows[name]) for name in SPLIT_NAMES] == [5, 4989 - 10, 7]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_timesteps": 0}, ValueError, "`num_timesteps` must be at least 1, got 0"),
        ({"num_timesteps": 2.0}, TypeError, "`num_timesteps` must be an int"),
        ({"num_timesteps": 101}, ValueError, "`num_timesteps` must be at most delta_frame = 100"),
        ({"delta_frame": 0}, ValueError, "`delta_frame` must be at least 1"),
        ({"delta_frame": True}, TypeError, "`delta_frame` must be an int"),
        ({"seed": -1}, ValueError, "`seed` must be at least 0"),
        ({"seed": None}, TypeError, "`seed` must be an int"),
        ({"sampling": "random"}, ValueError, "`sampling` must be one of irregular, regular"),
        ({"split": "random"}, ValueError, "`split` must be one of blocks, published"),
        ({"sizes": (1, 2)}, ValueError, "`sizes` must be three positive ints"),
        ({"sizes": (1, 2, 0)}, ValueError, "`sizes` must be three positive ints"),
        ({"sizes": (1, 2, 0.5)}, ValueError, "`sizes` must be three positive ints"),
        ({"fractions": (1, 1, 0)}, ValueError, "`fractions` must be three positive"),
        ({"fractions": (float("inf"), 1, 1)}, ValueError, "`fractions` must be three positive"),
        (
            {"delta_frame": 700},
            ValueError,
            r"must span at least \d+ frames .* delta_frame = 700, got 2000; lower delta_frame",
        ),
        (
            {"sizes": (9000, 1, 1)},
            ValueError,
            r"train has 978 of them for 9000 windows.*lower that size \(data.train_size of a run\)",
        ),
        (
            {"sizes": (1, 1, 9000), "split": "published"},
            ValueError,
            "test has 1598 of them for 9000 windows",
        ),
    ],
)
def test_refusals(change, error, message):
    arguments = {"num_timesteps": 8, "delta_frame": 100, "sizes": (5, 5, 5), "seed": 0}
    with pytest.raises(error, match=message):
        draw_windows(point(np.arange(2000)), **{**arguments, **change})


def test_the_span_that_the_message_asks_for_is_enough():
    for delta_frame in (1, 7, 100):
        with pytest.raises(ValueError, match="must span at least") as caught:
            draw_windows(
                point(np.arange(delta_frame + 2)),
                num_timesteps=1,
                delta_frame=delta_frame,
                sizes=(None,) * 3,
                seed=0,
            )
        asked = int(str(caught.value).split("at least ")[1].split()[0])
        options = {"num_timesteps": 1, "delta_frame": delta_frame, "sizes": (None,) * 3, "seed": 0}
        draw_windows(point(np.arange(asked)), **options)


def test_a_trajectory_without_velocities_says_so():
    with pytest.raises(ValueError, match="train has 0 of them"):
        draw_windows(
            point(np.arange(0, 4000, 2)), num_timesteps=1, delta_frame=50, sizes=(1,) * 3, seed=0
        )


def test_drawing_cost_is_linear_in_windows():
    trajectory = point(np.arange(400_000))
    windows = draw_windows(
        trajectory, num_timesteps=8, delta_frame=3000, sizes=(200_000, 1000, 1000), seed=0
    )
    check_window(trajectory, windows["train"], 8, 3000)


@pytest.mark.parametrize(
    ("start", "target", "times", "error", "message"),
    [
        ([0], [[1]], [[0]], ValueError, "`times` must be positive and strictly ascending"),
        ([0], [[1, 2]], [[2, 1]], ValueError, "`times` must be positive and strictly ascending"),
        ([0], [[1], [2]], [[1], [2]], ValueError, r"`target` must have shape \(S, T\)"),
        ([[0]], [[1]], [[1]], ValueError, r"`target` must have shape \(S, T\)"),
        ([0], [[1]], [[1, 2]], ValueError, r"`times` must have shape \(S, T\)"),
        ([0.0], [[1]], [[1]], TypeError, "`start` must be an int64 tensor"),
    ],
)
def test_windows_refuse(start, target, times, error, message):
    with pytest.raises(error, match=message):
        Windows(torch.tensor(start), torch.tensor(target), torch.tensor(times))


def test_windows_of_molecules_have_sizes():
    windows = draw_windows(
        make_trajectory(500), num_timesteps=3, delta_frame=20, sizes=(4, 3, 2), seed=0
    )
    assert len(windows["train"]) == 4
    assert windows["train"].num_timesteps == 3
