"""One call that accepts or refuses a state of the project on a GPU machine.

    python benchmarks/gpu_acceptance.py --part tests|core|matrix|training [--out DIR]
                                        [--minutes M] [--without NAME ...] [--resume]
    python benchmarks/gpu_acceptance.py --part core --dry-run      the same code on a CPU, tiny
    sizes

tests    builds the extension unless it is there, runs every test marked `gpu` with
         GFNODE_REQUIRE_GPU=1 in as many processes as there are cores, the errors of all precisions,
         and compute-sanitizer, where there is one, on the smallest training step
core     machine ceilings, precision modes, every row of the target table, a profile of the step
matrix   the other combinations
training `gfnode_fast.train` end to end, on large systems, on mixtures, and its loss curves

A bare checkout with torch, triton, torchdiffeq, numpy and pytest will do; `training`, and the tests
of training, need safetensors besides, and the ratio to torchode torchode.

Each part writes PART.json and PART.md under --out (default: $OUT, or the current folder) after
every piece, and prints the table last. It keeps to --minutes: what is most important comes first,
with an estimated cost that is corrected by what earlier pieces really took; what no longer fits is
reported as skipped, and what takes three times its estimate is interrupted. A piece that fails is
reported and the rest goes on; after a kernel's fault, which takes the GPU from the process, another
process does, as --resume does by hand. The exit status is 1 when anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import environment, rows_part, tests_part, training_part
from benchmarks.acceptance_report import failed
from benchmarks.baselines import c1
from benchmarks.clock import Clock
from benchmarks.run import SCHEMA
from benchmarks.session import DeviceLost, Session

SCRIPT = Path(__file__).resolve()
# Of half an hour in all, in which a machine has to start too.
MINUTES = {"tests": 7.0, "core": 8.0, "matrix": 7.0, "training": 6.0}
PARTS = tuple(MINUTES)
WORTH_RESTARTING_S = 30.0


def run_training(session: Session, script: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="gfnode-runs-") as folder:
        pieces = training_part.pieces(
            session.device,
            Path(folder),
            dry=session.dry,
            triton="ours triton" not in session.without,
        )
        for name, (estimate, run) in pieces.items():
            session.piece(name, estimate, run)


RUN = {
    "tests": tests_part.run_tests,
    "core": rows_part.run_rows,
    "matrix": rows_part.run_rows,
    "training": run_training,
}


def begun(options: argparse.Namespace, device: torch.device, command: list[str]) -> dict[str, Any]:
    """The result to go on with, or a new one."""
    path: Path = options.out / f"{options.part}.json"
    if options.resume and path.exists():
        earlier: dict[str, Any] = json.loads(path.read_text())
        earlier["restarts"] = earlier.get("restarts", 0) + 1
        earlier.pop("skipped", None)
        return earlier
    return {
        "schema": SCHEMA,
        "part": options.part,
        "dry_run": options.dry_run,
        "about": environment.describe(device, command),
        "rows": [],
    }


def go_on(arguments: list[str], clock: Clock) -> None:
    """Replace this process by one that takes up the result."""
    minutes = f"{clock.left / 60:.2f}"
    os.execv(
        sys.executable,
        [sys.executable, str(SCRIPT), *arguments, "--resume", "--minutes", minutes],
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--minutes", type=float, help=f"default: {MINUTES}")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument(
        "--without",
        nargs="+",
        default=(),
        metavar="NAME",
        help="contenders to leave out, such as one whose fault would end the process",
    )
    parser.add_argument("--resume", action="store_true", help="go on with --out's PART.json")
    parser.add_argument("--smallest", action="store_true", help="only one tiny training step")
    parser.add_argument(
        "--share", type=int, nargs=2, metavar=("I", "N"), help="only compile a part's share I of N"
    )
    options = parser.parse_args(arguments)
    if options.part is None and not options.smallest:
        parser.error("--part is required")
    needs_gpu = not options.smallest and not options.dry_run
    if needs_gpu and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch; --dry-run walks the code on a CPU")
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.smallest:
        tests_part.smallest_step()
        return 0
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.share:
        rows_part.compile_share(options.part, *options.share, device, options.without)
        return 0
    if options.dry_run:
        torch.set_num_threads(1)
    clock = Clock(MINUTES[options.part] if options.minutes is None else options.minutes)
    options.out.mkdir(parents=True, exist_ok=True)
    command = ["python", "benchmarks/gpu_acceptance.py", *arguments]
    # A dry run neither traces nor generates code, which would take minutes on a CPU.
    without = [*options.without, *(["ours compiled"] if options.dry_run else [])]
    result = begun(options, device, command)
    session = Session(result, options.out, clock, device, options.dry_run, without)
    try:
        with c1.compiler("none" if options.dry_run else "inductor"):
            RUN[options.part](session, SCRIPT)
    except DeviceLost as lost:
        if clock.left > WORTH_RESTARTING_S:
            go_on(arguments, clock)
        result.setdefault("failed", {})["GPU"] = f"lost in {lost}, and no time to go on"
    print(session.save())
    return 1 if failed(result) else 0


if __name__ == "__main__":
    sys.exit(main())
