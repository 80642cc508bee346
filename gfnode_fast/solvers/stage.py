"""One explicit Runge-Kutta step and its adjoint on a buffer of stages.

The buffer is Z (J+1, R, M, C): Z[0] = y0, Z[1 + j] = k_j, so that every point of a step, its end,
its error and its dense output are one row of coefficients times the buffer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.solvers.tableau import Row, Tableau
from gfnode_fast.solvers.transfers import to_device


def flat(buffer: Tensor) -> Tensor:
    """(n, ...) real or complex → (n, X) real, a view."""
    if buffer.is_complex():
        buffer = torch.view_as_real(buffer)
    return buffer.reshape(buffer.shape[0], -1)


def _weights(buffer: Tensor, constant: float, row: Row, step: float) -> Tensor:
    weights = [constant, *(step * c for c in row)]
    return to_device(torch.tensor(weights, dtype=buffer.dtype), buffer.device)


def combine(buffer: Tensor, constant: float, row: Row, step: float) -> Tensor:
    """constant * Z[0] + step * Σ_j row[j] Z[1 + j], shaped like a state."""
    used = flat(buffer[: len(row) + 1])
    out = torch.mv(used.t(), _weights(used, constant, row, step))
    if buffer.is_complex():
        return torch.view_as_complex(out.view(*buffer.shape[1:], 2))
    return out.view(buffer.shape[1:])


def spread(grad_buffer: Tensor, constant: float, row: Row, step: float, grad: Tensor) -> None:
    """Adjoint of `combine`: add grad times its coefficients to the buffer's gradient."""
    used = flat(grad_buffer[: len(row) + 1])
    used.addr_(_weights(used, constant, row, step), flat(grad.contiguous().unsqueeze(0))[0])


def stage_time(tableau: Tableau, stage: int, time: float, step: float, dtype: torch.dtype) -> float:
    """When stage `stage` > 0 is evaluated, rounded as torchdiffeq does in the state's precision.

    Adaptive methods put a stage at the end of the step just before it.
    """
    real = np.float64 if dtype in (torch.float64, torch.complex128) else np.float32
    alpha = tableau.alpha[stage - 1]
    if alpha == 1.0 and tableau.is_adaptive:
        end = real(time + step)
        return float(np.nextafter(end, end - real(1)))
    return float(real(time) + real(alpha) * real(step))


def fill_stages(
    evaluate: Callable[[float, Tensor], Tensor],
    buffer: Tensor,
    tableau: Tableau,
    time: float,
    step: float,
) -> Tensor:
    """Evaluate stages 1 ... J-1 into a buffer that holds y0 and k_0; returns y1 (R, M, C)."""
    point = buffer[0]
    for stage in range(1, tableau.num_stages):
        point = combine(buffer, 1.0, tableau.beta[stage - 1], step)
        when = stage_time(tableau, stage, time, step, buffer.dtype)
        buffer[stage + 1] = evaluate(when, point)
    if tableau.is_adaptive and tableau.ends_on_last_stage:
        return point
    return combine(buffer, 1.0, tableau.solution, step)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Real inner product of two tensors of one shape, 0-dim; complex entries count as pairs."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).sum()
