"""Extended XYZ files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gfnode_fast.data.elements import SYMBOLS
from gfnode_fast.data.files import atomic_write

Array = npt.NDArray[Any]


def write_extxyz(
    path: str | Path, positions: Array, numbers: Array, *, infos: Sequence[Mapping[str, object]]
) -> None:
    """Write frames as extended XYZ (opens in ASE and OVITO), atomically.

    Args:
        path: the file.
        positions: (F, N, 3), A.
        numbers: (N,) atomic numbers.
        infos: F dictionaries, the key=value pairs of each frame's comment line.

    Raises:
        ValueError: the three do not fit together.
    """
    positions = np.asarray(positions)
    if positions.ndim != 3 or positions.shape[1:] != (len(numbers), 3):
        raise ValueError(
            f"write_extxyz: `positions` must have shape (F, {len(numbers)}, 3), "
            f"got {positions.shape}; give one row per atom"
        )
    if len(infos) != len(positions):
        raise ValueError(
            f"write_extxyz: `infos` must have one entry for each of {len(positions)} frames, "
            f"got {len(infos)}; give them"
        )
    symbols = [SYMBOLS[int(number) - 1] for number in numbers]
    lines = []
    for frame, info in zip(positions, infos, strict=True):
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in info.items())
        lines += [str(len(symbols)), f'Properties=species:S:1:pos:R:3 pbc="F F F"{pairs}']
        lines += [
            f"{symbol:<2} {x:15.8f} {y:15.8f} {z:15.8f}"
            for symbol, (x, y, z) in zip(symbols, frame.tolist(), strict=True)
        ]
    with atomic_write(path) as stream:
        stream.write(("\n".join(lines) + "\n").encode())


def _quoted(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else str(value)
