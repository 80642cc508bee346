"""The measurements of whole training runs, at the smallest sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import equivalence
from benchmarks.equivalence_figure import draw
from benchmarks.rounded import rounded, rounded_graph_layers
from benchmarks.training_runs import Watch
from benchmarks.training_tables import equivalence_table
from gfnode_fast.ops import graph_layers_torch
from gfnode_fast.training import TrainEvent

CPU = torch.device("cpu")
TINY_MODEL = (("n_layers", 1), ("hidden_nf", 8), ("time_emb_dim", 4))


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
