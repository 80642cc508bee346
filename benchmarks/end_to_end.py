"""Samples per second of `gfnode-fast train` itself against the published recipe, and its overhead.

    python benchmarks/end_to_end.py [--device cuda] [--json OUT] [--batches 50 200 512 4096]
                                    [--rounds 3] [--published-limit 120]

train          `gfnode_fast.train` as the command line calls it, between two readings of its losses:
               drawing the batch, forward, backward, update, guard, reading and logging
bare step      the same model's forward, backward and update on one fixed batch: train / bare step
               is what the loop costs
published      the reference model behind a per-item data loader, Adam; the work between two steps,
               loading included

Validation and checkpoints are left out of all three. They take turns, round after round; published
runs once, n = 1, where it is predicted to take long, and not at all beyond --published-limit
seconds, which is then said. On a GPU "Triton" runs the same with model.backend=triton, train and
bare step captured as a CUDA graph.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from benchmarks import training_runs
from benchmarks.baselines.published_loop import ItemDataset, published_steps
from benchmarks.formatting import heading
from benchmarks.inputs import initial_state, model_config
from benchmarks.measure import predict_u0_seconds
from benchmarks.registry import Row
from benchmarks.timing import Timing, ratio, sample
from benchmarks.training_tables import end_to_end_table
from gfnode_fast import reference
from gfnode_fast.data import build_graph, load_sample, load_windows
from gfnode_fast.training import DataConfig, ModelConfig, OptimConfig, TrainConfig

BATCHES = {"cpu": (50, 200, 512, 4096), "cuda": (50, 512, 4096)}
ONCE_FROM_S = 10.0  # a predicted step of the published recipe from which one must do
MOST_WINDOWS = 28672  # of the shipped run's training block: seven batches of 4096


@dataclass(frozen=True)
class Effort:
    """Steps per reading, readings that count in a round, rounds."""

    log_every: int
    readings: int
    rounds: int


def effort(batch: int, device: torch.device, rounds: int) -> Effort:
    if device.type == "cuda":
        return Effort(log_every=10, readings=3, rounds=rounds)
    if batch <= 50:
        return Effort(log_every=10, readings=1, rounds=rounds)
    if batch <= 200:
        return Effort(log_every=2, readings=2, rounds=rounds)
    return Effort(log_every=1, readings=2, rounds=1)


def config(
    batch: int, backend: str, much: Effort, device: torch.device, sample_name: str, output: Path
) -> TrainConfig:
    """The published recipe with another batch, stopped by the number of steps."""
    steps = much.log_every * (1 + much.readings)
    windows = batch * min(steps, max(1, MOST_WINDOWS // batch))
    return TrainConfig(
        data=DataConfig(
            trajectory=f"sample:{sample_name}", train_size=windows, val_size=1, test_size=1
        ),
        model=ModelConfig(backend=backend),
        optim=OptimConfig(batch_size=batch, validate_every=steps + 1, epochs=steps + 1),
        output=str(output),
        device=device.type,
        capture=backend == "triton",
        log_every=much.log_every,
        checkpoint_every=steps + 1,
        max_steps=steps,
    )


def measure_batch(
    batch: int,
    device: torch.device,
    much: Effort,
    folder: Path,
    *,
    published_limit_s: float,
    molecule: str = "aspirin",
    triton: bool = True,
) -> dict[str, Any]:
    """Seconds a step of every contender at one batch size, and their ratios."""
    backends = {"": "auto"}
    if device.type == "cuda" and triton:
        backends[" Triton"] = "triton"
    timings: dict[str, Timing] = {}
    found: dict[str, dict[str, Any]] = {}
    expected = predict_u0_seconds(Row("model", "step", batch, molecule=molecule), device)
    published: Iterator[Tensor] | None = None
    if expected > published_limit_s:
        found["published"] = {
            "status": "skipped",
            "reason": f"about {expected:.0f} s a step, the limit is {published_limit_s:.0f} s",
        }
    for turn in range(much.rounds):
        for suffix, backend in backends.items():
            run = folder / f"B{batch}{suffix.strip()}-{turn}"
            training_runs.progress(f"B = {batch}, round {turn + 1}, {backend}")
            watch, _ = training_runs.watched(
                config(batch, backend, much, device, molecule, run), "max_steps"
            )
            timings.setdefault(f"train{suffix}", Timing()).samples += watch.step_seconds()
            bare = timings.setdefault(f"bare step{suffix}", Timing(repeats=much.log_every))
            step = training_runs.bare_step(run, load_sample(molecule), device)
            step()
            bare.samples += [sample(step, device, much.log_every) for _ in range(much.readings)]
            del step
            gc.collect()
        if "published" in found:
            continue
        if published is None:
            published = _published(run, batch, molecule, device)
            if expected < ONCE_FROM_S:
                next(published)
        if turn == 0 or expected < ONCE_FROM_S:
            training_runs.progress(f"B = {batch}, round {turn + 1}, published")
            timings.setdefault("published", Timing()).samples.append(_seconds(published, device))
    for name, timing in timings.items():
        summary = timing.summary()
        found[name] = {
            "status": "ok", **summary, "samples_per_s": batch / summary["median_s"],
        }  # fmt: skip
    ratios = {
        f"{name} / {base}": ratio(timings[base], timings[name])
        for name in timings
        for base in ("published", name.replace("train", "bare step"))
        if name.startswith("train") and base in timings
    }
    return {
        "batch": batch,  "contenders": found, "ratios": ratios,
    }  # fmt: skip


def _published(run: Path, batch: int, molecule: str, device: torch.device) -> Iterator[Tensor]:
    """The recipe on the windows that a run of ours drew, from the same initial values."""
    row = Row("model", "step", batch, molecule=molecule)
    model = reference.FourierMD(**model_config(row))
    model.load_state_dict(initial_state(row))
    trajectory = load_sample(molecule)
    graph = build_graph(trajectory.positions[0], trajectory.numbers)
    windows = load_windows(run / "windows.json", trajectory)["train"]
    optim = OptimConfig()
    return published_steps(
        model.to(device), ItemDataset(trajectory, graph, windows), batch, optim.lr,
        optim.weight_decay,
    )  # fmt: skip


def _seconds(steps: Iterator[Tensor], device: torch.device) -> float:
    begin = time.perf_counter()
    next(steps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def main(arguments: list[str] | None = None) -> int:
    parser = training_runs.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", metavar="B")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--published-limit", type=float, default=120.0, metavar="S")
    options = parser.parse_args(arguments)
    device = training_runs.chosen_device(options)

    def run(folder: Path) -> dict[str, Any]:
        return {
            "batches": [
                measure_batch(
                    batch, device, effort(batch, device, options.rounds), folder,
                    published_limit_s=options.published_limit,
                )
                for batch in options.batches or BATCHES[device.type]
            ]
        }  # fmt: skip

    result = training_runs.measured("end_to_end.py", arguments, device, run)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(result["about"]), end_to_end_table(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
