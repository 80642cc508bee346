"""The acceptance's first part: build, `pytest -m gpu`, the smallest step, compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import Clock
from benchmarks.environment import ROOT
from benchmarks.operations import make_task
from benchmarks.registry import Row

MARKED = re.compile(r"\bmark\.gpu\b|\bOF_KERNELS\b")  # the latter of tests/op_checks.py


def run_command(
    command: list[str], clock: Clock, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command from the checkout within the time left; its status and the end of its
    output.
    """
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= environment or {}
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
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
        "output": output[-4000:],
    }


def build_extension(clock: Clock, dry: bool) -> dict[str, Any]:
    """Keep a binary that is there; else build one in place."""
    if importlib.util.find_spec("gfnode_fast._C") is not None:
        return {"command": "none: gfnode_fast._C is there", "status": 0, "seconds": 0, "output": ""}
    if dry:
        return {"command": "none: dry run", "status": 0, "seconds": 0, "output": ""}
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_command(build, clock, {"GFNODE_BUILD": "cuda"})


def marked_files() -> list[str]:
    """Test files that have tests marked `gpu`, from the checkout.

    Importing the others may take packages that no GPU test needs and a GPU machine may lack.
    """
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if MARKED.search(f.read_text())]


def run_tests(result: dict[str, Any], clock: Clock, dry: bool, script: Path) -> None:
    """Store the status and output of each step; `script --smallest` makes the smallest one."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    pytest += marked_files()
    steps = {"build": build_extension(clock, dry)}
    if dry:
        steps["pytest"] = run_command([*pytest, "--collect-only"], clock)
        if steps["pytest"]["status"] == 5:  # nothing is marked `gpu` yet
            steps["pytest"]["status"] = 0
    else:
        steps["pytest"] = run_command(pytest, clock, {"GFNODE_REQUIRE_GPU": "1"})
    smallest = [sys.executable, str(script), "--smallest"]
    steps["smallest"] = run_command(smallest, clock)
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None or dry:
            why = "dry run" if dry else "compute-sanitizer is not on PATH"
            steps[tool] = {"command": f"none: {why}", "status": 0, "seconds": 0, "output": ""}
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "99", *smallest]
        # The caching allocator hides overruns between tensors from memcheck.
        steps[tool] = run_command(command, clock, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    result["steps"] = steps
    for name, step in steps.items():
        if step["status"]:
            result.setdefault("failed", {})[name] = f"exit status {step['status']}"


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
