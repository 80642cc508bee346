"""Each row alone under pytest-benchmark: pytest benchmarks --benchmark-only [-k "B50 and U1"]

Paired ratios come from run.py, which times the contenders of a row in turn. Checked before it is
timed, here as there. Only batches up to 50: larger ones take minutes under U0.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from benchmarks.agreement import Checker
from benchmarks.operations import make_task
from benchmarks.registry import Row, contenders, cpu_rows, gpu_core_rows
from benchmarks.task import Unavailable

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS = gpu_core_rows() if DEVICE.type == "cuda" else cpu_rows()
CASES = [(row, name) for row in ROWS if row.batch <= 50 for name in contenders(row)]
IDS = [f"{row.name} {name}".replace("=", "") for row, name in CASES]  # -k knows no "="


@lru_cache(maxsize=1)
def checker() -> Checker:
    return Checker(DEVICE)


@pytest.mark.parametrize(("row", "contender"), CASES, ids=IDS)
def test_row(benchmark: Any, row: Row, contender: str) -> None:
    torch.set_num_threads(1)
    names = contenders(row)
    first = "U1" if "U0" in names else names[0]
    try:
        if "U0" in names:
            checker().check_u1(row)
        task = make_task(contender, row, DEVICE)
        if contender != "U0":
            checker().check(contender, row, task, checker().yardstick(row, first))
    except Unavailable as error:
        pytest.skip(str(error))

    def run() -> None:
        task.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
