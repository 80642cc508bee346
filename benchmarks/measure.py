"""One row: build the contenders, check them, time them in turn, count and weigh them."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.agreement import Checker
from benchmarks.baselines.c1 import CompileLog, compiler
from benchmarks.clock import OutOfTime
from benchmarks.operations import make_task
from benchmarks.registry import (
    BASELINES,
    CAPTURED,
    CAPTURED_EXACT,
    CAPTURED_SOLVE,
    EAGER_LOOP,
    UNCOUNTED,
    UNION_OPERATIONS,
    Row,
    contenders,
)
from benchmarks.task import Task, Unavailable
from benchmarks.timing import Timing, count, count_operations, interleaved, peak_memory, ratio

# From this batch on, U0 with irregular times is not warmed up, and runs once; propagation alone
# U0_SAMPLES times, if these are predicted to fit into the limit.
SINGLE_FROM = {"cpu": 200, "cuda": 4096}
U0_SAMPLES = 3
# An execution longer than this is not repeated for counting and weighing.
COUNTED_UP_TO_S = {"cpu": 20.0, "cuda": 2.0}
CHECKED_WITHOUT_MEMORY = 512  # the batch of the agreement check where U1 does not fit
CUDA_GRAPH_RUNS = 3
NO_SLOWER = 1.02  # C1 / U1 up to this is noise


@dataclass(frozen=True)
class Effort:
    """How long to measure: samples per contender and seconds that they may add up to."""

    rounds: int = 15
    seconds_each: float = 6.0
    u0_limit_s: float = 400.0


QUICK = Effort(rounds=3, seconds_each=0.5, u0_limit_s=5.0)


def predict_u0_seconds(row: Row, device: torch.device) -> float:
    """Rough seconds of one U0 execution: the work without the union, dispatches, and the O(L²)
    writes.

    Calibrated on one CPU thread and, for GPUs, on counted operations and bytes.
    """
    if row.op not in UNION_OPERATIONS:
        return 0.0
    shared = {"model": 0.014, "propagation": 0.001, "solve": 0.0005}[row.op] * row.batch
    if row.times == "regular":
        union = inputs.NUM_TIMES
    else:
        union = int(
            inputs.DELTA_FRAME * (1 - (1 - inputs.NUM_TIMES / inputs.DELTA_FRAME) ** row.batch)
        )
    gradient = row.phase != "forward"
    channels = 64 if row.op == "solve" else 70
    written = union**2 * row.num_modes * row.batch * channels * 4 * gradient
    if device.type == "cuda":
        return shared / 300 + union * (140 if gradient else 48) * 8e-6 + 4 * written / 3e12
    resident = written / max(union, 1) < 3e7
    return (
        shared
        + union * (140 if gradient else 48) * 1e-5
        + 3 * written / (4e10 if resident else 7e9)
    )


def _failure(status: str, error: BaseException) -> dict[str, Any]:
    if isinstance(error, torch.OutOfMemoryError):
        return {"status": "out of memory", "reason": str(error).splitlines()[0][:300]}
    if isinstance(error, OutOfTime):
        return {"status": "skipped", "reason": str(error)}
    if isinstance(error, Unavailable):
        return {"status": status, "reason": str(error)}
    text = str(error).strip().splitlines()
    found = {"status": status, "reason": f"{type(error).__name__}: {text[0][:300] if text else ''}"}
    if status == "failed":
        found["traceback"] = traceback.format_exception(error)[-1][-2000:]
    return found


def _samples_of_u0(row: Row, device: torch.device, effort: Effort) -> dict[str, int]:
    """How often U0 runs, where that is not as often as the others."""
    union = row.op in UNION_OPERATIONS and row.times == "irregular"
    took = predict_u0_seconds(row, device)
    large = row.batch >= SINGLE_FROM[device.type] or took > 15
    if not union or row.phase == "forward" or not large:
        return {}
    several = row.op == "propagation" and U0_SAMPLES * took <= effort.u0_limit_s
    return {"U0": U0_SAMPLES if several else 1}


def measure(
    row: Row,
    device: torch.device,
    checker: Checker,
    effort: Effort,
    without: Collection[str] = (),
    kind: str | None = None,
) -> dict[str, Any]:
    """All the reports need of one row. A contender that fails is reported, the others go on;
    `without` leaves contenders out; `kind` asks for those of another kind of device than this.
    """
    names = tuple(name for name in contenders(row, kind or device.type) if name not in without)
    results: dict[str, dict[str, Any]] = {}
    tasks: dict[str, Task] = {}
    began = time.perf_counter()
    first = "U1" if "U0" in names else names[0]
    checked = row
    try:
        if first == "U1" and row.op in UNION_OPERATIONS:
            against_u0 = checker.check_u1(row)
        try:
            expected = checker.yardstick(row, first)
        except torch.OutOfMemoryError:
            checked = replace(row, batch=CHECKED_WITHOUT_MEMORY)
            expected = checker.yardstick(checked, first)
    except Exception as error:
        # Without a yardstick nobody may be timed.
        failed = _failure("failed", error)
        return {"row": row.as_dict(), "contenders": dict.fromkeys(names, failed), "ratios": {}}
    for name in names:
        if name == "U0" and (seconds := predict_u0_seconds(row, device)) > effort.u0_limit_s:
            results[name] = {
                "status": "skipped",
                "reason": f"about {seconds:.0f} s once, the limit is {effort.u0_limit_s:.0f} s",
            }
            continue
        try:
            info: dict[str, Any] = {}
            if name == "C1":
                task, errors, info = _compiled(row, checked, device, checker, expected)
            else:
                task = make_task(name, row, device)
                errors = (
                    against_u0
                    if name == "U0"
                    else checker.check(
                        name, checked, _at(checked, row, name, task, device), expected
                    )
                )
            tasks[name] = task
            results[name] = {"status": "ok", "agreement": errors, **info}
            if checked is not row:
                results[name]["checked_at_batch"] = checked.batch
        except Unavailable as error:
            results[name] = _failure("unavailable", error)
        except Exception as error:
            results[name] = _failure("failed", error)
    del expected
    timings = _time(row, device, effort, tasks, results)
    for name, timing in timings.items():
        results[name] |= timing.summary()
        if timing.summary()["median_s"] <= COUNTED_UP_TO_S[device.type]:
            _weigh(name, tasks[name], device, results[name])
    if {"U1", "C1"} <= set(timings) and 1 / ratio(timings["U1"], timings["C1"]) > NO_SLOWER:
        results["C1"] |= {"status": "invalid", "reason": "slower than U1: no valid baseline"}
    ratios = {
        f"{name} / {baseline}": ratio(timings[baseline], timing)
        for name, timing in timings.items()
        for baseline in dict.fromkeys((*BASELINES, first, EAGER_LOOP, "ours"))
        if baseline in timings and baseline != name
    }
    found = {"row": row.as_dict(), "contenders": results, "ratios": ratios}
    found["work"] = _work(first, tasks, timings)
    found["seconds"] = round(time.perf_counter() - began, 1)
    if row.op in UNION_OPERATIONS:
        found["union"] = inputs.union_size(inputs.make_batch(row, device))
    tasks.clear()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _compiled(
    row: Row, checked: Row, device: torch.device, checker: Checker, expected: dict[str, Tensor]
) -> tuple[Task, dict[str, float], dict[str, Any]]:
    """C1, checked, and its cost; on a GPU with CUDA graphs, or without where they fail."""

    def build() -> tuple[Task, dict[str, float], dict[str, Any]]:
        with CompileLog() as log:
            task = make_task("C1", row, device)
            errors = checker.check("C1", checked, _at(checked, row, "C1", task, device), expected)
            for _ in range(CUDA_GRAPH_RUNS if device.type == "cuda" else 0):
                task.run()  # recording starts on the second execution, replay on the third
        return task, errors, log.info()

    if device.type != "cuda":
        return build()
    try:
        return build()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {str(error)[:200]}"
    with compiler("inductor", cuda_graphs=False):
        task, errors, info = build()
    return task, errors, {**info, "cuda_graphs_failed": why}


def _at(checked: Row, row: Row, name: str, task: Task, device: torch.device) -> Task:
    """The task itself, or its like at the size at which the yardstick fits into memory."""
    return task if checked is row else make_task(name, checked, device)


def _time(
    row: Row,
    device: torch.device,
    effort: Effort,
    tasks: dict[str, Task],
    results: dict[str, dict[str, Any]],
) -> dict[str, Timing]:
    """Time what passed, interleaved; one that fails now is dropped and the rest timed again."""
    few = _samples_of_u0(row, device, effort)
    while tasks:
        running = ""
        exactly = {name: samples for name, samples in few.items() if name in tasks}

        def guarded(name: str) -> Any:
            def run() -> None:
                nonlocal running
                running = name
                if name not in few or device.type != "cuda":
                    tasks[name].run()
                else:  # not run again to be weighed
                    results[name]["peak_bytes"] = peak_memory(tasks[name].run, device)

            return run

        try:
            return interleaved(
                {name: guarded(name) for name in tasks},
                device,
                rounds=effort.rounds,
                seconds_each=effort.seconds_each,
                exactly=exactly,
            )
        except Exception as error:
            results[running] = _failure("failed", error)
            del tasks[running]
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {}


def _weigh(name: str, task: Task, device: torch.device, result: dict[str, Any]) -> None:
    if name in (CAPTURED, CAPTURED_EXACT, CAPTURED_SOLVE):
        return  # a replay dispatches no operations, and its memory was taken when it was captured
    try:
        result["peak_bytes"] = peak_memory(task.run, device)
        if name not in UNCOUNTED:
            result["operations"] = count_operations(task.run)
    except Exception as error:
        result["weighing_failed"] = _failure("failed", error)


def _work(first: str, tasks: dict[str, Task], timings: dict[str, Timing]) -> dict[str, Any]:
    """Matrix flops and bytes of the eager yardstick, and the least bytes where they are known."""
    if first not in timings:
        return {}
    work: dict[str, Any] = {"counted_on": first, "min_bytes": tasks[first].min_bytes}
    try:
        counted = count(tasks[first].run)
        return work | {"flops": counted["flops"], "bytes": counted["bytes"]}
    except Exception as error:
        return work | {"counting_failed": _failure("failed", error)}
