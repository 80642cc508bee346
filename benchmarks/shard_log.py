"""A pytest plugin: runs chosen tests in a given order, and writes every outcome as it is there.

    pytest -p benchmarks.shard_log --chosen FILE --log FILE TEST_FILES

A line of JSON when a test begins and one when it is through, so that a process that is killed, or
crashes, leaves all but the test that it was in. One whose GPU is lost to a kernel's fault ends,
because every later test would fail with the same error.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MESSAGE = 4000  # characters of a failure that are kept: its end says what
LOST = 3  # exit status


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chosen", type=Path, help="names of tests, a line each")
    parser.addoption("--log", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    if log := config.getoption("--log"):
        config.pluginmanager.register(_Log(log))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if chosen := config.getoption("--chosen"):
        place = {name: i for i, name in enumerate(chosen.read_text().splitlines())}
        items[:] = sorted((i for i in items if i.nodeid in place), key=lambda i: place[i.nodeid])


def outcome(report: pytest.TestReport) -> str:
    """passed, failed, skipped, xfailed or xpassed."""
    if hasattr(report, "wasxfail"):
        return {"skipped": "xfailed", "passed": "xpassed"}.get(report.outcome, report.outcome)
    return report.outcome


def message(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail)
    return str(report.longrepr or "")[-MESSAGE:]


class _Log:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {}

    def write(self, **entry: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.found = {"outcome": "passed", "seconds": 0.0, "message": ""}
        self.write(begun=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.found["seconds"] += round(report.duration, 3)
        if outcome(report) != "passed":
            self.found |= {"outcome": outcome(report), "message": message(report)}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.write(test=nodeid, **self.found)
        if self.found["outcome"] == "failed" and "CUDA" in self.found["message"] and _is_lost():
            os._exit(LOST)  # a shutdown that waits for the GPU may not end


def _is_lost() -> bool:
    import torch

    from benchmarks.session import is_lost

    return is_lost(torch.device("cuda"))
