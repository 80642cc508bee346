"""Tests in several processes, without help from outside the standard library and pytest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.clock import Clock
from benchmarks.environment import ROOT

STALLED_S = 150.0  # in one test: a kernel that waits for itself
POLL_S = 0.2
OUTPUT = 4000  # characters kept

Outcomes = dict[str, dict[str, Any]]


def deal(tests: Iterable[str], count: int) -> list[list[str]]:
    """At most `count` shards of tests: the first case of every function first, of all kernels
    something; then functions by their length, each where fewest are, because the cases of one
    share compiled kernels.
    """
    functions: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        functions[test.partition("[")[0]].append(test)
    firsts: list[list[str]] = [[] for _ in range(count)]
    rest: list[list[str]] = [[] for _ in range(count)]
    size = max(1, sum(map(len, functions.values())) // count)
    pieces = []
    for i, cases in enumerate(functions.values()):
        firsts[i % count].append(cases[0])
        pieces += [cases[k : k + size] for k in range(1, len(cases), size)]
    for piece in sorted(pieces, key=len, reverse=True):
        min(zip(firsts, rest, strict=True), key=lambda pair: sum(map(len, pair)))[1].extend(piece)
    return [a + b for a, b in zip(firsts, rest, strict=True) if a or b]


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def run_shard(
    tests: list[str], folder: Path, name: str, clock: Clock, environment: dict[str, str]
) -> Outcomes:
    """Run tests in order; a process that ends or stalls in one of them loses that one alone, and
    another goes on. What the clock leaves no time for is "not run".
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: Outcomes = {}
    for attempt in range(len(tests)):
        left = [test for test in tests if test not in found]
        if not left or clock.left <= 0:
            break
        chosen, log, output = (folder / f"{name}-{attempt}.{end}" for end in ("in", "log", "txt"))
        chosen.write_text("\n".join(left) + "\n")
        log.touch()
        files = dict.fromkeys(test.partition("::")[0] for test in left)
        command = pytest_command(
            "-p", "benchmarks.shard_log", "--chosen", str(chosen), "--log", str(log), *files
        )
        with output.open("w") as written:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=written, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            why = _wait(process, log, clock)
        outcomes, running = read(log)
        found |= outcomes
        if clock.left <= 0:
            break
        lost = [running] if running else [] if outcomes else left
        tail = output.read_text(errors="replace")[-OUTPUT:]
        for test in lost:
            found[test] = {"outcome": "failed", "seconds": 0.0, "message": f"{why}:\n{tail}"}
    late = {"outcome": "not run", "seconds": 0.0, "message": ""}
    return found | {test: late for test in tests if test not in found}


def _wait(process: subprocess.Popen[bytes], log: Path, clock: Clock) -> str:
    """Wait for the end, and bring it about where a test or the part takes too long."""
    size, since = 0, time.perf_counter()
    while process.poll() is None:
        now = time.perf_counter()
        if (grown := log.stat().st_size) != size:
            size, since = grown, now
        if clock.left <= 0 or now - since > STALLED_S:
            os.killpg(process.pid, signal.SIGKILL)  # its own group: it was started as a session
            process.wait()
            return f"ended after {now - since:.0f} s without an outcome"
        time.sleep(POLL_S)
    return f"the process ended with status {process.returncode}"


def read(log: Path) -> tuple[Outcomes, str | None]:
    """Outcomes that a process wrote, and the test that it was in at its end."""
    found: Outcomes = {}
    running = None
    for line in log.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut in the middle by the end of the process
        running = entry.get("begun")
        if name := entry.pop("test", None):
            found[name] = entry
    return found, running
