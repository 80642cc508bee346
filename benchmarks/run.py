"""Measure rows of the registry and write them to JSON.

    python benchmarks/run.py --set cpu --json benchmarks/results/cpu.json      the committed CPU
    table
    python benchmarks/run.py --rows "model step egnn M=2 B=50" --quick

Every contender is checked against the reference before it is timed; one that fails is reported in
its place. Rows that do not fit in --minutes are reported as skipped. The exit status is 1 when a
contender failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import torch

from benchmarks import environment
from benchmarks.agreement import Checker
from benchmarks.ceilings import higher, measure_ceilings
from benchmarks.formatting import SCHEMA
from benchmarks.measure import QUICK, Effort, measure
from benchmarks.registry import SETS, Row, contenders, select
from benchmarks.report import load, table


def measure_all(
    rows: list[Row],
    device: torch.device,
    effort: Effort,
    minutes: float,
    command: list[str],
    path: Path | None = None,
    earlier: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure rows in order until the time is up; the rest is reported as skipped.

    With a path the result is written after every row, so that an interrupted run leaves its rows.
    Rows of an earlier result stay unless they are measured again.
    """
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "about": environment.describe(device, command),
        "ceilings": measure_ceilings(device),
        "rows": [],
    }
    if earlier is not None:
        require_same_machine(earlier["about"], result["about"])
        result["rows"] = earlier["rows"]
    checker = Checker(device)
    began = time.perf_counter()
    for i, row in enumerate(rows):
        spent = time.perf_counter() - began
        if spent > 60 * minutes:
            reason = f"the {minutes:g} minutes of this run were over"
            names = contenders(row, device.type)
            skipped = {name: {"status": "skipped", "reason": reason} for name in names}
            if not any(row.name == entry["row"]["name"] for entry in result["rows"]):
                put(result, {"row": row.as_dict(), "contenders": skipped, "ratios": {}})
            continue
        print(f"[{spent:5.0f} s] {i + 1}/{len(rows)} {row.name}", file=sys.stderr, flush=True)
        put(result, measure(row, device, checker, effort))
        if path:
            write(result, path)
    result["ceilings"] = higher(result["ceilings"], measure_ceilings(device))
    result["about"]["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    result["about"]["minutes"] = round((time.perf_counter() - began) / 60, 1)
    return result


def put(result: dict[str, Any], entry: dict[str, Any]) -> None:
    """Add a row with the commit and load it was measured under, in place of an older one."""
    entry["commit"] = result["about"]["commit"]
    entry["load_average"] = [round(load, 2) for load in os.getloadavg()]
    names = [other["row"]["name"] for other in result["rows"]]
    if (name := entry["row"]["name"]) in names:
        result["rows"][names.index(name)] = entry
    else:
        result["rows"].append(entry)


def require_same_machine(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise unless two heads name the same hardware, threads and versions.

    Raises:
        ValueError: they differ.
    """
    for key in ("hardware", "device", "cores", "threads", "python", "versions"):
        if old[key] != new[key]:
            raise ValueError(
                f"run: `--update` must continue a result of the same machine, got {key} "
                f"{old[key]!r} there and {new[key]!r} here; write to another file"
            )


def failures(result: dict[str, Any]) -> list[str]:
    return [
        f"{entry['row']['name']}: {name}: {found['reason']}"
        for entry in result["rows"]
        for name, found in entry["contenders"].items()
        if found["status"] == "failed"
    ]


def write(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=sorted(SETS), default="cpu", help="rows to start from")
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="only rows that match")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument(
        "--update", action="store_true", help="keep the rows of --json that are not measured now"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few samples, U0 only where it is fast"
    )
    parser.add_argument("--minutes", type=float, default=75.0, help="start no row after that")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--u0-limit", type=float, metavar="S", help="skip U0 where it is predicted to take longer"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.set_num_threads(options.threads)
    earlier = None
    if options.update:
        if options.json is None or not options.json.exists():
            raise SystemExit("run: --update needs --json with an earlier result")
        earlier = load(options.json)
    rows = SETS[options.set]()
    if options.rows:
        rows = select(rows, options.rows)
    with tempfile.TemporaryDirectory(prefix="gfnode-inductor-") as cache:
        # Compile times are those of a cold compiler.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
        command = ["python", "benchmarks/run.py", *(arguments or sys.argv[1:])]
        effort = QUICK if options.quick else Effort()
        if options.u0_limit is not None:
            effort = replace(effort, u0_limit_s=options.u0_limit)
        result = measure_all(rows, device, effort, options.minutes, command, options.json, earlier)
    if options.json:
        write(result, options.json)
    print(table(result))
    failed = failures(result)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
