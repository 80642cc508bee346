"""The powers of linear or affine dynamics on a state, which Taylor and Runge-Kutta steps are sums
of.

    y' = y W           P_0 = y, P_{k+1} = P_k W
    y' = y W + s b     the same but P_1 = P_0 W + t b, P_2 = P_1 W + b at the step's start t

P_k is the k-th derivative of the solution through y. A buffer of powers is P (K+1, R, M, C).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.stage import flat


def by_mode(rows: Tensor) -> Tensor:
    """(R, M, C) → (M, R, C), a view that a batched product takes as it is."""
    return rows.transpose(0, 1)


def by_molecule(buffer: Tensor, batch: int) -> Tensor:
    """(K+1, R, M, C) → (B, K+1, X) real, a view: R is B times the components of a molecule."""
    return flat(buffer).view(len(buffer), batch, -1).transpose(0, 1)


def fill(buffer: Tensor, weight: Tensor, slope: Tensor | None, time: float, first: int = 0) -> None:
    """Write the powers after `buffer[first]` from those up to it; `time` is the step's start."""
    for k in range(first, len(buffer) - 1):
        torch.bmm(by_mode(buffer[k]), weight, out=by_mode(buffer[k + 1]))
        if slope is not None and k < 2:
            buffer[k + 1].add_(slope, alpha=time if k == 0 else 1)


def combine(buffer: Tensor, weights: Tensor) -> Tensor:
    """Σ_k weights[k] P_k, shaped like a state."""
    end = torch.mv(flat(buffer).t(), weights)
    if buffer.is_complex():
        return torch.view_as_complex(end.view(*buffer.shape[1:], 2))
    return end.view(buffer.shape[1:])


def pull_readings(weights: Tensor, grad_values: Tensor, like: Tensor) -> Tensor:
    """Gradient of the buffer `like` from that of values (B, T, X) = weights (B, T, K+1) P."""
    pulled = torch.bmm(weights.transpose(1, 2), grad_values).transpose(0, 1).contiguous()
    if like.is_complex():
        return torch.view_as_complex(pulled.view(*like.shape, 2))
    return pulled.view(like.shape)


def pull_back(buffer: Tensor, grad: Tensor, adjoint_weight: Tensor) -> Tensor:
    """Adjoint of `fill`, in place: `grad[0]` becomes that of the state; returns that of W."""
    for k in reversed(range(len(grad) - 1)):
        by_mode(grad[k]).baddbmm_(by_mode(grad[k + 1]), adjoint_weight)
    before = buffer[:-1].flatten(0, 1).permute(1, 2, 0).conj()
    return torch.bmm(before, by_mode(grad[1:].flatten(0, 1)))


def pull_slope(grad: Tensor, time: float) -> Tensor:
    """Gradient (M, C) of b from the pulled back gradient of the powers."""
    ends = grad[1:3].sum(dim=1)
    return ends[1].add(ends[0], alpha=time)
