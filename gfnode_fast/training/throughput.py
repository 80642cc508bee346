"""Training throughput of this machine, setting by setting."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from gfnode_fast.data import MixedDataset, WindowDataset
from gfnode_fast.training.break_even import BreakEven
from gfnode_fast.training.config import ConfigError, TrainConfig, config_from_dict, config_to_dict
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.problem import (
    build_model,
    forked_random_state,
    resolve_device,
    torch_dtype,
)
from gfnode_fast.training.ranks import Ranks
from gfnode_fast.training.step import BatchStep

MARGIN = 1.03  # less is how much repeats of one setting differ
PUBLISHED = "published model"
MAX_PUBLISHED_BATCH = 50  # beyond, one step of the published model takes longer than all others


@dataclass(frozen=True)
class Throughput:
    """Training steps of one setting.

    Attributes:
        batch_size: B.
        threads: of torch's CPU pool.
        options: what differs from the configuration, besides the batch size.
        is_published: whether it is the published algorithm, for comparison.
        step_seconds: median of a step: drawing the batch, forward, backward, update.
        samples_per_second: B / step_seconds.
        peak_bytes: of device memory, None on the CPU.
        break_even: of compiled solves, against the fastest setting before it.
        problem: why there are no numbers, or None.
    """

    batch_size: int
    threads: int
    options: Mapping[str, object] = field(default_factory=dict)
    is_published: bool = False
    step_seconds: float | None = None
    samples_per_second: float | None = None
    peak_bytes: int | None = None
    break_even: BreakEven | None = None
    problem: str | None = None

    @property
    def setting(self) -> str:
        """What it is, in a few words; options as one would write them in a configuration."""
        if self.is_published:
            return PUBLISHED
        options = (f"{name}={_plain(value)}" for name, value in self.options.items())
        return " ".join(options) or "as configured"

    def command_line(self) -> str:
        """Options of ``gfnode-fast train`` that give this setting."""
        options = {"optim.batch_size": self.batch_size, **self.options}
        return " ".join(f"--{name} {_plain(value)}" for name, value in options.items())


def measure_throughput(
    config: TrainConfig,
    batch_sizes: Sequence[int],
    *,
    seconds: float = 5.0,
    compiled: bool = False,
    found: Callable[[Throughput], None] | None = None,
) -> list[Throughput]:
    """Time training steps of the configured model here, and look for faster settings.

    For each batch size: the published algorithm, up to 50 molecules; the configuration with
    different numbers of threads; then, one after the other and kept if 3 % faster, other backends,
    the exact solve, on a GPU the captured step, and edge quantities computed again in backward
    (slower, but it may be what fits into memory).

    Args:
        config: the run; its data are read, nothing is written.
        batch_sizes: B to try.
        seconds: spent on each setting, at least one step.
        compiled: also try ``model.backend=compiled``, which takes minutes to compile.
        found: called with each row as it comes.

    Returns:
        A row of everything that was tried; one that cannot run says why.

    Raises:
        ConfigError: a batch size below 1; seconds that are not positive and finite.

    Notes:
        Times on a machine that does other work at the same time are worth little. Of the settings,
        "model.solver_mode=exact" changes results within the solver's tolerance, all others change
        rounding at most.
    """
    if any(size < 1 for size in batch_sizes):
        raise ConfigError(
            f"bench: `batch_sizes` must be at least 1, got {list(batch_sizes)}; raise them"
        )
    if not 0 < seconds < math.inf:
        raise ConfigError(f"bench: `seconds` must be positive and finite, got {seconds}; try 5")
    device = resolve_device(config.device)
    molecules = Molecules(config)
    data = molecules.dataset("train", dtype=torch_dtype(config), device=device)
    rows: list[Throughput] = []
    before = torch.get_num_threads()
    try:
        with forked_random_state(device):
            for batch_size in dict.fromkeys(batch_sizes):
                sized = replace(config, optim=replace(config.optim, batch_size=batch_size))
                search = _Search(sized, data, molecules.num_atoms, seconds)
                for row in search.rows(compiled):
                    rows.append(row)
                    if found is not None:
                        found(row)
    finally:
        torch.set_num_threads(before)
    return rows


def best_settings(rows: Sequence[Throughput]) -> dict[int, Throughput]:
    """The fastest row of each batch size, the published model aside; of about equal ones the
    first, which changes less of the configuration.
    """
    best: dict[int, Throughput] = {}
    for row in rows:
        if _is_better(row, best.get(row.batch_size)):
            best[row.batch_size] = row
    return best


class _Search:
    """The settings of one batch size, each on top of the fastest before it."""

    def __init__(
        self,
        config: TrainConfig,
        data: WindowDataset | MixedDataset,
        num_atoms: int,
        seconds: float,
    ) -> None:
        self.config, self.data, self.num_atoms, self.seconds = config, data, num_atoms, seconds
        self.device = data.device
        self.best: Throughput | None = None

    def rows(self, compiled: bool) -> Iterator[Throughput]:
        most, batch_size = torch.get_num_threads(), self.config.optim.batch_size
        if batch_size <= MAX_PUBLISHED_BATCH:
            yield self._row(Throughput(batch_size, most, is_published=True))
        on_gpu = self.device.type == "cuda"
        for threads in [most] if on_gpu else sorted({1, -(-most // 2), most}):
            yield self._row(Throughput(batch_size, threads))
        threads = self.best.threads if self.best else most
        for change in self._changes(compiled):
            options = {**(self.best.options if self.best else {}), **change}
            yield self._row(Throughput(batch_size, threads, options))

    def _changes(self, compiled: bool) -> Iterator[dict[str, object]]:
        model, on_gpu = self.config.model, self.device.type == "cuda"
        backends = ["auto", "torch", *(["triton"] if on_gpu else [])]
        for backend in [*backends, *(["compiled"] if compiled else [])]:
            if backend != model.backend:
                yield {"model.backend": backend}
        if model.solver_mode != "exact" and model.mode_interaction == "no_interaction":
            yield {"model.solver_mode": "exact"}
        is_full = self.config.optim.batch_size <= len(self.data)
        if on_gpu and is_full and not self.config.capture:
            yield {"capture": True}
        if model.recompute is not True:
            yield {"model.recompute": True}

    @property
    def plain_seconds(self) -> float | None:
        """A step of the fastest setting so far, unless its solves are compiled themselves."""
        if self.best is None or self.best.options.get("model.backend") == "compiled":
            return None
        return self.best.step_seconds

    def _row(self, row: Throughput) -> Throughput:
        torch.set_num_threads(row.threads)
        changes: Mapping[str, object] = row.options
        if row.is_published:
            changes = {"model.backend": "reference", "model.solver_mode": "joint", "capture": False}
        try:
            row = self._timed(_changed(self.config, changes), row)
        except (TypeError, ValueError, RuntimeError) as error:  # said in the row
            return replace(row, problem=str(error).splitlines()[0])
        if _is_better(row, self.best):
            self.best = row
        return row

    def _timed(self, config: TrainConfig, row: Throughput) -> Throughput:
        device = self.device
        model = build_model(config, self.num_atoms).to(device, self.data.dtype)
        step = BatchStep(config, model, self.data, Ranks())
        generator = torch.Generator().manual_seed(0)
        made = 0

        def timed() -> float:
            nonlocal made
            begin = time.perf_counter()
            index = torch.randint(len(self.data), (row.batch_size,), generator=generator)
            step(index.to(self.data.index_device), made, 0)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            made += 1
            return time.perf_counter() - begin

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        first = timed()
        if first <= self.seconds:
            timed()
        samples = [timed()]
        while sum(samples) < self.seconds:
            samples.append(timed())
        median = statistics.median(samples)
        break_even = None
        if row.options.get("model.backend") == "compiled" and (plain := self.plain_seconds):
            break_even = BreakEven(max(0.0, first - median), median, plain)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return replace(
            row,
            step_seconds=median,
            samples_per_second=row.batch_size / median,
            peak_bytes=peak,
            break_even=break_even,
        )


def _changed(config: TrainConfig, options: Mapping[str, object]) -> TrainConfig:
    """The configuration with some options changed, by their dotted names."""
    values = config_to_dict(config)
    for name, value in options.items():
        *sections, last = name.split(".")
        section: Any = values
        for key in sections:
            section = section[key]
        section[last] = value
    return config_from_dict(values)


def _is_better(row: Throughput, best: Throughput | None) -> bool:
    if row.is_published or row.samples_per_second is None:
        return False
    if best is None or best.samples_per_second is None:
        return True
    return row.samples_per_second > MARGIN * best.samples_per_second


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
