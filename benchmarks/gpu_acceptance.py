"""One call that accepts or refuses a state of the project on a GPU machine.

    python benchmarks/gpu_acceptance.py --part tests|core|matrix|training [--out DIR]
                                        [--minutes 8.5] [--without NAME ...]
    python benchmarks/gpu_acceptance.py --part core --dry-run      the same code on a CPU, tiny
    sizes

tests    builds the extension unless it is there, runs `pytest -m gpu` with GFNODE_REQUIRE_GPU=1,
and
         compute-sanitizer, where there is one, on the smallest training step
core     machine ceilings, every row of the target table, precision modes, a profile of the step
matrix   the other combinations
training `gfnode_fast.train` end to end, on large systems, and its loss curves

Each part writes PART.json and PART.md under --out (default: $OUT, or the current folder) and prints
the table last. It keeps to --minutes: rows come most important first with an estimated cost, which
is corrected by what earlier rows really took, and those that no longer fit are reported as skipped.
A row that fails is reported and the rest goes on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import environment, training_part
from benchmarks.accuracy import accuracy
from benchmarks.agreement import Checker
from benchmarks.baselines import c1
from benchmarks.ceilings import measure_ceilings
from benchmarks.formatting import heading
from benchmarks.measure import Effort, measure
from benchmarks.operations import make_task
from benchmarks.registry import Row, contenders, gpu_core_rows, gpu_matrix_rows
from benchmarks.report import accuracy_table, table
from benchmarks.run import SCHEMA, failures, write
from benchmarks.task import Unavailable

ROOT = environment.ROOT
PARTS = ("tests", "core", "matrix", "training")
GPU_EFFORT = Effort(rounds=20, seconds_each=1.5, u0_limit_s=40.0)
DRY_EFFORT = Effort(rounds=1, seconds_each=0.01, u0_limit_s=40.0)
PROFILED_BATCHES = (50, 4096)
PROFILE_ROWS = 40


def estimated_seconds(row: Row) -> float:
    """Compiling C1 dominates; U0 at B = 4096 and irregular times takes about ten seconds a step."""
    compiling = 60.0 if "C1" in contenders(row) else 2.0
    union = 25.0 if row.times == "irregular" and row.batch >= 4096 else 5.0
    return compiling + (union if "U0" in contenders(row) else 3.0)


class Clock:
    """Time left in this part, and how far the estimates have been off so far."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.estimated = self.taken = 0.0

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def fits(self, estimate: float) -> bool:
        correction = max(1.0, self.taken / self.estimated) if self.estimated else 1.0
        return estimate * correction <= self.left

    def note(self, estimate: float, taken: float) -> None:
        self.estimated += estimate
        self.taken += taken


def measure_rows(
    rows: list[Row],
    device: torch.device,
    effort: Effort,
    clock: Clock,
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    checker, found = Checker(device), []
    for row in rows:
        estimate = estimated_seconds(row)
        if not clock.fits(estimate):
            reason = {"status": "skipped", "reason": _no_time(estimate, clock)}
            skipped = dict.fromkeys(contenders(row, device.type), reason)
            found.append({"row": row.as_dict(), "contenders": skipped, "ratios": {}})
            continue
        print(f"[{clock.left:4.0f} s left] {row.name}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        found.append(measure(row, device, checker, effort, without))
        clock.note(estimate, time.perf_counter() - began)
    return found


def guarded(result: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    """Store what `run` returns, or why it failed, under `name`."""
    try:
        result[name] = run()
    except Exception as error:
        result.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error)[:500]}"


def profile_step(
    row: Row, device: torch.device, candidates: Sequence[str] = ("ours", "U1")
) -> dict[str, Any]:
    """Device time per kernel (per operation on a CPU) of one training step of the first candidate
    that is there.
    """
    for contender in candidates:
        try:
            task = make_task(contender, row, device)
            break
        except Unavailable:
            continue
    else:
        raise Unavailable(f"none of {', '.join(candidates)}")
    for _ in range(3):
        task.run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        task.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_device = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    kernels = [
        {
            "name": event.key,
            "calls": event.count,
            "us": event.self_device_time_total if on_device else event.self_cpu_time_total,
        }
        for event in profiler.key_averages()
        if event.device_type == kind  # an operation on the host carries its kernels' time again
    ]
    kernels = sorted((k for k in kernels if k["us"] > 0), key=lambda k: -k["us"])
    return {
        "row": row.name,
        "contender": contender,
        "launches": sum(k["calls"] for k in kernels),
        "total_us": sum(k["us"] for k in kernels),
        "kernels": kernels[:PROFILE_ROWS],
    }


def profile_table(profile: dict[str, Any]) -> str:
    total = profile["total_us"]
    lines = [
        f"Profile of {profile['row']}, {profile['contender']}: {total / 1e3:.3f} ms in "
        f"{profile['launches']} calls",
        "",
        "| kernel | calls | µs | share |",
        "|" + " --- |" * 4,
    ]
    for kernel in profile["kernels"]:
        name = kernel["name"].replace("|", "\\|")[:100]
        share = kernel["us"] / total
        lines.append(f"| {name} | {kernel['calls']} | {kernel['us']:.1f} | {share:.1%} |")
    return "\n".join(lines)


def ceilings_table(ceilings: dict[str, Any]) -> str:
    rates = ceilings["matrix_flops_per_s"].items()
    return (
        f"Ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s; matrix products "
        + ", ".join(f"{name} {rate / 1e12:.3g} Tflop/s" for name, rate in rates)
    )


def tiny_rows(rows: list[Row]) -> list[Row]:
    return list(dict.fromkeys(row.tiny() for row in rows))


def run_core(
    result: dict[str, Any],
    device: torch.device,
    clock: Clock,
    dry: bool,
    without: Collection[str] = (),
) -> None:
    rows, effort = gpu_core_rows(), GPU_EFFORT
    profiled = [Row("model", "step", batch) for batch in PROFILED_BATCHES]
    if dry:
        rows, profiled, effort = tiny_rows(rows), tiny_rows(profiled), DRY_EFFORT
    guarded(result, "ceilings", lambda: measure_ceilings(device, tiny=dry))
    # The profiles and precision modes are cheap and must not fall to the time limit.
    guarded(result, "profiles", lambda: [profile_step(row, device) for row in profiled])
    if device.type == "cuda" and "ours triton" not in without:
        guarded(
            result,
            "profiles of Triton",
            lambda: [profile_step(row, device, ("ours triton",)) for row in profiled],
        )
    guarded(result, "accuracy", lambda: accuracy(profiled[-1], device, rounds=effort.rounds))
    result["rows"] = measure_rows(rows, device, effort, clock, without)


def run_matrix(
    result: dict[str, Any],
    device: torch.device,
    clock: Clock,
    dry: bool,
    without: Collection[str] = (),
) -> None:
    rows, effort = gpu_matrix_rows(), GPU_EFFORT
    if dry:
        rows, effort = tiny_rows(rows), DRY_EFFORT
    result["rows"] = measure_rows(rows, device, effort, clock, without)


def run_training(
    result: dict[str, Any],
    device: torch.device,
    clock: Clock,
    dry: bool,
    without: Collection[str] = (),
) -> None:
    with tempfile.TemporaryDirectory(prefix="gfnode-runs-") as folder:
        pieces = training_part.pieces(
            device, Path(folder), dry=dry, triton="ours triton" not in without
        )
        for name, (estimate, run) in pieces.items():
            if not clock.fits(estimate):
                result.setdefault("skipped", {})[name] = _no_time(estimate, clock)
                continue
            began = time.perf_counter()
            guarded(result, name, run)
            clock.note(estimate, time.perf_counter() - began)


def _no_time(estimate: float, clock: Clock) -> str:
    return f"no time: about {estimate:.0f} s, {max(clock.left, 0):.0f} s left"


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


def run_tests(
    result: dict[str, Any],
    device: torch.device,
    clock: Clock,
    dry: bool,
    without: Collection[str] = (),
) -> None:
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]
    steps = {"build": build_extension(clock, dry)}
    if dry:
        steps["pytest"] = run_command([*pytest, "--collect-only"], clock)
        if steps["pytest"]["status"] == 5:  # nothing is marked `gpu` yet
            steps["pytest"]["status"] = 0
    else:
        steps["pytest"] = run_command(pytest, clock, {"GFNODE_REQUIRE_GPU": "1"})
    smallest = [sys.executable, str(Path(__file__).resolve()), "--smallest"]
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


def summary(result: dict[str, Any]) -> str:
    parts = [f"# {result['part']}", heading(result["about"])]
    if result["dry_run"]:
        parts.append("Dry run: tiny sizes, C1 as it stands, nothing compiled.")
    if "ceilings" in result:
        parts.append(ceilings_table(result["ceilings"]))
    for profiles in ("profiles", "profiles of Triton"):
        parts += [profile_table(profile) for profile in result.get(profiles, [])]
    if "accuracy" in result:
        parts.append(accuracy_table(result["accuracy"]))
    for name, step in result.get("steps", {}).items():
        last = step["output"].strip().splitlines()[-1:] or [""]
        parts.append(f"- {name}: status {step['status']}, {step['seconds']} s: {last[0]}")
        if step["status"]:
            parts.append("```\n" + step["output"] + "\n```")
    if result["rows"]:
        parts.append(table(result))
    parts += training_part.summaries(result)
    parts += [f"skipped {name}: {why}" for name, why in result.get("skipped", {}).items()]
    parts += [f"FAILED {name}: {why}" for name, why in result.get("failed", {}).items()]
    parts += [f"FAILED {line}" for line in failures(result)]
    return "\n\n".join(parts)


RUN = {"tests": run_tests, "core": run_core, "matrix": run_matrix, "training": run_training}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--without",
        nargs="+",
        default=(),
        metavar="NAME",
        help="contenders to leave out, such as one whose fault would end the process",
    )
    parser.add_argument("--smallest", action="store_true", help="only one tiny training step")
    options = parser.parse_args(arguments)
    if options.smallest:
        smallest_step()
        return 0
    if options.part is None:
        parser.error("--part is required")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; --dry-run walks the code on a CPU")
    if options.dry_run:
        torch.set_num_threads(1)
    device = torch.device("cpu" if options.dry_run else "cuda")
    clock = Clock(options.minutes)
    command = ["python", "benchmarks/gpu_acceptance.py", *(arguments or sys.argv[1:])]
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "part": options.part,
        "dry_run": options.dry_run,
        "about": environment.describe(device, command),
        "rows": [],
    }
    # A dry run neither traces nor generates code, which would take minutes on a CPU.
    without = [*options.without, *(["ours compiled"] if options.dry_run else [])]
    with c1.compiler("none" if options.dry_run else "inductor"):
        RUN[options.part](result, device, clock, options.dry_run, without)
    options.out.mkdir(parents=True, exist_ok=True)
    write(result, options.out / f"{options.part}.json")
    text = summary(result)
    (options.out / f"{options.part}.md").write_text(text + "\n")
    print(text)
    return 1 if result.get("failed") or failures(result) else 0


if __name__ == "__main__":
    sys.exit(main())
