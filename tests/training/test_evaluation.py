from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gfnode_fast.data import Trajectory, build_graph
from gfnode_fast.training import (
    CheckpointError,
    GraphMismatchError,
    evaluate,
    load_model,
    read_report,
    save_figure,
    train,
)
from gfnode_fast.training.checkpoint import read_checkpoint, write_checkpoint
from gfnode_fast.training.geometry import (
    angle_triples,
    bond_angles,
    bond_lengths,
    bond_pairs,
    mean_structure,
    superpose,
)
from gfnode_fast.training.problem import load_problem
from gfnode_fast.training.report import (
    CONSTANT_VELOCITY,
    MEAN_STRUCTURE,
    MODEL,
    NOTHING_MOVES,
    distribution,
    jensen_shannon,
)
from small_run import HORIZON, NUM_TIMES, small_config, small_trajectory


def rotation(seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return torch.from_numpy(q * np.sign(np.linalg.det(q)))


def test_errors_equal_a_hand_computation(finished_run, trajectory_file):
    report = evaluate(finished_run, device="cpu", batch_size=5)
    trained = load_model(finished_run, device="cpu")
    problem = load_problem(trained.config.data)
    windows, frames = problem.windows["test"], problem.trajectory.positions.astype(np.float64)
    start = frames[windows.start]
    velocity = frames[windows.start + 1] - start
    true = frames[windows.target]
    times = windows.times.numpy()
    batch = problem.dataset("test", dtype=torch.float32, device=torch.device("cpu")).batch(
        torch.arange(5)
    )
    with torch.no_grad():
        flat = trained.model(**batch.inputs())[0].double().numpy()
    expected = {
        MODEL: flat.reshape(NUM_TIMES, 5, 3, 3).swapaxes(0, 1),
        NOTHING_MOVES: np.repeat(start[:, None], NUM_TIMES, axis=1),
        CONSTANT_VELOCITY: start[:, None] + velocity[:, None] * times[:, :, None, None],
    }
    for name, predicted in expected.items():
        square = ((predicted - true) ** 2).mean(axis=(2, 3))
        assert report.mse[name] == pytest.approx(square.mean(), rel=1e-4)
        assert report.mse_last[name] == pytest.approx(square[:, -1].mean(), rel=1e-4)
        for k in range(len(report.horizon_count)):
            low, high = (edge / 0.5 for edge in report.horizon_fs[k : k + 2])
            inside = (times > low + 1e-9) & (times <= high + 1e-9)
            assert report.horizon_count[k] == inside.sum()
            value = report.horizon_mse[name][k]
            if inside.any():
                assert value == pytest.approx(square[inside].mean(), rel=1e-4)
            else:
                assert value is None
    assert report.improvement == 1 - report.mse[MODEL] / report.mse[NOTHING_MOVES]
    assert report.num_windows == 5
    assert report.horizon_fs[-1] == HORIZON * 0.5
    assert [step for step, _ in report.history] == [4, 8, 12]

    lengths = [
        np.linalg.norm(kind[..., i, :] - kind[..., j, :], axis=-1).ravel()
        for kind in (true, expected[MODEL])
        for i, j in ((0, 1), (1, 2))
    ]
    real, found = np.sort(np.concatenate(lengths[:2])), np.sort(np.concatenate(lengths[2:]))
    assert report.bond_lengths.wasserstein == pytest.approx(np.abs(real - found).mean(), rel=1e-4)


def test_the_mean_structure_follows_the_molecule(finished_run):
    """Its error does not change when every frame is rotated and shifted on its own."""
    trained = load_model(finished_run, device="cpu")
    problem = load_problem(trained.config.data)
    frames = torch.from_numpy(problem.trajectory.positions).double()
    turned = torch.stack([f @ rotation(k) + k for k, f in enumerate(frames[:40])])
    mean, mean_turned = mean_structure(frames[:40]), mean_structure(turned)
    spread = (superpose(mean, frames[:40]) - frames[:40]).square().mean()
    spread_turned = (superpose(mean_turned, turned) - turned).square().mean()
    assert spread_turned == pytest.approx(float(spread), rel=1e-6)
    assert evaluate(trained).mse[MEAN_STRUCTURE] > 0


def test_superposition_undoes_a_motion_but_not_a_reflection():
    frame = torch.randn(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moved = frame @ rotation() + torch.tensor([1.0, -2.0, 3.0])
    torch.testing.assert_close(superpose(frame[0], moved), moved)
    mirrored = frame * torch.tensor([1.0, 1.0, -1.0])
    assert (superpose(frame[0], mirrored) - mirrored).abs().max() > 0.1


def test_bonds_and_angles_of_water():
    half = math.radians(104.5) / 2
    water = np.array(
        [[0, 0, 0], [math.sin(half), math.cos(half), 0], [-math.sin(half), math.cos(half), 0]]
    )
    graph = build_graph(water, np.array([8, 1, 1]))
    frames = torch.from_numpy(water)[None]
    pairs, triples = bond_pairs(graph), angle_triples(graph)
    assert pairs.tolist() == [[0, 1], [0, 2]]
    assert triples.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(bond_lengths(frames, pairs), torch.ones(1, 2, dtype=torch.float64))
    assert bond_angles(frames, triples).item() == pytest.approx(104.5)


def test_distributions():
    true = torch.tensor([1.0, 2.0, 3.0, 4.0])
    same = distribution(true, true.flip(0))
    assert (same.wasserstein, same.jensen_shannon) == (0.0, 0.0)
    shifted = distribution(true, true + 10)
    assert shifted.wasserstein == pytest.approx(10.0)
    assert shifted.jensen_shannon == pytest.approx(1.0)
    for histogram in (shifted.true, shifted.predicted):
        assert sum(histogram) == pytest.approx(1.0)
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
    by_hand = 0.5 * (0.5 * math.log2(0.5 / 0.75) + 0.5 * math.log2(0.5 / 0.25))
    by_hand += 0.5 * math.log2(1 / 0.75)
    assert jensen_shannon(p, q) == pytest.approx(by_hand)


def test_regular_sampling_has_one_bin_a_time(trajectory_file, tmp_path):
    train(
        small_config(trajectory_file, tmp_path / "run", data={"sampling": "regular"}, max_steps=1)
    )
    report = evaluate(tmp_path / "run", device="cpu")
    assert report.horizon_count == [5] * NUM_TIMES


def test_a_report_survives_the_file(finished_run, tmp_path):
    report = evaluate(finished_run, device="cpu")
    report.save(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report
    before = json.loads((tmp_path / "report.json").read_text())
    del before["molecules"]  # as saved before runs of several
    (tmp_path / "report.json").write_text(json.dumps(before))
    assert read_report(tmp_path / "report.json") == report
    assert json.loads((tmp_path / "report.json").read_text())["improvement"] == report.improvement
    del before["mse"]
    (tmp_path / "report.json").write_text(json.dumps(before))
    with pytest.raises(ValueError, match=r"report\.json, .*KeyError: 'mse'.*; evaluate again"):
        read_report(tmp_path / "report.json")


def test_the_figure_is_a_png(finished_run, tmp_path):
    report = evaluate(finished_run, device="cpu")
    for name, content in (
        ("full", report),
        ("diatomic", replace(report, bond_angles=None)),
    ):
        save_figure(content, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_another_trajectory_of_the_molecule(finished_run, tmp_path):
    small_trajectory(seed=3).save(tmp_path / "other.npz")
    report = evaluate(finished_run, trajectory=tmp_path / "other.npz", device="cpu")
    assert report.trajectory.endswith("other.npz")


def test_frames_of_another_spacing_are_refused(finished_run, tmp_path):
    """Times and velocities are counted in frames: the errors would mean nothing."""
    replace(small_trajectory(seed=3), dt_fs=1.0).save(tmp_path / "slow.npz")
    with pytest.raises(ValueError, match=r"`trajectory` must have the training's 0.5 fs .* 1 fs"):
        evaluate(finished_run, trajectory=tmp_path / "slow.npz", device="cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "all"}, "`split` must be one of"),
        ({"dt_fs": 1.0}, "`dt_fs` must be None without `trajectory`"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"device": "tpu"}, "`device` must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_options_that_cannot_be_served_are_refused(finished_run, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(finished_run, **options)


def test_another_molecule_is_refused(finished_run, tmp_path):
    other = small_trajectory()
    replace(other, numbers=np.array([8, 6, 6])).save(tmp_path / "atoms.npz")
    with pytest.raises(GraphMismatchError, match="`numbers` must be the checkpoint's atoms"):
        evaluate(finished_run, trajectory=tmp_path / "atoms.npz", device="cpu")
    bent = other.positions.copy()
    bent[:, 2] += np.float32([-3.0, -0.35, 0.0])  # bonded to the other carbon
    Trajectory(bent, other.numbers, 0.5).save(tmp_path / "bent.npz")
    with pytest.raises(GraphMismatchError, match="`edges` must be the checkpoint's"):
        evaluate(finished_run, trajectory=tmp_path / "bent.npz", device="cpu")


def test_a_basis_that_is_none_is_refused(finished_run, tmp_path):
    stored = read_checkpoint(finished_run)
    state = dict(stored.state)
    state["graph.eigvecs"] = state["graph.eigvecs"].roll(1, dims=1).contiguous()
    manifest = {k: v for k, v in stored.manifest.items() if k not in ("files", "format", "version")}
    write_checkpoint(tmp_path, "best", model=stored.model, state=state, manifest=manifest)
    with pytest.raises(GraphMismatchError, match="`eigvecs` must be an orthonormal eigenbasis"):
        evaluate(tmp_path, device="cpu")


def test_the_stored_basis_is_the_one_used(finished_run, monkeypatch):
    from gfnode_fast.training import problem

    expected = evaluate(finished_run, device="cpu")
    build = problem.build_graph

    def flipped(*args, **kwargs):
        graph = build(*args, **kwargs)
        return replace(graph, eigvecs=graph.eigvecs * torch.tensor([1.0, -1.0, 1.0]))

    monkeypatch.setattr(problem, "build_graph", flipped)
    assert evaluate(finished_run, device="cpu") == expected


def test_changed_training_data_is_refused(tmp_path):
    path = tmp_path / "moving.npz"
    small_trajectory().save(path)
    train(small_config(path, tmp_path / "run", max_steps=1))
    small_trajectory(seed=1).save(path)
    with pytest.raises(CheckpointError, match="another trajectory"):
        evaluate(tmp_path / "run", device="cpu")


def test_unknown_split_is_refused(finished_run):
    with pytest.raises(ValueError, match="`split` must be one of train, val, test"):
        evaluate(finished_run, split="all")


def test_weights_in_the_run_are_a_published_state_dict(finished_run):
    (file,) = finished_run.glob("best-*.model.safetensors")
    stored = load_file(file)
    assert stored.keys() == load_model(finished_run, device="cpu").model.state_dict().keys()
