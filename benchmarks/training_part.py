"""The part of gpu_acceptance.py that trains: loops end to end, large systems, loss curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end, equivalence, large_systems, mixed
from benchmarks.training_tables import TABLES
from gfnode_fast.training import ModelConfig

TINY_MODEL: tuple[tuple[str, int], ...] = (("n_layers", 1), ("hidden_nf", 8), ("time_emb_dim", 4))
END_TO_END, LARGE, TRITON, MIXED, CURVES = (
    "end_to_end", "large_systems", "large_systems Triton", "mixed", "equivalence",
)  # fmt: skip

Piece = tuple[float, Callable[[], dict[str, Any]]]


def pieces(device: torch.device, folder: Path, *, dry: bool, triton: bool) -> dict[str, Piece]:
    """What to measure by name, most important first, each with the seconds it may take.

    Estimated: the published recipe takes about 0.5 s a step at B = 50 and 10 s at 4096 on a GPU.
    """
    if dry:
        much = end_to_end.Effort(log_every=1, readings=1, rounds=1)
        batches, molecule, limit_s = {2: much}, "ethanol", 60.0
        sizes, large = (42,), large_systems.Size(batch=1, steps=1, warm=0, model=TINY_MODEL)
        short = equivalence.Size(
            seeds=2, epochs=1, batch=2, windows=4, validation=2, sample="ethanol", model=TINY_MODEL
        )
        mixtures, shape, rounds, each_s = (4,), ModelConfig(**dict(TINY_MODEL)), 1, 0.0
    else:
        batches = {b: end_to_end.effort(b, device, 2) for b in end_to_end.BATCHES[device.type]}
        molecule, limit_s = "aspirin", 25.0
        shape = ModelConfig(backend="triton" if triton else "auto")
        mixtures, rounds, each_s = (50, 512, 4096), 7, 1.0
        sizes, large = large_systems.SIZES, large_systems.Size(batch=64)
        short = equivalence.Size(epochs=2)

    def loops() -> dict[str, Any]:
        rows = [
            end_to_end.measure_batch(
                batch, device, much, folder / "loops", published_limit_s=limit_s,
                molecule=molecule, triton=triton,
            )
            for batch, much in batches.items()
        ]  # fmt: skip
        return {"batches": rows}

    def systems(backend: str) -> dict[str, Any]:
        return large_systems.measure(sizes, large, device, folder / backend, backend=backend)

    def mixtures_of_two() -> dict[str, Any]:
        return mixed.measure(mixtures, device, shape, rounds=rounds, seconds_each=each_s)

    def curves() -> dict[str, Any]:
        return equivalence.measure(short, device, folder / "curves", triton=triton)

    found: dict[str, Piece] = {
        END_TO_END: (130.0, loops),
        MIXED: (30.0, mixtures_of_two),
        TRITON: (50.0, lambda: systems("triton")),
        LARGE: (50.0, lambda: systems("auto")),
        CURVES: (120.0, curves),
    }
    if device.type != "cuda" or not triton:
        del found[TRITON]
    return found


def summaries(result: dict[str, Any]) -> list[str]:
    """The tables of the pieces that were measured."""
    return [
        f"{name}:\n\n{TABLES[name.split()[0]](result[name])}"
        for name in (END_TO_END, MIXED, LARGE, TRITON, CURVES)
        if name in result
    ]
