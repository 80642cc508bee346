"""The acceptance's first part: build, every test marked `gpu` in several processes, the errors of
all precisions, the smallest training step, and that under compute-sanitizer.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.environment import ROOT
from benchmarks.operations import make_task
from benchmarks.registry import Row
from benchmarks.session import Session
from benchmarks.shards import OUTPUT, Outcomes, deal, pytest_command, run_shard

MARKED = re.compile(r"\bmark\.gpu\b|\bOF_KERNELS\b")  # the latter of tests/op_checks.py
SANITIZERS = ("memcheck", "racecheck")
ASK_FOR_CUDA = (
    "import sys; from gfnode_fast.ops.eigh import why_not_compiled; "
    "sys.exit(why_not_compiled('cuda'))"
)
OTHERS = 2 + len(SANITIZERS)  # processes beside those of the tests


def variables(**changes: str) -> dict[str, str]:
    """This process's environment, kernels not interpreted, a thread each."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "OMP_NUM_THREADS": "1", **changes}


def run_command(
    command: list[str], clock: Clock, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command from the checkout within the time left; its status and the end of its
    output.
    """
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables(**(environment or {})),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(clock.left, 1.0),
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = 124, (error.stdout or b"").decode(errors="replace")
    return {
        "command": " ".join(command),
        "status": status,
        "seconds": round(time.perf_counter() - began, 1),
        "output": output[-OUTPUT:],
    }


def not_run(why: str) -> dict[str, Any]:
    return {"command": f"none: {why}", "status": 0, "seconds": 0, "output": ""}


def build_extension(clock: Clock, dry: bool) -> dict[str, Any]:
    """Keep a binary with a CUDA part that is there; else build one in place, for this GPU alone.

    Asked in another process: this one would go on with the binary that it found first.
    """
    if dry:
        return not_run("dry run")
    if run_command([sys.executable, "-c", ASK_FOR_CUDA], clock)["status"] == 0:
        return not_run("gfnode_fast._C is there")
    architecture = ".".join(map(str, torch.cuda.get_device_capability()))
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_command(build, clock, {"GFNODE_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": architecture})


def marked_files() -> list[str]:
    """Test files that have tests marked `gpu`, from the checkout.

    Importing the others may take packages that no GPU test needs and a GPU machine may lack.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if MARKED.search(f.read_text())]


def collected(clock: Clock, environment: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """How collecting the GPU tests went, and their names."""
    command = pytest_command("-m", "gpu", "--collect-only", *marked_files())
    # All of the output is names, so the step's own reading would cut it.
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=max(clock.left, 1.0),
    )  # fmt: skip
    lines = done.stdout.splitlines()
    names = [line for line in lines if line.startswith("tests/") and "::" in line]
    step = not_run("pytest --collect-only") | {
        "status": done.returncode,
        "output": f"{done.stdout[-OUTPUT:]}{done.stderr[-OUTPUT:]}" if done.returncode else "",
    }
    return step, names


def commands(session: Session, script: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What runs beside the tests, by name."""
    errors = session.folder / "errors.json"
    accuracy = [sys.executable, str(ROOT / "benchmarks" / "accuracy.py"), "--untimed"]
    smallest = [sys.executable, str(script), "--smallest"]
    found: dict[str, list[str] | str] = {"smallest": smallest}
    found["errors"] = "dry run" if session.dry else [*accuracy, "--json", str(errors)]
    sanitizer = shutil.which("compute-sanitizer")
    for tool in SANITIZERS:
        if session.dry or sanitizer is None:
            found[tool] = "dry run" if session.dry else "compute-sanitizer is not on PATH"
        else:
            found[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "99", *smallest]
    # The caching allocator hides overruns between tensors from memcheck.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def runner(name: str, command: list[str] | str) -> Callable[[], dict[str, Any]]:
        if isinstance(command, str):
            return lambda: not_run(command)
        environment = uncached if name in SANITIZERS else {}
        return lambda: run_command(command, session.clock, environment)

    return {name: runner(name, command) for name, command in found.items()}


def run_tests(session: Session, script: Path) -> None:
    """Store the status and output of each step, and the outcome of each test, as they come;
    `script --smallest` makes the smallest training step.
    """
    result, clock = session.result, session.clock
    steps, tests = result.setdefault("steps", {}), result.setdefault("tests", {})
    session.say("build")
    steps["build"] = build_extension(clock, session.dry)
    environment = variables(**({} if session.dry else {"GFNODE_REQUIRE_GPU": "1"}))
    steps["collect"], names = collected(clock, environment)
    if session.dry:
        names = names[:1]
    shards = deal(names, max(1, (os.cpu_count() or 1) - OTHERS))
    session.say(f"{len(names)} tests in {len(shards)} processes")
    # Threads, which wait for processes.
    with ThreadPoolExecutor(len(shards) + OTHERS) as pool:
        running: dict[Any, str] = {
            pool.submit(run_shard, shard, session.folder / "tests", f"{i}", clock, environment): ""
            for i, shard in enumerate(shards)
        }
        for name, run in commands(session, script).items():
            running[pool.submit(run)] = name
        for done in as_completed(running):
            if name := running[done]:
                steps[name] = done.result()
            else:
                outcomes: Outcomes = done.result()
                tests |= outcomes
            session.say(name or f"{len(tests)} tests are through")
            session.save()
    for name, step in steps.items():
        if step["status"]:
            result.setdefault("failed", {})[name] = f"exit status {step['status']}"
    session.save()


def smallest_step() -> None:
    """One training step of two ethanol molecules per backend at hand, for the sanitizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    row = Row("model", "step", 2, molecule="ethanol")
    make_task("ours", row, device).run()
    if device.type == "cuda":
        make_task("ours triton", row, device).run()
        make_task("ours exact triton", row, device).run()
        attention = Row("model", "step", 2, model="sage_attention_concat", molecule="ethanol")
        make_task("ours triton", attention, device).run()
    if device.type == "cuda":
        torch.cuda.synchronize()
