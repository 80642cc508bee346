"""Reading tests/golden: what the published model really printed (see tests/golden/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.stem for path in GOLDEN.glob("*.npz"))


@dataclass(frozen=True)
class Golden:
    config: dict
    arrays: dict[str, np.ndarray]

    def group(self, prefix: str) -> dict[str, Tensor]:
        start = len(prefix) + 1
        return {
            key[start:]: torch.from_numpy(np.array(value))
            for key, value in self.arrays.items()
            if key.startswith(prefix + "/")
        }

    def inputs(self) -> dict[str, Tensor]:
        return self.group("input")

    def constructor(self) -> dict:
        kwargs = dict(self.config["constructor"])
        return kwargs | {"activation": getattr(nn, kwargs["activation"])()}


def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = dict(file)
    return Golden(json.loads(str(arrays.pop("config"))), arrays)


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """‖a - b‖ / max(‖b‖, floor), 0 when both vanish."""
    actual, expected = (x.detach().double().cpu() for x in (actual, expected))
    scale = max(expected.norm().item(), floor)
    difference = (actual - expected).norm().item()
    return difference if scale == 0 else difference / scale
