"""The part of gpu_acceptance.py that trains: loops end to end, large systems, loss curves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import end_to_end, equivalence, large_systems
from benchmarks.training_tables import TABLES

TINY_MODEL: tuple[tuple[str, int], ...] = (("n_layers", 1), ("hidden_nf", 8), ("time_emb_dim", 4))
END_TO_END, LARGE, TRITON, CURVES = (
    "end_to_end", "large_systems", "large_systems Triton", "equivalence",
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
    else:
        batches = {b: end_to_end.effort(b, device, 3) for b in end_to_end.BATCHES[device.type]}
        molecule, limit_s = "aspirin", 60.0
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

    def curves() -> dict[str, Any]:
        return equivalence.measure(short, device, folder / "curves", triton=triton)

    found: dict[str, Piece] = {
        END_TO_END: (200.0, loops),
        LARGE: (60.0, lambda: systems("auto")),
        CURVES: (180.0, curves),
        TRITON: (60.0, lambda: systems("triton")),
    }
    if device.type != "cuda" or not triton:
        del found[TRITON]
    return found


def summaries(result: dict[str, Any]) -> list[str]:
    """The tables of the pieces that were measured."""
    return [
        f"{name}:\n\n{TABLES[name.split()[0]](result[name])}"
        for name in (END_TO_END, LARGE, TRITON, CURVES)
        if name in result
    ]
