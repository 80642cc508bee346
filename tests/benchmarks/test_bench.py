"""The bench itself: rows, refusal before timing, timing, comparison, report, README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from benchmarks import measure as measuring
from benchmarks import operations, report, run
from benchmarks.accuracy import accuracy
from benchmarks.agreement import Checker, Disagreement, compare, require
from benchmarks.baselines import c1
from benchmarks.compare import changes
from benchmarks.compare import main as compare_files
from benchmarks.figure import draw
from benchmarks.inputs import make_batch, model_config
from benchmarks.measure import Effort, measure
from benchmarks.operations import make_task
from benchmarks.registry import (
    CAPTURED,
    CAPTURED_EXACT,
    CAPTURED_SOLVE,
    FORMS,
    MORE_ATTEMPTS,
    SETS,
    TWO_THREADS,
    Row,
    contenders,
    cpu_rows,
    gpu_core_rows,
    gpu_matrix_rows,
    select,
)
from benchmarks.task import Task, Unavailable
from benchmarks.timing import Timing, count, interleaved, peak_memory, ratio

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
FAST = Effort(rounds=2, seconds_each=0.01)
SMALL = Row("propagation", "backward", 2, molecule="ethanol")


@pytest.mark.parametrize("name", SETS)
def test_rows_are_unique_and_have_contenders(name: str) -> None:
    names = [row.name for row in SETS[name]()]
    assert len(names) == len(set(names))
    assert all(contenders(row) for row in SETS[name]())


@pytest.mark.parametrize("op", ["model", "propagation", "solve", "graph_fourier"])
def test_triton_competes_on_gpus_only(op: str) -> None:
    row = replace(SMALL, op=op)
    expected = {
        "model": ("ours triton", "ours exact triton"),
        "propagation": ("ours triton", "ours exact triton"),
        "solve": ("ours triton", MORE_ATTEMPTS, CAPTURED_SOLVE),
        "graph_fourier": ("ours triton",),
    }[op]
    assert contenders(row, "cuda")[-len(expected) :] == expected
    assert not set(contenders(row)) & set(expected)
    for name in expected:
        with pytest.raises(Unavailable, match="Triton needs a CUDA device"):
            make_task(name, row, CPU)


def test_on_gpus_expensive_baselines_run_where_a_target_names_them() -> None:
    core, matrix = (
        {row.name: contenders(row, "cuda") for row in rows}
        for rows in (gpu_core_rows(), gpu_matrix_rows())
    )
    step = core["model step egnn M=2 B=4096 irregular tf32"]
    assert step[:3] == ("U0", "U1", "C1")
    assert "C1" not in core["model step egnn M=2 B=4096 irregular bf16"]
    assert core["solve backward egnn M=2 B=4096 irregular fp32"][:2] == ("U1", "torchode")
    assert sum("C1" in names for names in [*core.values(), *matrix.values()]) == 8
    assert sum("ours compiled" in names for names in [*core.values(), *matrix.values()]) == 1
    others = [n for n in matrix if "sage_attention_concat" in n and n.startswith("model step")]
    assert all(matrix[name][0] == "U1" for name in others)
    row = Row("model", "step", 4096)
    assert contenders(row.tiny(), "cuda") == contenders(row, "cuda")  # for the dry run


def test_a_captured_step_competes_where_a_model_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("model", "step", 2, times="regular", molecule="ethanol")
    assert contenders(row, "cuda")[-2:] == (CAPTURED, CAPTURED_EXACT)
    assert CAPTURED not in contenders(row) + contenders(replace(row, phase="forward"), "cuda")
    with pytest.raises(Unavailable, match="Triton needs a CUDA device"):
        make_task(CAPTURED, row, CPU)
    # On the CPU, where it is the plain step, the same code: checked and timed, not weighed.
    monkeypatch.setitem(operations.OURS, CAPTURED, {})
    found = measure(row, CPU, Checker(CPU), FAST, without=contenders(row)[2:], kind="cuda")
    captured, triton = (found["contenders"][name] for name in (CAPTURED, "ours triton"))
    assert triton["reason"] == "Triton needs a CUDA device, this is cpu"
    assert (captured["status"], "operations" in captured) == ("ok", False)
    assert captured["agreement"]["gradients"] < 1e-3
    assert f"{CAPTURED} / U1" in found["ratios"]


def test_both_forms_of_the_graph_layers_compete() -> None:
    """Small and large molecules, on both sides of where the choice between the forms lies."""
    forms = {row: contenders(row, "cuda") for row in gpu_matrix_rows() if row.phase == "forward"}
    found = {(r.molecule, r.batch) for r, names in forms.items() if names[-2:] == tuple(FORMS)}
    sizes = ("aspirin", "peptide 148", "peptide 370")
    assert found >= {(molecule, batch) for molecule in sizes for batch in (16, 50)}
    row = Row("graph_layer", "forward", 1, molecule="peptide 148")
    batch = make_batch(row, CPU)
    assert batch.x.shape == (148, 3)
    assert model_config(row)["num_atoms"] == 148


def test_the_cpu_set_holds_the_committed_table() -> None:
    names = {row.name for row in cpu_rows()}
    for model in ("egnn", "sage_attention_concat"):
        for modes in (2, 13):
            for batch in (1, 10, 50, 100, 200):
                for times in ("irregular", "regular"):
                    for phase in ("forward", "step"):
                        assert f"model {phase} {model} M={modes} B={batch} {times} fp32" in names


def test_rows_refuse_unknown_names() -> None:
    with pytest.raises(ValueError, match="`op` must be one of"):
        Row("decode", "forward", 1)
    with pytest.raises(ValueError, match="must match a row, got 'nothing'"):
        select(cpu_rows(), ["nothing"])


def test_a_wrong_contender_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(contender: str, row: Row, device: torch.device) -> Task:
        task = make_task(contender, row, device)
        if contender != "ours":
            return task
        values = task.values
        return replace(task, values=lambda: {k: 1.01 * v for k, v in values().items()})

    monkeypatch.setattr(measuring, "make_task", wrong)
    monkeypatch.setattr(measuring, "contenders", lambda row, device: ("U0", "U1", "ours"))
    found = measure(SMALL, CPU, Checker(CPU), FAST)
    assert found["contenders"]["ours"]["status"] == "failed"
    assert "outputs differ by 1.0e-02" in found["contenders"]["ours"]["reason"]
    assert "median_s" not in found["contenders"]["ours"]
    assert found["contenders"]["U1"]["median_s"] > 0


def test_agreement_sees_nan_and_missing_values() -> None:
    expected = {"output 0": torch.ones(3), "grad w": torch.ones(2)}
    with pytest.raises(Disagreement, match="other names or shapes"):
        compare({"output 0": torch.ones(3)}, expected)
    errors = compare({**expected, "grad w": torch.full((2,), torch.nan)}, expected)
    with pytest.raises(Disagreement, match="gradients differ by inf"):
        require("ours", SMALL, errors)


def test_a_missing_contender_says_why() -> None:
    with pytest.raises(Unavailable, match="tf32 needs a CUDA device"):
        make_task("U1", replace(SMALL, precision="tf32"), CPU).run()


def test_timing_interleaves_and_pairs() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timings = interleaved(runs, CPU, rounds=3, seconds_each=60, exactly={"b": 1})
    assert len(timings["a"].samples) == 3
    assert len(timings["b"].samples) == 1
    assert order.count("b") == 1
    assert ratio(Timing([4.0, 9.0, 4.0]), Timing([2.0, 3.0])) == 2.5
    assert Timing([1.0, 2.0, 3.0]).summary()["median_s"] == 2.0


def test_u0_runs_as_often_as_its_limit_allows() -> None:
    step, propagation = Row("model", "step", 200), Row("propagation", "backward", 200)
    samples = measuring._samples_of_u0
    assert samples(replace(propagation, batch=50), CPU, Effort()) == {}
    assert samples(propagation, CPU, Effort()) == {"U0": 3}
    assert samples(propagation, CPU, replace(FAST, u0_limit_s=100.0)) == {"U0": 1}
    assert samples(step, CPU, Effort()) == {"U0": 1}


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="a second thread needs a second core")
@pytest.mark.parametrize(
    ("row", "measured"),
    [
        (Row("eigh", "forward", 20, molecule="random 5"), "eigh * random 13 B=4096 fp32"),
        (Row("graph_layer", "backward", 2, molecule="ethanol"), "graph_layer backward egnn"),
    ],
)
def test_two_threads_are_set_back(row: Row, measured: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = torch.get_num_threads(), []
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(torch, "set_num_threads", lambda n: (asked.append(n), set_num_threads(n)))
    task, alone = (make_task(name, row, CPU) for name in (TWO_THREADS, "ours"))
    found, expected = task.values(), alone.values()
    task.run()
    assert asked == [2, before] * 2
    assert torch.get_num_threads() == before
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    assert TWO_THREADS in contenders(select(cpu_rows(), [measured])[0])


def test_counting_and_weighing() -> None:
    a = torch.ones(64, 64)
    counted = count(lambda: (a @ a) + a.t())
    assert counted == {"operations": 3, "flops": 2 * 64**3, "bytes": 6 * 64 * 64 * 4}

    def peaks() -> None:
        first = torch.zeros(1 << 20)
        del first
        torch.zeros(1 << 19)

    assert peak_memory(peaks, CPU) == 4 << 20


@pytest.mark.parametrize("name", ["C1", "ours compiled", "ours in torch.compile", "ours"])
def test_nothing_compiled_is_counted(name: str) -> None:
    """Torch would not compile it again."""
    seen = []
    task = Task(lambda: seen.append(len(_get_current_dispatch_mode_stack())), dict)
    measuring._weigh(name, task, CPU, {})
    assert seen == ([0, 1] if name == "ours" else [0])


@pytest.fixture(scope="module")
def result() -> dict:
    rows = [
        SMALL,
        Row("eigh", "forward", 2, molecule="random 5"),
        Row("spectrum", "forward", 3, molecule="ethanol"),
    ]
    with c1.compiler("eager"):
        return run.measure_all(rows, CPU, FAST, 10.0, ["test"])


def test_a_result_names_where_it_was_measured(result: dict) -> None:
    about = result["about"]
    assert about["commit"] is None or len(about["commit"]) == 40
    assert about["versions"]["torch"] == torch.__version__
    assert len(about["load_average"]) == 3
    solve = result["rows"][0]
    assert set(solve["contenders"]) == set(contenders(SMALL))
    assert solve["contenders"]["U0"]["operations"] > solve["contenders"]["U1"]["operations"]
    assert solve["contenders"]["U0"]["agreement"]["outputs"] < 1e-5
    assert not run.failures(result)


def test_time_that_is_up_is_reported() -> None:
    found = run.measure_all([SMALL], CPU, FAST, -1.0, ["test"])
    assert all(c["status"] == "skipped" for c in found["rows"][0]["contenders"].values())


def test_an_update_keeps_the_rows_it_does_not_measure(result: dict) -> None:
    earlier = json.loads(json.dumps(result))
    earlier["rows"][0]["commit"] = "0" * 40
    found = run.measure_all([SMALL], CPU, FAST, -1.0, ["test"], earlier=earlier)
    assert found["rows"] == earlier["rows"]
    assert "some rows 000000000000" in report.heading(found["about"], found["rows"])
    run.put(found, {"row": SMALL.as_dict(), "contenders": {}, "ratios": {}})
    assert len(found["rows"]) == len(result["rows"])
    assert found["rows"][0]["commit"] == found["about"]["commit"]
    earlier["about"]["hardware"] = "another machine"
    with pytest.raises(ValueError, match="must continue a result of the same machine"):
        run.measure_all([SMALL], CPU, FAST, -1.0, ["test"], earlier=earlier)


def test_accuracy_stands_beside_the_time(result: dict) -> None:
    found = accuracy(replace(SMALL, op="model", phase="step"), CPU, rounds=1)
    modes = {(e["contender"], e["precision"]): e for e in found["modes"]}
    assert modes["ours", "fp32"]["output against fp32"] < 20
    assert modes["ours exact", "fp32"]["grad"] < 1e-6
    assert "needs a CUDA device" in modes["U1", "tf32"]["reason"]
    text = report.readme_section([result | found])
    assert "| ours exact (converged) | fp32 |" in text


def test_the_figure_is_drawn(result: dict, tmp_path: Path) -> None:
    drawn = json.loads(json.dumps(result))
    for batch in (2, 50, 100):
        for op, phase in (("model", "step"), ("propagation", "backward")):
            row = Row(op, phase, batch)
            drawn["rows"].append(result["rows"][0] | {"row": row.as_dict()})
    path = tmp_path / "figure.png"
    draw(drawn, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_compare_finds_regressions(result: dict, tmp_path: Path) -> None:
    slower = json.loads(json.dumps(result))
    for key in ("q1_s", "median_s", "q3_s"):
        slower["rows"][0]["contenders"]["U0"][key] *= 100
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, content in zip(paths, (result, slower), strict=True):
        run.write(content, path)
    old, new = map(str, paths)
    assert compare_files([old, old]) == 0
    assert compare_files([old, new]) == 1
    assert compare_files([new, old]) == 0
    assert {c.contender for c in changes(result, slower) if c.is_regression(0.1)} == {"U0"}
    slower["about"]["hardware"] = "another machine"
    run.write(slower, paths[1])
    assert compare_files([old, new]) == 2


def test_report_shows_every_contender(result: dict) -> None:
    text = report.table(result)
    for entry in result["rows"]:
        assert entry["row"]["name"] in text
        assert all(f"| {name} |" in text for name in entry["contenders"])


def test_readme_section_is_replaced_between_markers() -> None:
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    new = report.replace_section(text, "table")
    assert new == f"a\n{report.BEGIN}\n\ntable\n\n{report.END}\nb\n"
    assert report.replace_section(new, "table") == new
    with pytest.raises(ValueError, match="once each"):
        report.replace_section("no markers", "table")


def test_readme_matches_the_committed_results() -> None:
    readme = ROOT / "README.md"
    assert report.main(["--readme", str(readme), "--check"]) == 0, (
        "run: python benchmarks/report.py --readme README.md"
    )


def test_committed_results_are_readable() -> None:
    for result in report.committed_results().values():
        assert report.readme_section([result])
        assert result["about"]["commit"]


@pytest.mark.parametrize("script", ["compare", "gpu_acceptance"])  # the least and the most imports
def test_scripts_run_as_files(script: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--help"],
        capture_output=True,
        text=True,
        cwd=ROOT / "tests",
    )
    assert done.returncode == 0, done.stderr
