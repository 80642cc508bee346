"""Time embeddings: of output frames (decoder) and of normalised time (right-hand side)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FRAME_PERIOD = 10_000
POSENC_PERIOD = 5_000
TIME_MODES = ("none", "concat", "mlp", "posenc", "rope")


def _frequencies(half: int, period: int, device: torch.device) -> Tensor:
    """f_k = exp(-k ln(period) / (half - 1)), k = 0 ... half-1, in float32 as published."""
    exponent = torch.arange(half, dtype=torch.float32, device=device)
    return torch.exp(exponent * -(math.log(period) / (half - 1)))


def _sin_cos(angle: Tensor, width: int) -> Tensor:
    """[sin, cos] of angles (..., width // 2), zero-padded by one column if `width` is odd."""
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=-1), (0, width % 2))


def frame_embedding(frames: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of raw frame counts, float32 whatever the input dtype.

    Args:
        frames: output times in frames, any shape.
        width: embedding width, at least 4.

    Returns:
        `frames.shape + (width,)`, float32: [sin(t f), cos(t f)], zero-padded by one if `width` is
        odd.
    """
    frequencies = _frequencies(width // 2, FRAME_PERIOD, frames.device)
    return _sin_cos(frames.float().unsqueeze(-1) * frequencies, width)


class SolverTimeEmbedding:
    """Embedding of the solver's scalar normalised time s, the `time_mode` of the right-hand side.

    Parameters, where there are any, belong to the right-hand side that calls it (`time_mlp`).
    """

    def __init__(self, mode: str, width: int) -> None:
        self.mode = mode
        self.width = width

    def __call__(self, s: Tensor, time_mlp: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Embed times `s`, 0-dim or (n,); returns (n, width), n = 1 for a 0-dim one."""
        s = s.reshape(-1, 1)  # with a 0-dim s the angles would be float32 in a float64 model
        if self.mode == "concat":
            return s.expand(-1, self.width)
        if self.mode == "mlp":
            assert time_mlp is not None
            return time_mlp(s)
        angle = POSENC_PERIOD * s * _frequencies(self.width // 2, POSENC_PERIOD, s.device)
        if self.mode == "posenc":
            return _sin_cos(angle, self.width)
        # rope: cos at even, sin at odd positions, stored in float32 as published
        return torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1).float()
