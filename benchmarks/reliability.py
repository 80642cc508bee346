"""Training that is killed again and again, and memory over many steps.

    python benchmarks/reliability.py --json benchmarks/results/reliability-cpu.json
    python benchmarks/reliability.py --kills 5 --steps 1000     the short form, which the tests run

A run of the shipped ethanol trajectory, one thread, with everything that a resume has to bring
back: Adam's moments, the average of the weights, warm-up, the VAE's random numbers, validation,
and two checkpoints an epoch. It is killed (SIGKILL) at random moments after training began and
resumed each time; at the end its checkpoints must be, by their SHA-256, those of a run that was
never killed, and its metrics the same numbers. Memory is what the kernel counts as resident.
The exit status is 1 when a run differs or memory grows.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import training_runs
from benchmarks.formatting import heading
from benchmarks.training_tables import reliability_table
from gfnode_fast.training import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    TrainEvent,
    config_to_dict,
    read_metrics,
    train,
)
from gfnode_fast.training.checkpoint import read_checkpoint

STEPS_PER_EPOCH = 8
STEPS_PER_KILL = 24
GROWTH_ALLOWED = 2 << 20  # bytes, from the first half of the steps to the second
READINGS = 20


def config(output: Path, epochs: int, *, every: int = 1) -> TrainConfig:
    """A few steps an epoch; validated, and a checkpoint written, every so many epochs."""
    return TrainConfig(
        data=DataConfig(
            trajectory="sample:ethanol",
            num_timesteps=4,
            delta_frame=100,
            train_size=4 * STEPS_PER_EPOCH,
            val_size=4,
            test_size=4,
        ),
        model=ModelConfig(n_layers=1, hidden_nf=8, num_modes=3, time_emb_dim=4, use_vae=True),
        optim=OptimConfig(
            lr=1e-3,
            batch_size=4,
            epochs=epochs,
            validate_every=every,
            warmup_steps=10,
            clip_norm=1.0,
            ema_decay=0.9,
        ),
        output=str(output),
        device="cpu",
        log_every=3,  # not a divisor of an epoch: readings are pending when a checkpoint is written
        checkpoint_every=every,
    )


def go_on(output: Path, epochs: int, training: Connection) -> None:
    """What is killed: start or resume, and say when training begins."""

    def tell(event: TrainEvent) -> None:
        if event.kind == "start":
            training.send(True)

    torch.set_num_threads(1)
    train(config(output, epochs), resume=(output / "last.json").exists(), progress=tell)


def _start(output: Path, epochs: int) -> ForkServerProcess:
    """A process that trains by now, forked from one that has imported the package and no more."""
    context = multiprocessing.get_context("forkserver")
    # torch imports the second when an optimiser is made.
    context.set_forkserver_preload(["gfnode_fast.training", "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=go_on, args=(output, epochs, sender))
    process.start()
    sender.close()  # so that its end, too, is noticed
    receiver.recv()
    return process


def outcome(run: Path) -> dict[str, Any]:
    """All of a run but its times and its place: hashes of its tensors, its position, its rows."""
    found: dict[str, Any] = {}
    for name in ("last", "best"):
        manifest = read_checkpoint(run / f"{name}.json").manifest
        position = {k: v for k, v in manifest["position"].items() if k != "seconds"}
        found[name] = {"files": manifest["files"], "position": position}
    rows = read_metrics(run)
    found["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    return found


def _is_mid_write(run: Path) -> bool:
    """Whether the last process was killed while it wrote a checkpoint."""
    named = set()
    for name in ("last", "best"):
        if (run / f"{name}.json").exists():
            files = read_checkpoint(run / f"{name}.json").manifest["files"]
            named |= {entry["name"] for entry in files.values()}
    unnamed = {path.name for path in run.glob("*.safetensors")} - named
    return bool(unnamed) or bool(list(run.glob(".*.tmp")))


def killed_run(directory: Path, kills: int, *, seed: int = 0) -> dict[str, Any]:
    """Kill and resume; a run that is complete before all kills is compared, and another begun."""
    epochs = max(1, kills * STEPS_PER_KILL // STEPS_PER_EPOCH)
    duration = train(config(directory / "whole", epochs)).seconds
    expected = outcome(directory / "whole")
    moments = random.Random(seed)
    alive, steps, mid_write, identical = [], [], 0, []
    while True:
        run = directory / f"killed-{len(identical)}"
        process = _start(run, epochs)
        wait = moments.uniform(0, 2 * duration / kills)
        if len(alive) < kills:
            time.sleep(wait)
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            step = read_checkpoint(run / "last.json").manifest["position"]["step"]
            if step < epochs * STEPS_PER_EPOCH:  # else it was complete and about to end
                alive.append(round(wait, 3))
                steps.append(step)
                mid_write += _is_mid_write(run)
            continue
        if process.exitcode != 0:
            raise RuntimeError(f"killed_run: a resumed run ended with {process.exitcode}")
        identical.append(outcome(run) == expected)
        if len(alive) == kills:
            break
    return {
        "kills": kills,
        "seed": seed,
        "steps": epochs * STEPS_PER_EPOCH,
        "config": config_to_dict(config(Path("run"), epochs)),
        "seconds_uninterrupted": round(duration, 1),
        "seconds_alive": alive,
        "step_of_checkpoint": steps,
        "killed_while_writing_a_checkpoint": mid_write,
        "runs": len(identical),
        "sha256": {name: expected[name]["files"]["state"]["sha256"] for name in ("last", "best")},
        "passed": all(identical),
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_run(directory: Path, steps: int) -> dict[str, Any]:
    """Resident memory of one process against steps; validations and checkpoints included."""
    resident: dict[int, int] = {}

    def watch(event: TrainEvent) -> None:
        if event.kind == "validation":
            resident[event.step] = _resident_bytes()

    epochs = steps // STEPS_PER_EPOCH
    every = max(1, epochs // READINGS)
    settings = config(directory / "memory", epochs, every=every)
    seconds = train(settings, progress=watch).seconds
    first = max(size for step, size in resident.items() if step <= steps // 2)
    growth = max(resident.values()) - first
    return {
        "steps": max(resident),
        "config": config_to_dict(replace(settings, output="run")),
        "seconds": round(seconds, 1),
        "resident_bytes": resident,
        "growth_bytes": growth,
        "growth_allowed": GROWTH_ALLOWED,
        "passed": growth < GROWTH_ALLOWED,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)

    def run(folder: Path) -> dict[str, Any]:
        return {
            "memory": memory_run(folder, options.steps),
            "kills": killed_run(folder, options.kills),
        }

    result = training_runs.measured("reliability.py", arguments, torch.device("cpu"), run)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    print(heading(result["about"]), reliability_table(result), sep="\n\n")
    return 0 if result["memory"]["passed"] and result["kills"]["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
