"""The measurements of whole training runs, at the smallest sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import (
    end_to_end,
    equivalence,
    gpu_acceptance,
    large_systems,
    mixed,
    report,
    training_part,
)
from benchmarks.baselines.published_loop import ItemDataset, flattened, published_steps
from benchmarks.compare import changes
from benchmarks.equivalence_figure import draw
from benchmarks.peptides import SYSTEMS, capped_peptide, vibrating
from benchmarks.rounded import rounded, rounded_graph_layers
from benchmarks.training_runs import Watch
from benchmarks.training_tables import (
    end_to_end_table,
    equivalence_table,
    large_systems_table,
    mixed_table,
)
from gfnode_fast import FourierMD, reference
from gfnode_fast.data import WindowDataset, build_graph, draw_windows, load_sample
from gfnode_fast.data.graph import bonded_pairs
from gfnode_fast.ops import graph_layers_torch
from gfnode_fast.training import ModelConfig, TrainEvent

CPU = torch.device("cpu")
TINY_MODEL = training_part.TINY_MODEL


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    size = equivalence.Size(
        seeds=2, epochs=2, batch=2, windows=4, validation=2, sample="ethanol", model=TINY_MODEL
    )
    folder = tmp_path_factory.mktemp("runs")
    about = {"device": "cpu", "hardware": "x", "cores": 1, "threads": 1, "pinned": None,
             "python": "3", "versions": {}, "commit": None, "modified_files": None,
             "load_average": [0.0]}  # fmt: skip
    return {"kind": "equivalence", "about": about, **equivalence.measure(size, CPU, folder)}


def test_the_curves_follow_the_reference(result: dict, tmp_path: Path) -> None:
    assert result["size"]["steps"] == len(result["reference"]["mean"]) == 4
    found = result["variants"]
    assert list(found) == ["fp32", "tf32 emulated", "bf16 emulated"]
    assert found["fp32"]["largest_relative_distance"] < 1e-5
    distances = [variant["largest_relative_distance"] for variant in found.values()]
    assert distances == sorted(distances)
    assert distances[1] > 0  # rounding there was
    assert [variant["emulated"] for variant in found.values()] == [False, True, True]
    assert found["fp32"]["verdict"] in equivalence_table(result)
    assert report.EQUIVALENCE_FIGURE in report.readme_section([result])
    with pytest.raises(ValueError, match="OLD must be a result of run.py, got one without rows"):
        changes(result, result)
    draw(result, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_curve_that_leaves_the_spread_is_seen() -> None:
    reference = np.array([[1.0, 0.8], [1.2, 1.0], [1.1, 0.9]])
    near, far = reference + 0.01, reference + np.array([0.0, 0.3])
    errors = [0.5, 0.6, 0.7]
    assert equivalence.compare(near, reference, errors, errors)["verdict"] == "follows"
    found = equivalence.compare(far, reference, errors, errors)
    assert found["verdict"] == "leaves the spread"
    assert found["largest_distance"] == pytest.approx(3.0)
    assert found["steps_with_mean_in_range"] == 0.5
    other = equivalence.compare(near, reference, [0.9] * 3, errors)
    assert other["verdict"] == "leaves the spread"


def test_operands_are_rounded_inside_the_context_alone() -> None:
    x = torch.tensor([1 + 2.0**-11, 1 + 2.0**-12, 1 + 2.0**-8, 1 + 2.0**-9])
    assert rounded(x, "tf32").tolist() == [1 + 2.0**-10, 1.0, 1 + 2.0**-8, 1 + 2.0**-9]
    assert rounded(x, "bf16").tolist() == [1.0, 1.0, 1.0, 1.0]
    with rounded_graph_layers("bf16"):
        assert graph_layers_torch.F is not F
        assert graph_layers_torch.F.pad is F.pad
        assert nn.functional.linear is F.linear
    assert graph_layers_torch.F is F
    with pytest.raises(ValueError, match="`precision` must be one of tf32, bf16, got 'fp32'"):
        rounded_graph_layers("fp32").__enter__()


def test_steps_are_timed_between_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, clock = Watch(), iter([5.0, 9.0, 10.0])
    monkeypatch.setattr("benchmarks.training_runs.time.perf_counter", lambda: next(clock))
    watch(TrainEvent("start", 0, 6, 0))
    for step in (2, 4, 6):
        watch(TrainEvent("train", step, 6, 0, {"loss": 1.0}))
    watch(TrainEvent("validation", 6, 6, 1, {"val_mse": 2.0}))
    assert watch.step_seconds() == [2.0, 0.5]
    assert watch.step_seconds(warm=2) == [0.5]
    assert watch.val_mse == [2.0]


def test_the_published_loader_gives_the_same_batches() -> None:
    trajectory = load_sample("ethanol")
    graph = build_graph(trajectory.positions[0], trajectory.numbers)
    sizes = {"num_timesteps": 2, "delta_frame": 10, "sizes": (4, 1, 1), "seed": 0}
    windows = draw_windows(trajectory, **sizes)["train"]
    items = ItemDataset(trajectory, graph, windows)
    expected = WindowDataset(trajectory, graph, windows).batch(torch.tensor([2, 0]))
    got = flattened(torch.utils.data.default_collate([items[2], items[0]]), graph)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(got, name), value, rtol=1e-6, atol=1e-7, msg=name)
    options = {"num_timesteps": 2, "delta_frame": 10, "num_atoms": 3, "fourier_basis": "graph"}
    model = reference.FourierMD(2, 2, 5, 8, with_v=True, time_emb_dim=4, **options)
    same = FourierMD(2, 2, 5, 8, with_v=True, time_emb_dim=4, **options)
    same.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    steps = published_steps(model, items, 4, 1e-3, 0.0)  # all windows at once, in any order
    batch = WindowDataset(trajectory, graph, windows).batch(torch.arange(4))
    loss = (same(**batch.inputs())[0] - batch.target).square().mean()
    torch.testing.assert_close(next(steps), loss.detach(), rtol=1e-4, atol=0)
    assert next(steps) < loss


def test_end_to_end(tmp_path: Path) -> None:
    much = end_to_end.Effort(log_every=1, readings=2, rounds=1)
    found = end_to_end.measure_batch(
        2, CPU, much, tmp_path, published_limit_s=60.0, molecule="ethanol"
    )
    assert found["contenders"]["train"]["n"] == found["contenders"]["bare step"]["n"] == 2
    assert found["contenders"]["published"]["n"] == 1
    assert set(found["ratios"]) == {"train / published", "train / bare step"}
    without = end_to_end.measure_batch(
        3, CPU, much, tmp_path, published_limit_s=0.0, molecule="ethanol"
    )
    assert "the limit is 0 s" in without["contenders"]["published"]["reason"]
    text = end_to_end_table({"batches": [found, without]})
    assert "| B = 2 |" in text
    assert "skipped: about" in text


@pytest.mark.parametrize(("num_atoms", "residues"), [(42, "AAA"), *SYSTEMS.items()])
def test_peptides_are_molecules(num_atoms: int, residues: str) -> None:
    positions, numbers = capped_peptide(residues)
    assert len(numbers) == num_atoms
    bonded = bonded_pairs(positions, numbers)
    assert bonded.sum() == 2 * (num_atoms - 1)  # a tree
    neighbours = {1: 1, 8: 1, 7: 3}
    for number, count in zip(numbers, bonded.sum(axis=1), strict=True):
        assert count == neighbours.get(number, count)
        assert number != 6 or count in (3, 4)
    apart = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    closest = apart[~(bonded | (bonded @ bonded))].min()
    assert closest > 1.9  # no clash
    moved = vibrating(positions, numbers, 30).positions
    assert all((bonded_pairs(frame, numbers) == bonded).all() for frame in moved[::29])
    assert 0 < np.abs(np.diff(moved, axis=0)).max() < 0.02  # smooth


def test_the_simulated_peptide_has_the_graph_of_the_ideal_one() -> None:
    simulated, _ = large_systems.trajectory_of(42)
    graph = build_graph(simulated.positions[0], simulated.numbers)
    ideal = build_graph(*capped_peptide("AAA"))
    torch.testing.assert_close(graph.eigenvalues, ideal.eigenvalues, rtol=0, atol=1e-9)
    assert sorted(graph.numbers.tolist()) == sorted(ideal.numbers.tolist())


def test_alanines_are_left_handed() -> None:
    positions, numbers = capped_peptide("A")
    heavy = positions[numbers > 1]  # Ac C, C, N; Cα, O, C, Cβ, N; C, O
    nitrogen, alpha, carbonyl, beta = heavy[[2, 3, 5, 6]]
    volume = np.dot(nitrogen - alpha, np.cross(carbonyl - alpha, beta - alpha))
    assert volume > 1
    with pytest.raises(ValueError, match="`residues` must be letters A and G, got 'AV'"):
        capped_peptide("AV")


def test_large_systems_train_for_two_steps(tmp_path: Path) -> None:
    size = large_systems.Size(batch=1, steps=1, warm=0, model=TINY_MODEL)
    found = large_systems.measure((148, 370), size, CPU, tmp_path)
    assert [system["num_atoms"] for system in found["systems"]] == [148, 370]
    for system in found["systems"]:
        assert system["n"] == 1
        assert np.isfinite([system["first_loss"], system["last_loss"]]).all()
        assert system["last_loss"] != system["first_loss"]
    assert found["memory"]["last_exponent"] < 1.1  # nothing quadratic in a step
    assert "exponent between the two largest" in large_systems_table(found)


def test_the_part_on_a_gpu_runs_dry(tmp_path: Path) -> None:
    options = ["--part", "training", "--dry-run", "--out", str(tmp_path)]
    assert gpu_acceptance.main(options) == 0
    text = (tmp_path / "training.md").read_text()
    for piece in ("end_to_end:", "large_systems:", "equivalence:"):
        assert piece in text
    assert gpu_acceptance.main([*options, "--minutes", "0"]) == 0
    assert "skipped equivalence: no time" in (tmp_path / "training.md").read_text()


def test_two_molecules_in_a_batch_apart_and_padded() -> None:
    found = mixed.measure((4,), CPU, ModelConfig(**dict(TINY_MODEL)), rounds=1, seconds_each=0.0)
    (entry,) = found["batches"]
    assert list(entry["contenders"]) == ["mixed", "apart", "padded"]
    assert max(entry["losses"].values()) == pytest.approx(min(entry["losses"].values()), rel=1e-4)
    assert mixed_table(found).count("B = 4") == 1
