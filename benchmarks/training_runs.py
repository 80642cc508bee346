"""Runs of `gfnode_fast.train` as the command line calls it, watched through their progress events.

Shared by equivalence.py, end_to_end.py and large_systems.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.formatting import SCHEMA
from gfnode_fast import capture_training_step, train
from gfnode_fast.data import WindowDataset, load_windows
from gfnode_fast.data.trajectory import Trajectory
from gfnode_fast.training import TrainConfig, TrainEvent, TrainResult, load_model


@dataclass
class Watch:
    """A progress callback: when each reading of the losses came, and what it and validations said.

    Losses are read from the device, so that a reading marks the end of its steps there too.
    """

    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    val_mse: list[float] = field(default_factory=list)

    def __call__(self, event: TrainEvent) -> None:
        if event.kind == "train":
            self.steps.append(event.step)
            self.seconds.append(time.perf_counter())
            self.losses.append(event.values["loss"])
        elif event.kind == "validation":
            self.val_mse.append(event.values["val_mse"])

    def step_seconds(self, warm: int = 1) -> list[float]:
        """Mean seconds of a step between successive readings, the first `warm` ones left out."""
        marks = list(zip(self.steps, self.seconds, strict=True))[warm - 1 :]
        return [
            (later - earlier) / (step - before)
            for (before, earlier), (step, later) in itertools.pairwise(marks)
        ]


def watched(config: TrainConfig, wanted: str) -> tuple[Watch, TrainResult]:
    """Train to the end that the configuration sets.

    Raises:
        RuntimeError: the run ended with another status than `wanted`, by a signal for example.
    """
    watch = Watch()
    result = train(config, progress=watch)
    if result.status != wanted:
        raise RuntimeError(
            f"watched: `config` must lead to a run that ends {wanted}, got {result.status} at "
            f"step {result.step}; run it again"
        )
    return watch, result


def bare_step(
    run: str | Path, trajectory: Trajectory, device: torch.device
) -> Callable[[], object]:
    """A training step of a run's own model on one batch of its own windows.

    Forward, backward and update with everything in place beforehand; captured where the run was.
    """
    trained = load_model(run, device=str(device))
    optim = trained.config.optim
    model = trained.model.train()
    windows = load_windows(Path(run) / "windows.json", trajectory)["train"]
    dataset = WindowDataset(trajectory, trained.graph, windows, device=device)
    batch = dataset.batch(torch.arange(min(optim.batch_size, len(dataset)), device=device))
    captured = trained.config.capture
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        fused=True,
        capturable=captured and device.type == "cuda",
    )
    inputs, target = batch.inputs(), batch.target

    def loss_of(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return (outputs[0] - target).square().mean()

    def run_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(model(**inputs), target).backward()
        optimizer.step()

    if not captured:
        return run_step
    step = capture_training_step(
        model, optimizer, loss_fn=loss_of, inputs=inputs, targets=(target,)
    )
    return lambda: step(inputs, target)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that the three scripts share."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    found.add_argument("--json", type=Path, help="where to write the result")
    found.add_argument("--threads", type=int, default=1, help="CPU threads")
    return found


def chosen_device(options: argparse.Namespace) -> torch.device:
    torch.set_num_threads(options.threads)
    return torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def measured(
    script: str,
    arguments: list[str] | None,
    device: torch.device,
    run: Callable[[Path], dict[str, Any]],
) -> dict[str, Any]:
    """What `run` finds, given a folder for its runs, with the head of every result file."""
    given = sys.argv[1:] if arguments is None else arguments
    about = environment.describe(device, ["python", f"benchmarks/{script}", *given])
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gfnode-runs-") as folder:
        found = run(Path(folder))
    about["load_average_at_end"] = [round(load, 2) for load in os.getloadavg()]
    about["minutes"] = round((time.perf_counter() - began) / 60, 1)
    return {"schema": SCHEMA, "kind": Path(script).stem, "about": about, **found}


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
