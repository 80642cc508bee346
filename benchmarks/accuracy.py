"""Error of every precision and solver mode against the fp64 reference, beside its speed.

    python benchmarks/accuracy.py [--batch B] [--model egnn] [--modes M] [--json OUT] [--untimed]

Forward and gradient errors are relative in the 2-norm, over all outputs and over all parameters
taken together, on the same inputs and weights, against U0 in fp64: with the published tolerances,
or, for what takes no steps ("ours exact"), with such that only rounding is left. "against fp32"
divides by the error that the reference itself makes in fp32: the fp32-faithful mode owes at most 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.agreement import relative_error
from benchmarks.formatting import SCHEMA, heading
from benchmarks.operations import CONVERGED, make_task
from benchmarks.registry import MODELS, Row
from benchmarks.report import accuracy_table
from benchmarks.task import Unavailable
from benchmarks.timing import interleaved

MODES = (
    ("U0", "fp32"),
    ("U1", "fp32"),
    ("U1", "tf32"),
    ("U1", "bf16"),
    ("ours", "fp32"),
    ("ours", "tf32"),
    ("ours", "bf16"),
    ("ours per molecule", "fp32"),
    ("ours exact", "fp32"),
    ("ours triton", "fp32"),
    ("ours triton", "tf32"),
    ("ours triton", "bf16"),
    ("ours exact triton", "fp32"),
    ("ours exact triton", "tf32"),
    ("ours exact triton", "bf16"),
)
LINEAR = "no_interaction"  # of modes: what "ours exact" solves
EXACT = {mode for mode in MODES if "exact" in mode[0]}  # compared with CONVERGED, not with U0
CHECK_BATCH = 10  # the oracle's batch: U0 in fp64


def overall_errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """One number over all outputs, and one over all gradients."""
    errors = {}
    for kind in ("output", "grad"):
        names = [name for name in exact if name.startswith(kind)]
        joined = [
            torch.cat([side[name].double().flatten() for name in names]) for side in (actual, exact)
        ]
        errors[kind] = relative_error(*joined)
    return errors


def accuracy(
    row: Row,
    device: torch.device,
    *,
    rounds: int = 10,
    seconds_each: float = 2.0,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """Errors at CHECK_BATCH molecules and, unless rounds is 0, times at the row's size, mode by
    mode; `without` leaves contenders out.
    """
    small = replace(row, batch=min(row.batch, CHECK_BATCH), phase="backward")
    oracles = ("U0", CONVERGED) if MODELS[row.model]["mode_interaction"] == LINEAR else ("U0",)
    true = {name: make_task(name, replace(small, precision="fp64"), device).values()
            for name in oracles}  # fmt: skip
    found = []
    for contender, precision in MODES:
        oracle = CONVERGED if (contender, precision) in EXACT else "U0"
        if oracle not in true or contender in without:
            continue
        entry: dict[str, Any] = {"contender": contender, "precision": precision, "oracle": oracle}
        try:
            values = make_task(contender, replace(small, precision=precision), device).values()
            entry |= overall_errors(values, true[oracle])
            if rounds and contender != "U0":
                task = make_task(contender, replace(row, precision=precision), device)
                much = {"rounds": rounds, "seconds_each": seconds_each}
                entry |= interleaved({"run": task.run}, device, **much)["run"].summary()
        except Unavailable as error:
            entry["reason"] = str(error)
        except Exception as error:
            entry["reason"] = f"failed: {type(error).__name__}: {str(error)[:200]}"
        found.append(entry)
    own = found[0]
    for entry in found:
        for kind in ("output", "grad"):
            if kind in entry and own.get(kind):
                entry[f"{kind} against fp32"] = entry[kind] / own[kind]
    return {"row": row.as_dict(), "oracle_batch": small.batch, "modes": found}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=50, help="batch that is timed")
    parser.add_argument("--model", choices=sorted(MODELS), default="egnn")
    parser.add_argument("--modes", type=int, default=2, metavar="M")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--untimed", action="store_true", help="errors alone")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    row = Row("model", "step", options.batch, options.modes, options.model)
    about = environment.describe(device, ["python", "benchmarks/accuracy.py", *sys.argv[1:]])
    found = accuracy(row, device, rounds=0 if options.untimed else 10)
    result = {"schema": SCHEMA, "about": about, **found}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(about), accuracy_table(result), sep="\n\n")
    return 1 if any(str(e.get("reason", "")).startswith("failed") for e in result["modes"]) else 0


if __name__ == "__main__":
    sys.exit(main())
