"""One call that accepts or refuses a state of the project on a GPU machine.

    python benchmarks/gpu_acceptance.py --part tests|core|matrix|training [--out DIR]
                                        [--minutes 8.5] [--without NAME ...]
    python benchmarks/gpu_acceptance.py --part core --dry-run      the same code on a CPU, tiny
    sizes

tests    builds the extension unless it is there, runs the files with tests marked `gpu` with
         GFNODE_REQUIRE_GPU=1, and compute-sanitizer, where there is one, on the smallest step
core     machine ceilings, every row of the target table, precision modes, a profile of the step
matrix   the other combinations
training `gfnode_fast.train` end to end, on large systems, and its loss curves

A bare checkout with torch, triton, torchdiffeq, numpy and pytest will do; `training`, and the tests
of training, need safetensors besides.

Each part writes PART.json and PART.md under --out (default: $OUT, or the current folder) and prints
the table last. It keeps to --minutes: rows come most important first with an estimated cost, which
is corrected by what earlier rows really took, and those that no longer fit are reported as skipped.
A row that fails is reported and the rest goes on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import environment, tests_part, training_part
from benchmarks.accuracy import accuracy
from benchmarks.agreement import Checker
from benchmarks.baselines import c1
from benchmarks.ceilings import measure_ceilings
from benchmarks.clock import Clock
from benchmarks.formatting import heading
from benchmarks.measure import Effort, measure
from benchmarks.registry import Row, contenders, gpu_core_rows, gpu_matrix_rows
from benchmarks.report import accuracy_table, table
from benchmarks.run import SCHEMA, failures, write
from benchmarks.step_profile import profile_step, profile_table

PARTS = ("tests", "core", "matrix", "training")
GPU_EFFORT = Effort(rounds=20, seconds_each=1.5, u0_limit_s=40.0)
DRY_EFFORT = Effort(rounds=1, seconds_each=0.01, u0_limit_s=40.0)
PROFILED_BATCHES = (50, 4096)


def estimated_seconds(row: Row) -> float:
    """Compiling C1 dominates; U0 at B = 4096 and irregular times takes about ten seconds a step."""
    compiling = 60.0 if "C1" in contenders(row) else 2.0
    union = 25.0 if row.times == "irregular" and row.batch >= 4096 else 5.0
    return compiling + (union if "U0" in contenders(row) else 3.0)


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
            reason = {"status": "skipped", "reason": clock.no_time(estimate)}
            skipped = dict.fromkeys(contenders(row, "cuda"), reason)
            found.append({"row": row.as_dict(), "contenders": skipped, "ratios": {}})
            continue
        print(f"[{clock.left:4.0f} s left] {row.name}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        # In a dry run, what needs a GPU is reported as unavailable.
        found.append(measure(row, device, checker, effort, without, kind="cuda"))
        clock.note(estimate, time.perf_counter() - began)
    return found


def guarded(result: dict[str, Any], name: str, run: Callable[[], Any]) -> None:
    """Store what `run` returns, or why it failed, under `name`."""
    try:
        result[name] = run()
    except Exception as error:
        result.setdefault("failed", {})[name] = f"{type(error).__name__}: {str(error)[:500]}"


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
                result.setdefault("skipped", {})[name] = clock.no_time(estimate)
                continue
            began = time.perf_counter()
            guarded(result, name, run)
            clock.note(estimate, time.perf_counter() - began)


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


def run_tests(
    result: dict[str, Any],
    device: torch.device,
    clock: Clock,
    dry: bool,
    without: Collection[str] = (),
) -> None:
    tests_part.run_tests(result, clock, dry, Path(__file__).resolve())


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
        tests_part.smallest_step()
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
