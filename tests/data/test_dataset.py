"""`WindowDataset`: batches against a per-atom construction of the published features."""

import dataclasses

import numpy as np
import pytest
import torch

from data_builders import ETHANOL, make_trajectory, sparse_frames
from gfnode_fast.data import WindowDataset, Windows, build_graph, draw_windows

DELTA, T = 40, 3


def make_dataset(trajectory=None, dtype=torch.float64, **options):
    trajectory = make_trajectory(800) if trajectory is None else trajectory
    graph = build_graph(trajectory.positions[0], trajectory.numbers, rigid_bonds=[(0, 1)])
    windows = draw_windows(
        trajectory, num_timesteps=T, delta_frame=DELTA, sizes=(20, 5, 5), seed=0, **options
    )["train"]
    return trajectory, graph, windows, WindowDataset(trajectory, graph, windows, dtype=dtype)


@pytest.mark.parametrize("sparse", [False, True])
def test_batch_equals_the_atom_by_atom_construction(sparse):
    frames = sparse_frames(3000, 1200) if sparse else np.arange(800)
    trajectory, graph, windows, dataset = make_dataset(make_trajectory(frames=frames))
    index = torch.tensor([3, 0, 3, 19])
    batch = dataset.batch(index)
    size, num_atoms, positions = len(index), trajectory.num_atoms, trajectory.positions
    row, col = batch.edge_index
    assert batch.x.dtype == torch.float64
    edge = 0
    for b, sample in enumerate(index.tolist()):
        start = int(windows.start[sample])
        here, velocity = positions[start], positions[start + 1] - positions[start]
        for i in range(num_atoms):
            at = b * num_atoms + i
            np.testing.assert_array_equal(batch.x[at], here[i])
            np.testing.assert_array_equal(batch.v[at], velocity[i])
            np.testing.assert_allclose(batch.loc_mean[at], here.mean(0), atol=1e-14)
            expected = [np.linalg.norm(velocity[i]), trajectory.numbers[i] / 8]
            np.testing.assert_allclose(batch.h[at], expected, rtol=1e-14)
        for e in range(graph.num_edges):
            i, j = int(graph.row[e]), int(graph.col[e])
            assert (int(row[edge]), int(col[edge])) == (b * num_atoms + i, b * num_atoms + j)
            rigid = float({i, j} == {0, 1})
            square = ((here[i] - here[j]) ** 2).sum()
            expected = [trajectory.numbers[i], trajectory.numbers[j], graph.hops[e], rigid, square]
            np.testing.assert_allclose(batch.edge_fea[edge], expected, rtol=1e-13)
            edge += 1
        target = batch.target.view(T, size, num_atoms, 3)
        for t in range(T):
            row_t = int(windows.target[sample, t])
            np.testing.assert_array_equal(target[t, b], positions[row_t])
            elapsed = trajectory.frames[row_t] - trajectory.frames[start]
            assert float(batch.timeframes[b, t]) == elapsed
        torch.testing.assert_close(batch.U_batch[b], graph.eigvecs, rtol=0, atol=0)
    assert edge == row.shape[0] == col.shape[0]
    assert batch.U_batch.shape == (size, num_atoms, num_atoms)


def test_inputs_are_the_arguments_of_forward():
    *_, dataset = make_dataset()
    inputs = dataset.batch(torch.arange(2)).inputs()
    assert set(inputs) == set(
        ["x", "h", "edge_index", "edge_fea", "v", "loc_mean", "timeframes", "U_batch"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_of_everything_floating(dtype):
    *_, dataset = make_dataset(dtype=dtype)
    assert dataset.dtype == dtype
    assert len(dataset) == 20
    for name, value in dataset.batch(torch.arange(4))._asdict().items():
        if name == "edge_index":
            assert all(part.dtype == torch.int64 for part in value)
        else:
            assert value.dtype == dtype, name


def test_the_order_of_a_batch_only_reorders_it():
    *_, dataset = make_dataset()
    forward, backward = dataset.batch(torch.arange(5)), dataset.batch(torch.arange(5).flip(0))
    for name in ("x", "v", "h", "loc_mean"):
        a, b = (getattr(batch, name).view(5, 9, -1) for batch in (forward, backward))
        torch.testing.assert_close(a, b.flip(0), rtol=0, atol=0)


def test_velocities_of_the_file_are_used():
    base = make_trajectory(800)
    rows = np.arange(0, 800, 3)
    velocities = np.random.default_rng(0).standard_normal((len(rows), 9, 3))
    trajectory = dataclasses.replace(base, start_rows=rows, start_velocities=velocities)
    _, _, windows, dataset = make_dataset(trajectory)
    expected = velocities[windows.start.numpy() // 3].reshape(-1, 3)
    np.testing.assert_array_equal(dataset.batch(torch.arange(20)).v, expected)


def test_far_from_the_origin_float32_loses_nothing():
    # A molecule that drifts from 0 to 199 Å while it vibrates, as benzene in rMD17 does.
    near = make_trajectory(800)
    drift = np.linspace(0, 199, 800)[:, None, None]
    far = dataclasses.replace(near, positions=near.positions + drift)
    _, _, windows, exact = make_dataset(far, torch.float64)
    *_, dataset = make_dataset(far, torch.float32)
    index = torch.arange(20)
    batch, reference = dataset.batch(index), exact.batch(index)
    assert batch.x.abs().max() < 3
    start = windows.start.numpy()
    centroids = far.positions[start].mean(axis=1)
    np.testing.assert_allclose(dataset.origin, centroids, atol=1e-12)
    absolute = batch.target.double().view(T, 20, 9, 3) + dataset.origin[:, None]
    expected = torch.from_numpy(far.positions[windows.target.numpy()]).transpose(0, 1)
    torch.testing.assert_close(absolute, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(batch.v.double(), reference.v, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(batch.edge_fea.double(), reference.edge_fea, rtol=2e-6, atol=1e-5)


def test_near_the_origin_positions_are_the_files():
    trajectory, _, windows, dataset = make_dataset()
    assert not dataset.origin.any()
    np.testing.assert_array_equal(
        dataset.batch(torch.arange(20)).x.view(20, 9, 3), trajectory.positions[windows.start]
    )


def test_to_keeps_the_original():
    *_, dataset = make_dataset()
    moved = dataset.to("meta")
    assert moved.device.type == "meta"
    assert dataset.device.type == "cpu"
    assert len(moved) == 20
    assert dataset.to("cpu").batch(torch.arange(1)).x.device.type == "cpu"


def test_batch_looks_at_no_value():
    """On the meta device any look at a value raises: what it allows cannot synchronise a GPU."""
    *_, dataset = make_dataset()
    batch = dataset.to("meta").batch(torch.zeros(6, dtype=torch.int64, device="meta"))
    assert batch.target.shape == (T * 6 * 9, 3)


@pytest.mark.gpu
def test_batch_does_not_synchronise():
    *_, dataset = make_dataset()
    index = torch.arange(8)
    there = dataset.to("cuda")
    on_device = index.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = there.batch(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(batch.target.cpu(), dataset.batch(index).target)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ([0, 1], TypeError, "`index` must be an int64 tensor, got list"),
        (torch.tensor([0.0]), TypeError, "`index` must be an int64 tensor, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"`index` must have shape \(B,\)"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"`index` must have shape \(B,\), B > 0"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "`index` must be on cpu"),
        (torch.tensor([20]), IndexError, "out of range"),
        (torch.tensor([-1]), IndexError, "out of range"),
    ],
)
def test_batch_refusals(index, error, message):
    *_, dataset = make_dataset()
    with pytest.raises(error, match=message):
        dataset.batch(index)


def test_construction_refusals():
    trajectory, graph, windows, _ = make_dataset()
    with pytest.raises(TypeError, match="`dtype` must be float32 or float64"):
        WindowDataset(trajectory, graph, windows, dtype=torch.float16)
    other = build_graph(trajectory.positions[0][:3], ETHANOL[:3])
    with pytest.raises(ValueError, match="`graph` must be of the trajectory's molecule"):
        WindowDataset(trajectory, other, windows)
    short = dataclasses.replace(
        trajectory, positions=trajectory.positions[:50], frames=trajectory.frames[:50]
    )
    with pytest.raises(ValueError, match="`windows` must have rows in 0 … 49"):
        WindowDataset(short, graph, windows)
    shifted = Windows(windows.start, windows.target, windows.times + 1)
    with pytest.raises(ValueError, match="`windows` must have the trajectory's times"):
        WindowDataset(trajectory, graph, shifted)
    empty = Windows(windows.start[:0], windows.target[:0], windows.times[:0])
    with pytest.raises(ValueError, match="not be empty, got 0 windows"):
        WindowDataset(trajectory, graph, empty)
