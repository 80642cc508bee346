"""The acceptance on a GPU, without one: its order, its clock, its processes, and what faults do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import acceptance_report, gpu_acceptance, rows_part, session, shards, tests_part
from benchmarks.clock import Clock, OutOfTime, at_most
from benchmarks.measure import measure
from benchmarks.registry import CAPTURED, Row, contenders, gpu_core_rows, gpu_matrix_rows
from benchmarks.session import DeviceLost, Session

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
GPU_ERROR = "AcceleratorError: CUDA error: an illegal memory access was encountered"


def made(folder: Path, part: str = "core", minutes: float = 60) -> Session:
    about = {
        "hardware": "none", "device": "cuda", "python": "3", "versions": {}, "commit": None,
        "modified_files": 0, "load_average": [0.0],
    }  # fmt: skip
    result = {"schema": 1, "part": part, "dry_run": False, "about": about, "rows": []}
    return Session(result, folder, Clock(minutes), CPU)


def on_disk(folder: Path, part: str = "core") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{part}.json").read_text())
    return found


def test_a_piece_is_interrupted_and_what_follows_too() -> None:
    with pytest.raises(OutOfTime, match="not done within"), at_most(0.05):
        with pytest.raises(OutOfTime):
            time.sleep(5)
        time.sleep(5)
    time.sleep(0.1)  # no alarm is left


def test_pieces_are_on_disk_one_by_one(tmp_path: Path) -> None:
    part = made(tmp_path)
    part.piece("good", 1.0, lambda: [1])
    assert on_disk(tmp_path)["good"] == [1]
    part.piece("good", 1.0, lambda: pytest.fail("it is there"))
    part.piece("bad", 1.0, lambda: 1 // 0)
    part.clock = Clock(0)
    part.piece("late", 1.0, lambda: pytest.fail("there is no time"))
    assert acceptance_report.failed(on_disk(tmp_path))[0].startswith("bad: ZeroDivisionError")
    text = (tmp_path / "core.md").read_text()
    assert "skipped late: no time: about 1 s" in text
    assert "FAILED bad" in text


def test_a_row_that_loses_the_gpu_is_measured_again_without_who_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another process, twice: two kernels fault in the first row."""
    row, other = Row("model", "step", 50), Row("model", "step", 1)
    faulty = ["ours triton", CAPTURED]
    lost = False

    def fake(row: Row, *_: object, **__: object) -> dict[str, Any]:
        nonlocal lost
        without, names = _[3], {}
        for name in contenders(row, "cuda"):
            if name in without:
                continue
            lost = lost or (name in faulty and row.batch == 50)
            names[name] = (
                {"status": "failed", "reason": GPU_ERROR}
                if lost
                else {"status": "ok", "median_s": 1.0, "q1_s": 1.0, "q3_s": 1.0, "n": 3}
            )
        return {"row": row.as_dict(), "contenders": names, "ratios": {}}

    monkeypatch.setattr(session, "measure", fake)
    monkeypatch.setattr(session, "is_lost", lambda device: lost)
    processes = 0
    result: dict[str, Any] = made(tmp_path).result
    while processes < 5:
        processes, lost = processes + 1, False
        part = made(tmp_path)
        part.result = result
        try:
            for each in (row, other):
                part.row(each, rows_part.GPU_EFFORT)
            break
        except DeviceLost:
            result = on_disk(tmp_path)
    assert processes == 3
    first, second = on_disk(tmp_path)["rows"]
    failed = [name for name, found in first["contenders"].items() if found["status"] == "failed"]
    assert failed == faulty
    assert all(found["status"] == "ok" for found in second["contenders"].values())


def test_a_lost_gpu_makes_another_process_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []

    def replaced(program: str, arguments: list[str]) -> None:
        started.append(arguments)

    def lose(part: Session, script: Path) -> None:
        part.result["ceilings"] = {"copy_bytes_per_s": 1e12, "matrix_flops_per_s": {}}
        part.save()
        raise DeviceLost("a row")

    monkeypatch.setattr(os, "execv", replaced)
    monkeypatch.setitem(gpu_acceptance.RUN, "core", lose)
    options = ["--part", "core", "--dry-run", "--out", str(tmp_path)]
    assert gpu_acceptance.main(options) == 1  # execv came back
    assert started[0][2 : 2 + len(options)] == options
    assert started[0][-3:-1] == ["--resume", "--minutes"]
    monkeypatch.setitem(gpu_acceptance.RUN, "core", lambda part, script: None)
    gpu_acceptance.main([*options, "--resume"])
    assert on_disk(tmp_path)["restarts"] == 1
    assert on_disk(tmp_path)["ceilings"]["copy_bytes_per_s"] == 1e12


def test_what_takes_too_long_is_skipped_not_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row("graph_fourier", "forward", 2, molecule="ethanol")
    part = made(tmp_path)

    def slow(*_: object, **__: object) -> None:
        raise OutOfTime("not done within 9 s")

    monkeypatch.setattr("benchmarks.measure._transforms", slow, raising=False)
    monkeypatch.setattr("benchmarks.operations._transforms", slow)
    found = measure(row, CPU, part.checker, rows_part.DRY_EFFORT)
    assert {c["status"] for c in found["contenders"].values()} == {"skipped"}


@pytest.mark.parametrize("part", ["core", "matrix"])
def test_acceptance_skips_what_does_not_fit(part: str, tmp_path: Path) -> None:
    rows = {"core": gpu_core_rows, "matrix": gpu_matrix_rows}[part]()
    late = made(tmp_path, part, minutes=0)
    rows_part.run_rows(late, Path("unused"))
    found = on_disk(tmp_path, part)
    assert len(found["rows"]) == len(rows)
    for entry in found["rows"]:
        assert all(c["reason"].startswith("no time") for c in entry["contenders"].values())
    assert "compiled beforehand" in found["skipped"]


@pytest.mark.parametrize("part", ["core", "matrix"])
def test_every_row_fits_by_its_own_estimate(part: str) -> None:
    """The target table whole, most of the matrix, compiling included."""
    rows = {"core": gpu_core_rows, "matrix": gpu_matrix_rows}[part]()
    seconds = sum(session.estimated_seconds(row, torch.device("cuda")) for row in rows)
    room = 60 * gpu_acceptance.MINUTES[part] - rows_part.COMPILING_S / 2
    assert seconds < (room if part == "core" else 1.5 * room)
    assert sum(gpu_acceptance.MINUTES.values()) < 29


def test_what_compiles_is_shared_out() -> None:
    shares = rows_part.compiling_shares("core", 14, without=["ours triton"])
    names = [{name for _, name in share} for share in shares]
    assert names[:2] == [{"C1"}, {"C1"}]
    assert not set().union(*names[2:]) & {"C1", "U1", "ours triton"}
    jobs = [job for share in shares for job in share]
    assert len(jobs) == len(set(jobs))


FAKE_PYTEST = """
import json, os, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(options["--log"], "a") as log:
    for test in open(options["--chosen"]).read().splitlines():
        log.write(json.dumps({"begun": test}) + "\\n"); log.flush()
        if "crash" in test: print("core dumped", flush=True); os._exit(9)
        if "stall" in test: time.sleep(60)
        log.write(json.dumps({"test": test, "outcome": "passed", "seconds": 1, "message": ""}) + "\\n")
"""  # noqa: E501


def test_a_process_that_ends_or_stalls_loses_one_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "STALLED_S", 0.5)
    monkeypatch.setattr(
        shards, "pytest_command", lambda *a: [sys.executable, "-c", FAKE_PYTEST, *a[2:6]]
    )
    tests = [f"tests/test_a.py::{name}" for name in ("one", "crash", "two", "stall", "three")]
    found = shards.run_shard(tests, tmp_path, "0", Clock(1), dict(os.environ))
    assert [found[test]["outcome"] for test in tests] == [
        "passed", "failed", "passed", "failed", "passed",
    ]  # fmt: skip
    assert "status 9:\ncore dumped" in found[tests[1]]["message"]
    assert "without an outcome" in found[tests[3]]["message"]
    late = shards.run_shard(tests, tmp_path, "1", Clock(0), {})
    assert {entry["outcome"] for entry in late.values()} == {"not run"}


def test_a_process_that_collects_nothing_fails_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such module')"]
    monkeypatch.setattr(shards, "pytest_command", lambda *_: command)
    found = shards.run_shard(["tests/test_a.py::one"], tmp_path, "0", Clock(1), {})
    assert "status 1:\nno such module" in found["tests/test_a.py::one"]["message"]


def test_shards_have_something_of_every_function_first() -> None:
    tests = [f"f::{name}[{i}]" for name, n in (("a", 40), ("b", 7), ("c", 1)) for i in range(n)]
    dealt = shards.deal(tests, 4)
    assert sorted(test for shard in dealt for test in shard) == sorted(tests)
    assert {dealt[i][0] for i in range(3)} == {"f::a[0]", "f::b[0]", "f::c[0]"}
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 8
    assert shards.deal(["f::a"], 9) == [["f::a"]]


OUTCOMES = """
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("not today")
def test_is_expected(): pytest.xfail("one GPU")
@pytest.fixture
def broken(): yield; raise RuntimeError("after it")
def test_ends_badly(broken): pass
def test_is_not_chosen(): pass
"""


def test_outcomes_are_written_as_they_come(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(OUTCOMES)
    names = ("ends_badly", "is_expected", "skips", "fails", "passes")
    chosen, log = tmp_path / "chosen", tmp_path / "log"
    chosen.write_text("\n".join(f"test_it.py::test_{name}" for name in names))
    command = shards.pytest_command("-p", "benchmarks.shard_log", "--rootdir", str(tmp_path))
    command += ["--chosen", str(chosen), "--log", str(log), str(tmp_path / "test_it.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    found, running = shards.read(log)
    assert running is None
    outcomes = {name.removeprefix("test_it.py::test_"): e["outcome"] for name, e in found.items()}
    assert list(outcomes) == list(names)  # in the order of the choice
    assert list(outcomes.values()) == ["failed", "xfailed", "skipped", "failed", "passed"]
    assert found["test_it.py::test_is_expected"]["message"] == "one GPU"
    assert "after it" in found["test_it.py::test_ends_badly"]["message"]


def test_the_part_of_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps and outcomes, with processes that are not started."""

    def shard(tests: list[str], *_: object) -> shards.Outcomes:
        passed = {"outcome": "passed", "seconds": 2.0, "message": ""}
        failed = {"outcome": "failed", "seconds": 1.0, "message": "assert 1 == 2"}
        return {test: failed if "[9]" in test else passed for test in tests}

    def command(command: list[str], *_: object) -> dict[str, Any]:
        status = int("racecheck" in command)
        return {"command": " ".join(command), "status": status, "seconds": 1, "output": "done"}

    names = [f"tests/test_a.py::b[{i}]" for i in range(30)]
    monkeypatch.setattr(tests_part, "run_shard", shard)
    monkeypatch.setattr(tests_part, "run_command", command)
    monkeypatch.setattr(tests_part, "collected", lambda *_: (tests_part.not_run("fake"), names))
    monkeypatch.setattr(tests_part.shutil, "which", lambda name: f"/bin/{name}")
    part = made(tmp_path, "tests")
    tests_part.run_tests(part, Path("script.py"))
    found = on_disk(tmp_path, "tests")
    assert set(found["tests"]) == set(names)
    assert {"build", "collect", "smallest", "errors", "memcheck", "racecheck"} == set(
        found["steps"]
    )
    text = (tmp_path / "tests.md").read_text()
    assert "Tests: 29 passed, 1 failed" in text or "1 failed, 29 passed" in text
    assert found["steps"]["build"]["command"] == "none: gfnode_fast._C is there"
    assert "FAILED racecheck: exit status 1" in text
    assert "FAILED tests/test_a.py::b[9]: assert 1 == 2" in text


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu_acceptance.PARTS)
def test_acceptance_dry_run(part: str, tmp_path: Path) -> None:
    assert gpu_acceptance.main(["--part", part, "--dry-run", "--out", str(tmp_path)]) == 0
    found = on_disk(tmp_path, part)
    assert found["part"] == part
    assert found["about"]["versions"]["torch"] == torch.__version__
    text = (tmp_path / f"{part}.md").read_text()
    assert text.startswith(f"# {part}")
    assert "C1 as it stands" in text
    assert (CAPTURED in text) == (part in ("core", "matrix"))


def test_the_acceptance_knows_every_file_with_gpu_tests() -> None:
    helpers = [file for file in (ROOT / "tests").glob("*.py") if not file.name.startswith("test_")]
    named = {file.name for file in helpers if tests_part.MARKED.search(file.read_text())}
    assert named == {"op_checks.py"}  # whose name for the mark is looked for
    found = tests_part.marked_files()
    assert {"tests/test_capture.py", "tests/ops/test_mode_rhs.py"} <= set(found)
    assert not {"tests/cli/test_cli.py", "tests/benchmarks/test_bench.py"} & set(found)


def test_acceptance_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here; what is tested is the refusal without one")
    with pytest.raises(SystemExit):
        gpu_acceptance.main(["--part", "core"])
    assert "no CUDA device" in capsys.readouterr().err
