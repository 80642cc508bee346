"""The acceptance's parts of rows: the target table with what explains it, and the combinations.

Kernels are compiled beforehand, by processes that run each contender once: they fill the caches of
Triton and of torch's compiler with exactly what the rows launch.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import accuracy
from benchmarks.ceilings import measure_ceilings
from benchmarks.measure import Effort
from benchmarks.operations import make_task
from benchmarks.registry import BASELINES, Row, contenders, gpu_core_rows, gpu_matrix_rows
from benchmarks.session import Session
from benchmarks.step_profile import profile_step
from benchmarks.tests_part import build_extension, run_command

GPU_EFFORT = Effort(rounds=20, seconds_each=0.5, u0_limit_s=40.0)
DRY_EFFORT = Effort(rounds=1, seconds_each=0.01, u0_limit_s=40.0)
PROFILED_BATCHES = (50, 4096)
ROWS = {"core": gpu_core_rows, "matrix": gpu_matrix_rows}
C1_SHARES = 2  # of C1 at B = 4096, whose first run holds 40 GB
COMPILING_S = 120.0  # at most, before the first row

Job = tuple[Row, str]


def rows_of(part: str, dry: bool) -> list[Row]:
    rows = ROWS[part]()
    return list(dict.fromkeys(row.tiny() for row in rows)) if dry else rows


def compiling_shares(part: str, count: int, without: Any = ()) -> list[list[Job]]:
    """Who compiles what, in the rows' order: C1 in C1_SHARES processes, ours in the others."""
    ours: list[list[Job]] = [[] for _ in range(max(1, count - C1_SHARES))]
    c1: list[list[Job]] = [[] for _ in range(C1_SHARES)]
    waiting = [(row, name) for row in ROWS[part]() for name in contenders(row, "cuda")]
    waiting = [job for job in waiting if job[1] not in without]
    for i, job in enumerate(job for job in waiting if job[1] == "C1"):
        c1[i % len(c1)].append(job)
    kernels = [job for job in waiting if "triton" in job[1] or "captured" in job[1]]
    for i, job in enumerate(kernels):
        ours[i % len(ours)].append(job)
    return [share for share in (*c1, *ours) if share]


def compile_share(part: str, number: int, count: int, device: torch.device, without: Any) -> None:
    """Run each contender of one share once; a failure is the row's to report."""
    for row, name in compiling_shares(part, count, without)[number]:
        try:
            make_task(name, row, device).run()
            outcome = "ok"
        except Exception as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        print(f"{row.name}, {name}: {outcome}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compile_beforehand(session: Session, script: Path) -> list[dict[str, Any]]:
    """One process a share, all at once; status and last output of each."""
    part, count = session.result["part"], max(C1_SHARES + 1, (os.cpu_count() or 1) - 2)
    shares = compiling_shares(part, count, session.without)
    left_out = ["--without", *session.without] if session.without else []

    def run(number: int) -> dict[str, Any]:
        share = ["--share", str(number), str(count), *left_out]
        command = [sys.executable, str(script), "--part", part, *share]
        return run_command(command, session.clock.within(COMPILING_S))

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(run, range(len(shares))))


def built(session: Session) -> dict[str, Any]:
    """The step of building the extension, on a machine that the tests did not run on before.

    Raises:
        RuntimeError: it failed.
    """
    step = build_extension(session.clock, session.dry)
    if step["status"]:
        raise RuntimeError(step["output"][-500:])
    return step


def run_rows(session: Session, script: Path) -> None:
    """Rows in their order; in the core, ceilings and errors before them and profiles after."""
    part, device, dry = session.result["part"], session.device, session.dry
    rows, effort = rows_of(part, dry), DRY_EFFORT if dry else GPU_EFFORT
    if not dry:
        session.piece("build", 30.0, lambda: built(session))
        session.piece(
            "compiled beforehand", COMPILING_S, lambda: compile_beforehand(session, script)
        )
    if part == "core":
        session.piece("ceilings", 10.0, lambda: measure_ceilings(device, tiny=dry))
        much = {"rounds": 1 if dry else 5, "seconds_each": 0.3, "without": session.without}
        row = Row("model", "step", PROFILED_BATCHES[-1])
        row = row.tiny() if dry else row
        session.piece("accuracy", 60.0, lambda: accuracy(row, device, **much))
    for row in rows:
        session.row(row, effort)
    if part == "core":
        profiled = [Row("model", "step", batch) for batch in PROFILED_BATCHES]
        if dry:
            profiled = list(dict.fromkeys(row.tiny() for row in profiled))
        candidates = {"profiles": ("ours", *BASELINES[1:2])}
        if device.type == "cuda" and "ours triton" not in session.without:
            candidates["profiles of Triton"] = ("ours triton",)
        for name, who in candidates.items():
            session.piece(
                name, 10.0, lambda who=who: [profile_step(r, device, who) for r in profiled]
            )
