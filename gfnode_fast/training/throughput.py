"""Training throughput of this machine, setting by setting."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from gfnode_fast.data import WindowDataset
from gfnode_fast.training.config import ConfigError, TrainConfig
from gfnode_fast.training.optimizer import GuardedAdam
from gfnode_fast.training.problem import (
    build_model,
    forked_random_state,
    load_problem,
    resolve_device,
    torch_dtype,
)

WARM_STEPS = 2
PUBLISHED = "published model"
MAX_PUBLISHED_BATCH = 50  # beyond, one step of the published model takes longer than all others


@dataclass(frozen=True)
class Throughput:
    """Training steps of one setting.

    Attributes:
        setting: what differs from the others, as one would configure it.
        batch_size: B.
        threads: of torch's CPU pool.
        step_seconds: median of a step: drawing the batch, forward, backward, update.
        samples_per_second: B / step_seconds.
        peak_bytes: of device memory, None on the CPU.
        problem: why there are no numbers, or None.
    """

    setting: str
    batch_size: int
    threads: int
    step_seconds: float | None = None
    samples_per_second: float | None = None
    peak_bytes: int | None = None
    problem: str | None = None


def measure_throughput(
    config: TrainConfig,
    batch_sizes: Sequence[int],
    *,
    seconds: float = 5.0,
    found: Callable[[Throughput], None] | None = None,
) -> list[Throughput]:
    """Time training steps of the configured model in every setting that it can have here.

    Args:
        config: the run; its data are read, nothing is written.
        batch_sizes: B to try.
        seconds: spent on each setting, at least one step.
        found: called with each row as it comes.

    Returns:
        Rows of every setting and batch size; one that cannot run says why.

    Raises:
        ConfigError: a batch size below 1; seconds that are not positive and finite.

    Notes:
        Times on a machine that does other work at the same time are worth little. Of the settings,
        "model.solver_mode=exact" changes results within the solver's tolerance, the number of
        threads changes rounding.
    """
    if any(size < 1 for size in batch_sizes):
        raise ConfigError(
            f"bench: `batch_sizes` must be at least 1, got {list(batch_sizes)}; raise them"
        )
    if not 0 < seconds < math.inf:
        raise ConfigError(f"bench: `seconds` must be positive and finite, got {seconds}; try 5")
    device = resolve_device(config.device)
    problem = load_problem(config.data)
    dtype = torch_dtype(config)
    data = problem.dataset("train", dtype=dtype, device=device)
    num_atoms = problem.graph.num_atoms
    rows = []
    before = torch.get_num_threads()
    try:
        with forked_random_state(device):
            for batch_size in batch_sizes:
                for setting, threads, build in _settings(config, batch_size, device, num_atoms):
                    torch.set_num_threads(threads)
                    row = Throughput(setting, batch_size, threads)
                    try:
                        row = _timed(build().to(device, dtype), data, row, seconds)
                    except (TypeError, ValueError, RuntimeError) as error:  # said in the row
                        row = replace(row, problem=str(error).splitlines()[0])
                    rows.append(row)
                    if found is not None:
                        found(row)
    finally:
        torch.set_num_threads(before)
    return rows


def best_settings(rows: Sequence[Throughput]) -> dict[int, Throughput]:
    """The fastest row of each batch size, the published model aside."""
    best: dict[int, Throughput] = {}
    for row in rows:
        if row.step_seconds is None or row.setting == PUBLISHED:
            continue
        other = best.get(row.batch_size)
        if other is None or other.step_seconds is None or row.step_seconds < other.step_seconds:
            best[row.batch_size] = row
    return best


def _settings(
    config: TrainConfig, batch_size: int, device: torch.device, num_atoms: int
) -> Iterator[tuple[str, int, Callable[[], nn.Module]]]:
    def with_model(**changes: Any) -> Callable[[], nn.Module]:
        changed = replace(config, model=replace(config.model, **changes))
        return lambda: build_model(changed, num_atoms)

    most = torch.get_num_threads()
    counts = [most] if device.type == "cuda" else sorted({1, most})
    if batch_size <= MAX_PUBLISHED_BATCH:
        yield PUBLISHED, most, with_model(backend="reference", solver_mode="joint")
    for threads in counts:
        yield "as configured", threads, with_model()
    if config.model.solver_mode != "exact" and config.model.mode_interaction == "no_interaction":
        yield "model.solver_mode=exact", most, with_model(solver_mode="exact")


def _timed(model: nn.Module, data: WindowDataset, row: Throughput, seconds: float) -> Throughput:
    optimizer = GuardedAdam(model.parameters(), lr=1e-4, weight_decay=0.0)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ok = torch.ones((), dtype=torch.bool, device=device)

    def step() -> None:
        index = torch.randint(len(data), (row.batch_size,), generator=generator).to(device)
        batch = data.batch(index)
        optimizer.zero_grad(set_to_none=True)
        loss = (model(**batch.inputs())[0] - batch.target).square().mean()
        loss.backward()
        optimizer.guarded_step(ok)

    def timed() -> float:
        begin = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(WARM_STEPS):
        if timed() > seconds:
            break
    samples = [timed()]
    while sum(samples) < seconds:
        samples.append(timed())
    median = statistics.median(samples)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return replace(
        row,
        step_seconds=median,
        samples_per_second=row.batch_size / median,
        peak_bytes=peak,
    )
