"""Does our model, trained, follow the reference's loss curve within the spread of its seeds?

    python benchmarks/equivalence.py [--device cuda] [--json OUT] [--png FIGURE] [--seeds 5]
                                     [--epochs 6] [--batch 20] [--windows 500] [--lr 1e-4]

For every seed the reference (backend="reference") and each precision of ours start from the same
values and see the same windows in the same order, by the published recipe but for its length and
batch. tf32 and bf16 are the Triton kernels on a GPU; on a CPU they are emulated by rounding the
operands of the same matrix products (rounded.py), and say so.

Per step: mean, range and standard deviation of the reference over the seeds; the largest distance
of ours from the reference of the same seed, and the distance of the means, both in units of that
standard deviation. A precision follows when neither exceeds 1 at any step and the mean of its final
validation errors lies in the reference's range.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import training_runs
from benchmarks.formatting import heading
from benchmarks.rounded import rounded_graph_layers
from benchmarks.training_tables import equivalence_table
from gfnode_fast.training import DataConfig, ModelConfig, OptimConfig, TrainConfig

Curves = NDArray[np.float64]


@dataclass(frozen=True)
class Variant:
    """What is trained: a backend and precision; `emulated` rounds the operands instead."""

    name: str
    backend: str
    precision: str = "fp32"
    emulated: str | None = None


REFERENCE = Variant("reference", "reference")
FAITHFUL = Variant("fp32", "auto")


def variants(device: torch.device, triton: bool) -> list[Variant]:
    """What is trained besides the reference; Triton on GPUs only."""
    if device.type == "cuda":
        kernels = [Variant(f"{p} Triton", "triton", p) for p in ("fp32", "tf32", "bf16")]
        return [FAITHFUL, *kernels] if triton else [FAITHFUL]
    emulated = [Variant(f"{p} emulated", "torch", emulated=p) for p in ("tf32", "bf16")]
    return [FAITHFUL, *emulated]


@dataclass(frozen=True)
class Size:
    """How long, and on what. `model` changes the published sizes, for tests."""

    seeds: int = 5
    epochs: int = 6
    batch: int = 20
    windows: int = 500
    validation: int = 100
    lr: float = 1e-4
    sample: str = "aspirin"
    model: tuple[tuple[str, int], ...] = ()


def config(
    variant: Variant, seed: int, size: Size, device: torch.device, output: Path
) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(
            trajectory=f"sample:{size.sample}", train_size=size.windows,
            val_size=size.validation, test_size=1,
        ),
        model=ModelConfig(
            backend=variant.backend, precision=variant.precision, **dict(size.model)
        ),
        optim=OptimConfig(
            lr=size.lr, batch_size=size.batch, epochs=size.epochs, validate_every=size.epochs,
            seed=seed,
        ),
        output=str(output),
        device=device.type,
        log_every=1,
        checkpoint_every=size.epochs,
    )  # fmt: skip


def curves(
    variant: Variant, size: Size, device: torch.device, folder: Path
) -> tuple[Curves, list[float]]:
    """Losses (seeds, steps), and the final validation error of each seed."""
    losses, errors = [], []
    for seed in range(size.seeds):
        training_runs.progress(f"{variant.name}, seed {seed}")
        output = folder / f"{variant.name.replace(' ', '-')}-{seed}"
        imitation = rounded_graph_layers(variant.emulated) if variant.emulated else nullcontext()
        with imitation:
            watch, _ = training_runs.watched(
                config(variant, seed, size, device, output), "completed"
            )
        losses.append(watch.losses)
        errors.append(watch.val_mse[-1])
    return np.array(losses), errors


def compare(
    ours: Curves, reference: Curves, ours_error: list[float], reference_error: list[float]
) -> dict[str, Any]:
    """Distances of ours from the reference in units of its spread, step by step, and a verdict."""
    spread = reference.std(axis=0, ddof=1)
    same_seed = np.abs(ours - reference).max(axis=0)
    of_means = np.abs(ours.mean(axis=0) - reference.mean(axis=0))
    in_range = (ours.mean(axis=0) >= reference.min(axis=0)) & (
        ours.mean(axis=0) <= reference.max(axis=0)
    )
    error = float(np.mean(ours_error))
    found = {
        "largest_distance": float((same_seed / spread).max()),
        "largest_distance_of_means": float((of_means / spread).max()),
        "largest_relative_distance": float((same_seed / np.abs(reference).max(axis=0)).max()),
        "steps_with_mean_in_range": float(in_range.mean()),
        "final_errors": ours_error,
        "largest_final_distance": float(
            np.abs(np.subtract(ours_error, reference_error)).max() / np.std(reference_error, ddof=1)
        ),
    }
    follows = (
        found["largest_distance"] <= 1
        and found["largest_distance_of_means"] <= 1
        and min(reference_error) <= error <= max(reference_error)
    )
    return {
        "verdict": "follows" if follows else "leaves the spread",
        **found,
        "mean": _digits(ours.mean(axis=0)),
        "distance": _digits(same_seed / spread),
    }


def _digits(values: Curves) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


def measure(
    size: Size, device: torch.device, folder: Path, *, triton: bool = True
) -> dict[str, Any]:
    """Train every variant with every seed and compare."""
    reference, reference_error = curves(REFERENCE, size, device, folder)
    found = {}
    for variant in variants(device, triton):
        ours, error = curves(variant, size, device, folder)
        found[variant.name] = {
            "backend": variant.backend,
            "emulated": variant.emulated is not None,
            **compare(ours, reference, error, reference_error),
        }
    return {
        "size": {
            "seeds": size.seeds, "steps": reference.shape[1], "batch": size.batch,
            "windows": size.windows, "validation_windows": size.validation, "lr": size.lr,
            "sample": size.sample, **dict(size.model),
        },
        "reference": {
            "mean": _digits(reference.mean(axis=0)),
            "min": _digits(reference.min(axis=0)),
            "max": _digits(reference.max(axis=0)),
            "std": _digits(reference.std(axis=0, ddof=1)),
            "final_errors": reference_error,
        },
        "variants": found,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = training_runs.parser(__doc__)
    parser.add_argument("--png", type=Path, help="draw the curves")
    for name, default in (("seeds", 5), ("epochs", 6), ("batch", 20), ("windows", 500)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args(arguments)
    if options.seeds < 2:
        parser.error("--seeds must be at least 2, or there is no spread")
    device = training_runs.chosen_device(options)
    size = Size(options.seeds, options.epochs, options.batch, options.windows, lr=options.lr)
    result = training_runs.measured(
        "equivalence.py", arguments, device, lambda folder: measure(size, device, folder)
    )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.png:
        from benchmarks.equivalence_figure import draw  # matplotlib only where it is asked for

        draw(result, options.png)
    print(heading(result["about"]), equivalence_table(result), sep="\n\n")
    return 0 if all(v["verdict"] == "follows" for v in result["variants"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
