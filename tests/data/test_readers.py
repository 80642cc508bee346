"""`load_trajectory` on npz files: formats, times, and every kind of bad file."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders import ETHANOL, make_trajectory, sparse_frames
from gfnode_fast.data import (
    PUBLISHED_RIGID_BONDS,
    MissingTimeStepError,
    TrajectoryError,
    WindowDataset,
    build_graph,
    draw_windows,
    inspect_trajectory,
    load_trajectory,
)
from gfnode_fast.data.npz import MAX_ARRAY_BYTES, read_headers

BASE = make_trajectory(30)
MD17 = {
    "R": BASE.positions,
    "z": ETHANOL.astype(np.uint8),
    "E": np.arange(30.0)[:, None],
    "F": np.ones((30, 9, 3)),
    "name": np.array(b"ethanol"),
}


def write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_md17(tmp_path):
    trajectory = load_trajectory(write(tmp_path / "a.npz", **MD17), dt_fs=0.5)
    np.testing.assert_array_equal(trajectory.positions, BASE.positions)
    assert trajectory.positions.dtype == np.float64
    np.testing.assert_array_equal(trajectory.numbers, ETHANOL)
    np.testing.assert_array_equal(trajectory.energies, np.arange(30.0))
    assert trajectory.forces.shape == (30, 9, 3)
    assert trajectory.consecutive
    heavy = load_trajectory(tmp_path / "a.npz", dt_fs=0.5, heavy_only=True)
    np.testing.assert_array_equal(heavy.numbers, [6, 6, 8])


@pytest.mark.parametrize("format", ["md17", "md22"])
def test_explicit_format_wins_over_detection(tmp_path, format):
    both = {**MD17, "coords": 0, "nuclear_charges": 0, "old_indices": 0}
    path = write(tmp_path / "a.npz", **both)
    assert load_trajectory(path, dt_fs=1.0, format=format).num_frames == 30
    with pytest.raises(TrajectoryError, match="key 'coords'"):
        load_trajectory(path, dt_fs=1.0)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(2, 60))
def test_rmd17_is_sorted_back_into_time(tmp_path_factory, seed, count):
    rng = np.random.default_rng(seed)
    frames = sparse_frames(300, count, seed)
    truth = make_trajectory(frames=frames, seed=seed)
    order = rng.permutation(len(frames))
    path = write(
        tmp_path_factory.mktemp("rmd17") / "a.npz",
        coords=truth.positions[order],
        nuclear_charges=ETHANOL.astype(np.uint8),
        old_indices=frames[order].astype(np.float64),
        energies=frames[order].astype(np.float64),
        forces=np.broadcast_to(frames[order, None, None], (len(frames), 9, 3)).astype(np.float64),
        old_energies=np.zeros(1),
    )
    trajectory = load_trajectory(path, dt_fs=0.5)
    np.testing.assert_array_equal(trajectory.frames, frames)
    np.testing.assert_array_equal(trajectory.positions, truth.positions)
    np.testing.assert_array_equal(trajectory.energies, frames)
    np.testing.assert_array_equal(trajectory.forces[:, 4, 1], frames)
    assert trajectory.metadata["shuffled_in_file"] == bool((np.diff(order) != 1).any())


def test_rmd17_refuses_duplicated_frames(tmp_path):
    arrays = {"coords": BASE.positions[:3], "nuclear_charges": ETHANOL}
    path = write(tmp_path / "a.npz", **arrays, old_indices=np.array([4, 9, 4]))
    with pytest.raises(TrajectoryError, match="'old_indices' must name each frame once, got 4"):
        load_trajectory(path, dt_fs=0.5)
    for wrong in (np.array([1, 2]), np.array([1.5, 2.0, 3.0])):
        path = write(tmp_path / "a.npz", **arrays, old_indices=wrong)
        with pytest.raises(TrajectoryError, match="'old_indices' must be 3 integers"):
            load_trajectory(path, dt_fs=0.5)


def sparse_arrays():
    frames = sparse_frames(400, 60)
    truth = make_trajectory(frames=frames, dtype=np.float32)
    start = np.arange(0, len(frames), 4)
    return {
        "R": truth.positions,
        "z": ETHANOL.astype(np.uint8),
        "frame": frames.astype(np.int32),
        "start": start.astype(np.int32),
        "v0": np.ones((len(start), 9, 3), np.float32),
        "v_gap": np.full(len(start), 2, np.int8),
        "n_targets": np.zeros(len(start), np.int16),
        "metadata": np.array(json.dumps({"dt_fs": 0.5, "r_unit": "Ang"})),
    }


def test_sparse(tmp_path):
    arrays = sparse_arrays()
    trajectory = load_trajectory(write(tmp_path / "a.npz", **arrays))
    assert trajectory.dt_fs == 0.5
    assert not trajectory.consecutive
    np.testing.assert_array_equal(trajectory.frames, arrays["frame"])
    np.testing.assert_array_equal(trajectory.starts(), arrays["start"])
    np.testing.assert_array_equal(trajectory.start_velocities, arrays["v0"])
    assert trajectory.metadata["v_gap"] == arrays["v_gap"].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v0": np.ones((3, 9, 3), np.float32)}, r"key 'v0' must have shape \(\d+, 9, 3\)"),
        ({"start": np.array([1.0])}, "key 'start' must hold integers"),
        ({"frame": np.zeros(3, np.int32)}, "`frames` must have shape"),
        ({"v0": None}, "key 'frame' says that frames are missing"),
    ],
)
def test_sparse_refusals(tmp_path, change, message):
    arrays = {k: v for k, v in {**sparse_arrays(), **change}.items() if v is not None}
    path = write(tmp_path / "a.npz", **arrays)
    with pytest.raises(TrajectoryError, match=message) as caught:
        load_trajectory(path)
    assert str(path) in str(caught.value)


def test_missing_dt_is_never_assumed(tmp_path):
    path = write(tmp_path / "a.npz", **MD17)
    with pytest.raises(MissingTimeStepError, match=r"`dt_fs` must be given.*paracetamol"):
        load_trajectory(path)
    path = write(tmp_path / "b.npz", **MD17, dt_fs=np.array([0.25]))
    assert load_trajectory(path).dt_fs == 0.25
    with pytest.raises(ValueError, match=r"`dt_fs` must agree with the 0.25 fs .* got 0.5"):
        load_trajectory(path, dt_fs=0.5)
    with pytest.raises(ValueError, match="`dt_fs` must be a positive time"):
        load_trajectory(path, dt_fs=-1.0)
    with pytest.raises(TypeError, match="`dt_fs` must be a number"):
        load_trajectory(path, dt_fs="0.25")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"dt_fs": 0.5}, 0.5),
        ({"dt_fs": 2.0, "stride": 500}, 1000.0),
        ({"dt_fs": 2.0, "stride": 500, "frame_dt_fs": 1000.0}, 1000.0),
    ],
)
def test_dt_of_the_metadata_is_between_saved_frames(tmp_path, metadata, expected):
    path = write(tmp_path / "a.npz", **MD17, metadata=np.array(json.dumps(metadata)))
    assert load_trajectory(path).dt_fs == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"R": None}, "keys must be those of a known format"),
        ({"z": None}, "keys must be those of a known format"),
        ({"R": BASE.positions[0]}, r"key 'R' must have shape \(frames, atoms, 3\)"),
        ({"R": BASE.positions[:, :, :2]}, r"key 'R' must have shape \(frames, atoms, 3\)"),
        ({"R": BASE.positions[:0]}, r"key 'R' must have shape \(frames, atoms, 3\)"),
        ({"R": BASE.positions.astype(int)}, "key 'R' must hold floating-point"),
        ({"R": BASE.positions.astype(np.float16)}, "key 'R' must be float32 or float64"),
        ({"R": BASE.positions * np.nan}, "key 'R' must be finite.* row 0"),
        ({"z": ETHANOL[:3]}, r"key 'z' must have shape \(9,\)"),
        ({"z": ETHANOL * 1.0}, "key 'z' must hold integers"),
        ({"z": ETHANOL * 0}, "must be atomic numbers 1 to 118"),
        ({"E": np.zeros(4)}, r"key 'E' must have shape \(30,\)"),
        ({"F": np.zeros((30, 9))}, r"key 'F' must have shape \(30, 9, 3\)"),
        ({"F": np.full((30, 9, 3), np.inf)}, "key 'F' must be finite"),
        ({"R": BASE.positions.astype(object)}, "key 'R' must be numbers .* pickles are never"),
        ({"r_unit": np.array("nm")}, "key 'r_unit' must be Å"),
        ({"dt_fs": np.array("x")}, "key 'dt_fs' must be one number"),
        ({"dt_fs": np.zeros(2)}, "key 'dt_fs' must be one number"),
        ({"metadata": np.array("{")}, "key 'metadata' must be a string with a JSON object"),
        ({"metadata": np.array("[1]")}, "got a JSON list"),
        ({"metadata": np.zeros(2)}, "key 'metadata' must be a string"),
        ({"metadata": np.array('{"dt_fs": "fast"}')}, "key 'metadata' must have a number as dt_fs"),
        ({"metadata": np.array('{"r_unit": "bohr"}')}, "key 'r_unit' must be Å"),
    ],
)
def test_wrong_contents_name_file_and_key(tmp_path, change, message):
    arrays = {k: v for k, v in {**MD17, **change}.items() if v is not None}
    path = write(tmp_path / "a.npz", **arrays)
    given = None if "dt_fs" in str(change) else 0.5
    with pytest.raises(TrajectoryError, match=message) as caught:
        load_trajectory(path, dt_fs=given)
    assert str(path) in str(caught.value)


def test_big_endian_files_are_read(tmp_path):
    path = write(tmp_path / "a.npz", R=BASE.positions.astype(">f4"), z=ETHANOL.astype(">i4"))
    trajectory = load_trajectory(path, dt_fs=0.5)
    assert trajectory.positions.dtype == np.float32
    assert trajectory.positions.dtype.isnative


def test_explicit_format_with_missing_keys(tmp_path):
    path = write(tmp_path / "a.npz", **MD17)
    with pytest.raises(TrajectoryError, match="key 'coords' is missing; the file has E, F, R"):
        load_trajectory(path, format="rmd17", dt_fs=0.5)
    with pytest.raises(ValueError, match=r"`format` must be one of native, .* got 'pdb'"):
        load_trajectory(path, format="pdb")
    with pytest.raises(ValueError, match="`topology` must be None for format 'md17'"):
        load_trajectory(path, dt_fs=0.5, topology="a.pdb")
    with pytest.raises(FileNotFoundError, match="`path` must be an existing file"):
        load_trajectory(tmp_path / "none.npz")


def raw_npz(path, header, payload=b"", key="R"):
    """An npz whose array `key` has a hand-written header."""
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{key}.npy", member.getvalue() + payload)
        z = io.BytesIO()
        np.lib.format.write_array(z, ETHANOL)
        archive.writestr("z.npy", z.getvalue())
    return path


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((10**9, 9, 3), f"key 'R' must have at most {MAX_ARRAY_BYTES} bytes"),
        ((10**18, 10**18, 3), f"key 'R' must have at most {MAX_ARRAY_BYTES} bytes"),
        ((1000, 9, 3), "key 'R' must have the 216000 bytes its header declares .* got 24"),
        ((-1, 9, 3), "key 'R' must have at most"),
    ],
)
def test_declared_sizes_are_refused_before_anything_is_allocated(tmp_path, shape, message):
    header = {"descr": "<f8", "fortran_order": False, "shape": shape}
    path = raw_npz(tmp_path / "a.npz", header, payload=b"\0" * 24)
    with pytest.raises(TrajectoryError, match=message):
        load_trajectory(path, dt_fs=0.5)


def test_duplicated_and_foreign_members(tmp_path):
    path = write(tmp_path / "a.npz", **MD17)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("R.npy", b"")
    with pytest.raises(TrajectoryError, match="key 'R' must be there once"):
        load_trajectory(path, dt_fs=0.5)
    path = tmp_path / "b.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"hello")
    with pytest.raises(TrajectoryError, match=r"key 'readme.txt' must be an \.npy array"):
        load_trajectory(path, dt_fs=0.5)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04\x95", b"\x93NUMPY", b"text\n" * 100])
def test_files_of_another_kind(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(TrajectoryError, match=r"a\.npz: must be an npz file, but is damaged"):
        load_trajectory(path, dt_fs=0.5)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_damage_goes_unnoticed(tmp_path_factory, data):
    """Truncated or with a byte changed, a file loads as it was or is refused; nothing between."""
    folder = tmp_path_factory.mktemp("damage")
    good = folder / "good.npz"
    BASE.save(good)
    content = bytearray(good.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    bad = folder / "bad.npz"
    bad.write_bytes(content)
    try:
        loaded = load_trajectory(bad)
    except TrajectoryError as error:
        assert str(bad) in str(error)  # noqa: PT017
    else:
        assert loaded.content_hash() == BASE.content_hash()


def test_headers_are_read_without_data(tmp_path):
    path = write(tmp_path / "a.npz", **MD17)
    assert read_headers(path)["R"] == ((30, 9, 3), np.dtype(np.float64))


def md17_dir():
    folder = os.environ.get("GFNODE_MD17_DIR")
    if not folder:
        pytest.skip("GFNODE_MD17_DIR is not set: real MD17 data may not be shipped")
    if not Path(folder).is_dir():
        pytest.skip(f"GFNODE_MD17_DIR names {folder}, which is not there")
    return Path(folder)


@pytest.mark.parametrize(
    ("molecule", "error_of_nothing_moves"),
    # Å² per coordinate over 3000 frames, heavy atoms, as measured on the whole of MD17.
    [("aspirin", 0.122), ("ethanol", 0.058), ("uracil", 0.011)],
)
def test_real_sparse_md17(molecule, error_of_nothing_moves):
    path = md17_dir() / f"rmd17_sparse_{molecule}_firsthalf.npz"
    trajectory = load_trajectory(path, heavy_only=True)
    assert not trajectory.consecutive
    assert trajectory.dt_fs == 0.5
    graph = build_graph(
        trajectory.positions[0],
        trajectory.numbers,
        bonds="published",
        rigid_bonds=PUBLISHED_RIGID_BONDS[molecule],
    )
    assert int(graph.stick.sum()) == 2 * len(PUBLISHED_RIGID_BONDS[molecule])
    windows = draw_windows(
        trajectory, num_timesteps=8, delta_frame=3000, sizes=(None, None, None), seed=0
    )
    dataset = WindowDataset(trajectory, graph, windows["train"])
    batch = dataset.batch(torch.arange(len(dataset)))
    assert 1 <= batch.timeframes.min() < batch.timeframes.max() <= 3000
    moved = inspect_trajectory(path).nothing_moves
    assert 0.7 < moved / error_of_nothing_moves < 1.3
    # Velocities of frames whose successor exists are that difference.
    exact = np.array(trajectory.metadata["v_gap"]) == 1
    rows = trajectory.start_rows[exact]
    following = trajectory.positions[rows + 1] - trajectory.positions[rows]
    assert (trajectory.frames[rows + 1] == trajectory.frames[rows] + 1).all()
    np.testing.assert_allclose(trajectory.start_velocities[exact], following, atol=1e-5)


def test_native_refusals(tmp_path):
    arrays = {"positions": BASE.positions, "numbers": ETHANOL, "dt_fs": 0.5}
    path = write(tmp_path / "a.npz", **arrays, frames=np.zeros(30, int))
    with pytest.raises(TrajectoryError, match=r"a\.npz: .*`frames` must be strictly ascending"):
        load_trajectory(path)
    path = write(tmp_path / "b.npz", **arrays, frames=np.arange(30.0))
    with pytest.raises(TrajectoryError, match=r"b\.npz: .*`frames` must be integers"):
        load_trajectory(path)
    path = write(tmp_path / "c.npz", **arrays, frames=np.arange(30))
    assert load_trajectory(path).content_hash() == BASE.content_hash()
