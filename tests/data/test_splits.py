"""Split files: round trip, and refusal of other trajectories and damaged files."""

import dataclasses
import json

import pytest
import torch

from data_builders import make_trajectory
from gfnode_fast.data import draw_windows, load_windows, save_windows


@pytest.fixture
def saved(tmp_path):
    trajectory = make_trajectory(500)
    windows = draw_windows(trajectory, num_timesteps=3, delta_frame=20, sizes=(5, 4, 3), seed=0)
    path = tmp_path / "split.json"
    save_windows(path, windows, trajectory, options={"seed": 0})
    return path, windows, trajectory


def test_round_trip(saved):
    path, windows, trajectory = saved
    loaded = load_windows(path, trajectory)
    assert list(loaded) == ["train", "val", "test"]
    for name, split in windows.items():
        for field in ("start", "target", "times"):
            assert torch.equal(getattr(split, field), getattr(loaded[name], field))
    assert json.loads(path.read_text())["options"] == {"seed": 0}


def test_another_trajectory_is_refused(saved):
    path, _, trajectory = saved
    with pytest.raises(ValueError, match=r"`trajectory` must be the one .* draw windows anew"):
        load_windows(path, dataclasses.replace(trajectory, dt_fs=1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "must be gfnode_fast.windows version 1, got other version 1"),
        (
            {"version": 2},
            "must be gfnode_fast.windows version 1, got gfnode_fast.windows version 2",
        ),
        ({"splits": {"train": {}}}, "damaged or another kind"),
        ({"splits": None}, "damaged or another kind"),
    ],
)
def test_changed_files_are_refused(saved, change, message):
    path, _, trajectory = saved
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_windows(path, trajectory)


@pytest.mark.parametrize(
    ("start", "target", "message"),
    [
        ([0], [[500]], "must have rows in 0 … 499, got 0 to 500"),
        ([-1], [[5]], "must have rows in 0 … 499, got -1 to 5"),
        ([0, 1], [[5]], r"must have targets of shape \(2, T\)"),
        ([5], [[1]], "`times` must be positive"),
        ([0], [[1], [2, 3]], "damaged or another kind"),
        (["a"], [[1]], "damaged or another kind"),
    ],
)
def test_wrong_rows_are_refused(saved, start, target, message):
    path, _, trajectory = saved
    content = json.loads(path.read_text())
    content["splits"]["val"] = {"start": start, "target": target}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_windows(path, trajectory)


def test_truncated_and_incomplete(saved):
    path, windows, trajectory = saved
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="damaged or another kind"):
        load_windows(path, trajectory)
    with pytest.raises(ValueError, match="`windows` must have train, val, test, got train"):
        save_windows(path, {"train": windows["train"]}, trajectory)
