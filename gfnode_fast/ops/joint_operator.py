"""What the operators of joint solves share: the choice of a backend, torch's way, registration.

An operator takes (y0, dynamics ..., times, solver, rtol, atol, max_attempts) and gives values
(T, B, M, D, C), record (8,), steps and starts (for backward), and rows that were not finite; its
backward operator takes (grad, y0, dynamics ..., times, record, steps, starts, solver, rtol, atol)
and gives the gradients of y0 and of the dynamics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import choose_backend
from gfnode_fast.ops.joint_status import (
    check_joint_status,
    check_max_attempts,
    finished,
    with_times_checked,
)
from gfnode_fast.ops.linear_dynamics import no_values
from gfnode_fast.ops.mode_rhs_registered import unserved_by_triton
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.tableau import ADAPTIVE, Tableau

FSAL = tuple(name for name, tableau in ADAPTIVE.items() if tableau.ends_on_last_stage)


def choose_solve(
    op: str,
    requested: str,
    y0: Tensor,
    solver: str,
    max_attempts: int,
    most_modes: int | None = None,
) -> str:
    """The backend of a joint solve; refuses methods that are not adaptive or not served.

    `most_modes`: of the Triton kernels, if they have a limit.
    """
    if solver not in ADAPTIVE:
        raise ValueError(
            f"{op}: `solver` must be one of {', '.join(ADAPTIVE)}, got {solver!r}; choose an "
            "adaptive method"
        )
    unserved = unserved_by_triton(y0.dtype, y0.shape[3])
    if most_modes is not None and y0.shape[1] > most_modes:
        unserved = f"the Triton kernels serve at most {most_modes} modes, not {y0.shape[1]}"
    if solver not in FSAL:
        unserved = f"the Triton kernels serve {', '.join(FSAL)}, not {solver}"
    backend, _ = choose_backend(op, requested, y0.device, unserved=unserved)
    if backend == "triton" and solver not in FSAL:
        raise ValueError(
            f"{op}: `solver` must be one of {', '.join(FSAL)} with backend='triton', got "
            f"{solver!r}; use backend='torch'"
        )
    check_max_attempts(op, max_attempts)
    return backend


def joint_on_torch(
    op: str,
    rhs: RightHandSide,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
) -> tuple[Tensor, Tensor]:
    """Values (T, B, M, D, C) by `solve_joint`, and the record of a solve that arrived."""
    status = finished(y0.device)
    if y0.numel() == 0 or times.numel() == 0:
        return no_values(y0, times, *rhs.parameters), status
    last = times.detach().double().amax()
    check_joint_status(with_times_checked(status, times, last), op=op)
    values = solve_joint(rhs, y0.transpose(0, 1), times, tableau, rtol, atol)
    return values.permute(1, 0, 3, 2, 4), status


def checked_on_cpu(op: str, values: Tensor, status: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Values and status of a Triton solve; on the CPU, outside of compiled graphs, looked at."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        check_joint_status(status, bad, op=op, components=values.shape[3])
    return values, status


def register_solve(operator: Any, backward: Any) -> None:
    """Give a solve's operator its shapes and its gradient, by the operator `backward`."""

    def shapes(y0: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        *_, times, _, _, _, max_attempts = inputs
        batch, modes, components, channels = y0.shape
        return (
            y0.new_empty(times.shape[1], *y0.shape),
            times.new_empty(8),
            times.new_empty(max_attempts, 2),
            y0.new_empty(max_attempts + 1, batch * components, modes, channels),
            torch.empty(batch * components, dtype=torch.int32, device=y0.device),
        )

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.solver, ctx.rtol, ctx.atol, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:4])

    def pull(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad, *ctx.saved_tensors, ctx.solver, ctx.rtol, ctx.atol)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if wants else None for g, wants in wanted), None, None, None, None, None

    operator.register_fake(shapes)
    operator.register_autograd(pull, setup_context=save)
