"""What joint solves share: the choice of a backend, torch's way, the operators of Triton's way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import choose_backend, require_triton
from gfnode_fast.ops.joint_start import Dynamics, pull_first_size
from gfnode_fast.ops.joint_status import (
    check_joint_status,
    check_max_attempts,
    finished,
    with_times_checked,
)
from gfnode_fast.ops.linear_dynamics import check_triton, no_values
from gfnode_fast.ops.mode_rhs_registered import unserved_by_triton
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.tableau import ADAPTIVE, Tableau, kept

Launch = Callable[..., tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]]
LaunchBackward = Callable[..., tuple[Tensor, Sequence[Tensor], Tensor]]
Solve = Callable[..., tuple[Tensor, Tensor, Tensor]]

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
    if backend == "triton" and most_modes is not None and y0.shape[1] > most_modes:
        raise ValueError(
            f"{op}: `y0` must have at most {most_modes} modes with backend='triton', got "
            f"{y0.shape[1]}; use backend='torch'"
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
    y0 = y0.transpose(0, 1)
    values = solve_joint(rhs, y0, times, tableau, rtol, atol, backend="torch")
    return values.permute(1, 0, 3, 2, 4), status


def checked_on_cpu(op: str, values: Tensor, status: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
    """Values and status of a Triton solve; on the CPU, outside of compiled graphs, looked at."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        check_joint_status(status, bad, op=op, components=values.shape[3])
    return values, status


def register_solve(
    op: str,
    parameters: str,
    launch: Launch,
    launch_bwd: LaunchBackward,
    dynamics: Callable[..., Dynamics],
) -> Solve:
    """Register the operators `op` and `op`_bwd of a joint solve by Triton.

    Args:
        op: name of the public operation.
        parameters: the dynamics' tensors in the operators' schema.
        launch: (y0, dynamics, times, last time, solver, (rtol, atol), attempts) → values, and the
            steps as `JointSteps`.
        launch_bwd: (grad, steps, dynamics, times, solver) → gradients of y0, of the dynamics, and
            of the first step's size.
        dynamics: the same tensors as `pull_first_size` takes them.

    Returns:
        The solve: (y0, dynamics ..., times, solver, rtol, atol, max_attempts) → values, record (8,)
        and rows that were not finite (B·D,). Nothing is read on the host.
    """
    count = parameters.count(",") + 1
    method = "str solver, float rtol, float atol"
    taken = f"Tensor y0, {parameters}, Tensor times"

    @torch.library.custom_op(
        f"gfnode_fast::{op}",
        mutates_args=(),
        schema=f"({taken}, {method}, int max_attempts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    def solve(y0: Tensor, *given: Any) -> tuple[Tensor, ...]:
        """Values, record; steps and starts, for backward; rows that were not finite."""
        require_triton(op, y0)
        *tensors, times, solver, rtol, atol, attempts = given
        empty = y0.numel() == 0 or times.numel() == 0
        last = times.new_zeros(()) if empty else times.amax()
        tolerances = _tolerances(rtol, atol, y0.device)
        values, solved = launch(
            y0, _dense(tensors), times.contiguous(), last, solver, tolerances, attempts
        )
        record = finished(y0.device) if empty else with_times_checked(solved[0], times, last)
        return values, record, *solved[1:]

    @torch.library.custom_op(
        f"gfnode_fast::{op}_bwd",
        mutates_args=(),
        schema=f"(Tensor grad, {taken}, Tensor record, Tensor steps, Tensor starts, {method}) -> "
        f"({', '.join(['Tensor'] * (count + 1))})",
    )
    def backward(grad: Tensor, y0: Tensor, *given: Any) -> tuple[Tensor, ...]:
        """Gradients of y0 and of the dynamics, (0,) of what is absent."""
        from gfnode_fast.kernels.propagate_joint_launch import JointSteps

        *tensors, times, record, steps, starts, solver, rtol, atol = given
        dense = _dense(tensors)
        solved = JointSteps(record, steps, starts, record.new_empty(0))
        grad_y0, grads, grad_size = launch_bwd(grad, solved, dense, times.contiguous(), solver)
        if grad.numel() == 0:
            return grad_y0, *grads
        # a first step that was rejected leaves its size as a constant to the ones after it
        seed = grad_size.where(record[4] > 0, 0)
        order = ADAPTIVE[solver].order
        more_y0, more = pull_first_size(seed, y0, dynamics(*dense), order, rtol, atol)
        pairs = zip_longest(grads, more)
        return grad_y0 + more_y0, *(a if b is None else a + b for a, b in pairs)

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

    def shapes_bwd(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        of = inputs[: count + 1]
        return tuple(grad.new_empty((0,) if p is None else p.shape) for p in of)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.solver, ctx.rtol, ctx.atol, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:4])

    def pull(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads = backward(grad, *ctx.saved_tensors, ctx.solver, ctx.rtol, ctx.atol)
        wanted = zip(grads, ctx.needs_input_grad, strict=False)
        return *(g if wants else None for g, wants in wanted), None, None, None, None, None

    solve.register_fake(shapes)
    solve.register_autograd(pull, setup_context=save)
    backward.register_fake(shapes_bwd)

    def on_triton(y0: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        check_triton(op, y0)
        *tensors, times, solver, rtol, atol, attempts = given
        values, record, _, _, bad = solve(
            y0, *tensors, times.detach().double(), solver, rtol, atol, attempts
        )
        return values, record, bad

    return on_triton


@cache  # CUDA graphs have their addresses
@kept()
def _tolerances(rtol: float, atol: float, device: torch.device) -> Tensor:
    return torch.tensor([rtol, atol], dtype=torch.float64).to(device)


def _dense(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)
