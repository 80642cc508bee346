"""The published gradient through the initial step's size, without reading the host.

The size is min(100 h0, h1) with h0 = 0.01 d0 / d1 and h1 = (0.01 / max(d1, d2))^(1/order); d_i is
the RMS of y, f0 = g(0, y) and (g(h0, y + h0 f0) - f0) / h0 over atol + rtol |y|; a constant where
these are tiny (`gfnode_fast.solvers.control.initial_step`).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gfnode_fast.solvers.control import TINY_NORM, TINY_STEP


class Dynamics(Protocol):
    """dy/ds = g(s, y) and its adjoint, without autograd; s is 0-dim float64."""

    def evaluate(self, s: Tensor, y: Tensor) -> Tensor:
        """g(s, y), shaped like y."""

    def pull(self, s: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Gradients of y, of s (0-dim) and of the parameters, for `grad` of g(s, y)."""


def _rms(q: Tensor) -> Tensor:
    return q.double().square().mean().sqrt()


def pull_first_size(
    grad_size: Tensor, y0: Tensor, dynamics: Dynamics, order: int, rtol: float, atol: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Gradients of y0 and of the parameters from `grad_size`, that of the first step's size."""
    zero = torch.zeros_like(grad_size)
    scale = atol + rtol * y0.abs()
    f0 = dynamics.evaluate(zero, y0)
    q0, q1 = y0 / scale, f0 / scale
    d0, d1 = _rms(q0), _rms(q1)
    tiny = (d0 < TINY_NORM) | (d1 < TINY_NORM)
    safe_d1 = d1.where(~tiny, 1)
    h0 = (0.01 * d0 / safe_d1).where(~tiny, TINY_STEP)
    h = h0.to(y0.dtype)
    point = y0 + h * f0
    q2 = (dynamics.evaluate(h0, point) - f0) / (h * scale)
    d2 = _rms(q2)

    still = (d1 <= 1e-15) & (d2 <= 1e-15)
    largest = torch.where(d2 > d1, d2, d1).where(~still, 1)
    h1 = (0.01 / largest) ** (1.0 / order)
    takes_h1 = (h1 < 100 * h0) & ~still
    of_largest = (-grad_size * h1 / (order * largest)).where(takes_h1, 0)
    grad_h0 = (100 * grad_size).where((100 * h0 < h1) & ~still, 0)
    grad_d1, grad_d2 = of_largest.where(d2 <= d1, 0), of_largest.where(d2 > d1, 0)

    def of_scaled(q: Tensor, norm: Tensor, grad: Tensor) -> Tensor:
        factor = (grad / (norm * q.numel())).where(norm > 0, 0)
        return factor.to(q.dtype) * q

    of_q2 = of_scaled(q2, d2, grad_d2)
    grad_f1 = of_q2 / (h * scale)
    grad_point, grad_s, of_f1 = dynamics.pull(h0, point, grad_f1)
    grad_h0 = grad_h0 + grad_s - grad_d2 * d2 / h0 + (grad_point * f0).sum().double()
    grad_h0 = grad_h0.where(~tiny, 0)
    of_q0 = of_scaled(q0, d0, 0.01 * grad_h0 / safe_d1)
    of_q1 = of_scaled(q1, d1, grad_d1 - 0.01 * grad_h0 * d0 / safe_d1**2)
    grad_f0 = of_q1 / scale - grad_f1 + h * grad_point
    grad_y0, _, of_f0 = dynamics.pull(zero, y0, grad_f0)
    grad_scale = -(of_q0 * q0 + of_q1 * q1 + of_q2 * q2) / scale
    grad_y0 = grad_y0 + grad_point + of_q0 / scale + rtol * y0.sign() * grad_scale
    return grad_y0, tuple(a + b for a, b in zip(of_f0, of_f1, strict=True))


class AffineDynamics:
    """dy/ds = y W + s b of states (B, M, D, C)."""

    def __init__(self, weight: Tensor, slope: Tensor | None) -> None:
        self.weight = weight
        self.slope = slope

    def evaluate(self, s: Tensor, y: Tensor) -> Tensor:
        product = torch.matmul(y, self.weight)
        if self.slope is None:
            return product
        return product + s.to(y.dtype) * self.slope.unsqueeze(1)

    def pull(self, s: Tensor, y: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        grad_y = torch.matmul(grad, self.weight.transpose(1, 2))
        before, after = (x.transpose(0, 1).flatten(1, 2) for x in (y, grad))
        grad_weight = torch.bmm(before.transpose(1, 2), after)
        if self.slope is None:
            return grad_y, torch.zeros_like(s), (grad_weight,)
        summed = after.sum(1)
        grad_s = (summed * self.slope).sum().to(s.dtype)
        return grad_y, grad_s, (grad_weight, s.to(y.dtype) * summed)
