"""The one way to time: warm-up, interleaved rounds, device events on a GPU, medians and quartiles.

Memory on the CPU is the high-water mark of torch's allocator during one extra, untimed execution,
read from the profiler's allocation records: exact for tensors, blind to what BLAS or Python take.
On a GPU it is `max_memory_allocated` less what was allocated before.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

MIN_SAMPLE_S = 0.005  # shorter runs are repeated within one sample
WARM_RUNS = 2


@dataclass
class Timing:
    """Samples of one contender, seconds per execution, with the round each was taken in."""

    samples: list[float] = field(default_factory=list)
    repeats: int = 1

    def summary(self) -> dict[str, Any]:
        ordered = sorted(self.samples)
        if len(ordered) > 1:
            q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        else:
            q1 = median = q3 = ordered[0]
        return {
            "n": len(ordered),
            "repeats": self.repeats,
            "median_s": median,
            "q1_s": q1,
            "q3_s": q3,
            "min_s": ordered[0],
        }


def sample(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds per execution of `repeats` executions."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int,
    seconds_each: float,
    exactly: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Timing]:
    """Time all contenders in turn, round after round, so that drift meets all of them alike.

    Args:
        rounds: at most that many samples each.
        seconds_each: a contender leaves once its samples add up to this much; each has one at
        least.
        exactly: contenders that take so many samples of one execution each, without warm-up.
    """
    timings = {name: Timing() for name in runs}
    for name, run in runs.items():
        if name in exactly:
            timings[name].samples += [sample(run, device, 1) for _ in range(exactly[name])]
            continue
        took = sample(run, device, 1)
        for _ in range(WARM_RUNS - 1):
            if took < seconds_each:
                took = sample(run, device, 1)
        timings[name].repeats = max(1, int(MIN_SAMPLE_S / max(took, 1e-9)))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in runs.items():
                timing = timings[name]
                spent = sum(timing.samples) * timing.repeats
                if name not in exactly and (not timing.samples or spent < seconds_each):
                    timing.samples.append(sample(run, device, timing.repeats))
    finally:
        gc.enable()
    return timings


def ratio(baseline: Timing, contender: Timing) -> float:
    """How many times faster the contender is: the median over rounds both took part in."""
    pairs = list(zip(baseline.samples, contender.samples, strict=False))
    return statistics.median(b / c for b, c in pairs)


class OperationCounter(TorchDispatchMode):
    """Dispatched tensor operations, and the bytes that those which are no views read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        if not func.is_view:
            operands = torch.utils._pytree.tree_leaves((args, kwargs, out))
            self.bytes += sum(t.nbytes for t in operands if isinstance(t, torch.Tensor))
        return out


def count(run: Callable[[], object]) -> dict[str, int]:
    """Operations, floating-point operations of matrix products, and bytes of one eager
    execution.
    """
    counter = OperationCounter()
    with counter:
        run()
    with FlopCounterMode(display=False) as flops:
        run()
    return {
        "operations": counter.operations,
        "flops": flops.get_total_flops(),
        "bytes": counter.bytes,
    }


def count_operations(run: Callable[[], object]) -> int:
    counter = OperationCounter()
    with counter:
        run()
    return counter.operations


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak bytes that one execution adds to what lives before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        run()
    records = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for record in sorted(records, key=lambda e: e.start_ns()):
        live += record.nbytes()
        peak = max(peak, live)
    return peak
