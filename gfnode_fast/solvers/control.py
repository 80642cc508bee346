"""Step size control of torchdiffeq's adaptive methods: norm, initial step, next step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gfnode_fast.solvers.tableau import Tableau

SAFETY = 0.9
MAX_GROWTH = 10.0
MIN_GROWTH = 0.2
TINY_NORM = 1e-5
TINY_STEP = 1e-6


def rms_norm(y: Tensor) -> Tensor:
    """Root mean square over all entries, 0-dim, real."""
    return y.abs().pow(2).mean().sqrt()


def initial_step(
    rhs: Callable[[Tensor, Tensor], Tensor],
    y0: Tensor,
    f0: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
) -> Tensor:
    """First step size by Hairer, Norsett, Wanner, Solving ODEs I, II.4; 0-dim, differentiable.

    One evaluation of `rhs`, at time h0. Times and steps are float64.
    """
    scale = atol + y0.abs() * rtol
    d0 = rms_norm(y0 / scale)
    d1 = rms_norm(f0 / scale)
    if d0 < TINY_NORM or d1 < TINY_NORM:
        h0 = torch.full_like(d0, TINY_STEP)
    else:
        h0 = 0.01 * d0 / d1
    f1 = rhs(h0, y0 + h0 * f0)
    d2 = rms_norm((f1 - f0) / scale) / h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = torch.maximum(torch.full_like(h0, TINY_STEP), h0 * 1e-3)
    else:
        largest = d2 if d2 > d1 else d1
        h1 = (0.01 / largest) ** (1.0 / tableau.order)
    return torch.minimum(100 * h0, h1).double()


def next_step(step: float, ratio: float, order: int) -> float:
    """Size of the step after one with this error ratio; a constant of the differentiated solve."""
    if ratio == 0:
        return step * MAX_GROWTH
    floor = 1.0 if ratio < 1 else MIN_GROWTH
    growth: float = min(MAX_GROWTH, max(SAFETY / ratio ** (1 / order), floor))
    return step * growth
