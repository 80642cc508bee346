"""Linear and affine dynamics at each molecule's own times, without a solver.

    dy/ds = y W + s b,  y(0) = y0

Torch: `gfnode_fast.solvers.exact`. Triton: the whole solve in one launch, degree and number of
steps chosen on the device from the same table of remainder bounds, so that the host never waits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import choose_backend, require_triton
from gfnode_fast.ops.linear_dynamics import check_linear, check_triton, linear_rhs, no_values
from gfnode_fast.ops.mode_rhs_registered import unserved_by_triton
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.exact import (
    MAX_DEGREE,
    MAX_STEPS,
    NORM_SLACK,
    largest_thetas,
    solve_exact,
)
from gfnode_fast.solvers.tableau import kept

NOT_FINITE, BAD_TIME = 1, 2


def propagate_exact(
    y0: Tensor,
    weight: Tensor,
    times: Tensor,
    *,
    slope: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Values of dy/ds = y W + s b at each molecule's times, by truncated exponentials.

    Args:
        y0: (B, M, D, C) state at s = 0: M modes of D components (1, or 3 Cartesian ones) of C
            channels.
        weight: W (M, C, C), dtype and device of y0; y is multiplied from the left.
        times: (B, T) normalised times > 0, floating point.
        slope: b (M, C), or None for linear dynamics.
        backend: "torch", "triton" (fp32 and fp64, C <= 64), or "auto", which is "triton" where
            it serves and has passed on this family of GPU (`dispatch.verified_gpus`), else "torch".

    Returns:
        Values (T, B, M, D, C), and a status (B,) int32: 0, or 1 for a molecule with a value that is
        not finite, 2 for one with a time that is not positive and finite or
        needs more than 100 000 steps. On the CPU the status has
        been looked at, outside of compiled graphs; elsewhere give it to `check_status` where the
        host waits anyway.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not match; on the CPU times that
            are not positive and finite.
        SolverError: on the CPU values that are not finite.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        Errors: at most 1e-6 max(1, ‖sW‖) in fp32 and 1e-13 max(1, ‖sW‖) in fp64, relative to max‖y‖
        along the path. Deterministic. Once differentiable; `times` get no gradient. Triton: a
        molecule's values do not depend on its batch mates, bit for bit, and no launch waits for the
        host.
    """
    check_linear("propagate_exact", y0, weight, times, slope)
    backend, _ = choose_backend(
        "propagate_exact", backend, y0.device, unserved=unserved_by_triton(y0.dtype, y0.shape[3])
    )
    if backend == "torch":
        status = torch.zeros(len(times), dtype=torch.int32, device=y0.device)
        if y0.numel() == 0 or times.numel() == 0:
            return no_values(y0, times, weight, slope), status
        rhs = linear_rhs(weight, slope)
        values = solve_exact(rhs, y0.transpose(0, 1), times, backend="torch")
        return values.permute(1, 0, 3, 2, 4), status
    values, status, _ = exact_on_triton(y0, weight, slope, times)
    if y0.device.type == "cpu" and not torch.compiler.is_compiling():
        check_status(status)
    return values, status


def exact_on_triton(
    y0: Tensor, weight: Tensor, slope: Tensor | None, times: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, status (B,), and the plan (2,) int32: degree and steps per unit of time. Nothing is
    read on the host.
    """
    check_triton("propagate_exact", y0)
    plan = _plan(weight.detach(), slope is not None)
    values, by_row = torch.ops.gfnode_fast.propagate_exact(
        y0, weight, slope, times.to(y0.dtype), plan
    )
    batch, modes, components, _ = y0.shape
    status = by_row.new_zeros(batch)
    if by_row.numel():
        status = by_row.view(-1, batch, components, modes).amax(dim=(0, 2, 3))
    return values, status, plan


def check_status(status: Tensor) -> None:
    """Raise if a solve failed; reads `status` on the host.

    Args:
        status: (B,) int32 from `propagate_exact`.

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: values that are not finite.
    """
    molecules = status.nonzero().flatten().tolist()
    if not molecules:
        return
    shown = f"{molecules[:8]}{' ...' if len(molecules) > 8 else ''}"
    if bool((status == BAD_TIME).any()):
        raise ValueError(
            f"propagate_exact: `times` must be positive, finite and reached in {MAX_STEPS} steps, "
            f"got others in molecule(s) {shown}; time 0 is the given state, and a large ‖sW‖ needs "
            "many steps"
        )
    raise SolverError(
        "propagate_exact: the values must be finite, got others in molecule(s) "
        f"{shown}; lower the learning rate, use float64 or earlier times",
        time=float("nan"),
        step=float("nan"),
        rows=molecules,
    )


@cache  # CUDA graphs have their addresses
@kept()
def _table(dtype: torch.dtype, affine: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Degrees K, and the largest ‖hW‖ that each serves."""
    degrees, thetas = zip(*largest_thetas(dtype, affine), strict=True)
    table = torch.tensor([degrees, thetas], dtype=torch.float64).to(device)
    return table[0], table[1]


@torch.library.custom_op(
    "gfnode_fast::exact_plan", mutates_args=(), schema="(Tensor weight, bool affine) -> Tensor"
)
def _plan(weight: Tensor, affine: bool) -> Tensor:
    """(degree K, steps n per unit of time) as (2,) int32 on the device, from ‖W‖ alone.

    The cheapest entry of the table that the torch path reads on the host. A norm that is not finite
    asks for one step, and the values then show it.
    """
    degree, theta = _table(weight.dtype, affine, weight.device)
    size = weight.abs()
    norms = size.sum(dim=1).amax(dim=1) * size.sum(dim=2).amax(dim=1)
    norm = norms.amax().sqrt().double() * NORM_SLACK
    steps = (norm / theta).ceil().nan_to_num(nan=1.0, posinf=1.0).clamp(1, MAX_STEPS)
    cheapest = (degree * steps + degree / (2 * MAX_DEGREE)).argmin()
    # not an index, which would be read on the host
    plan = torch.stack((degree, steps)).index_select(1, cheapest.view(1))
    return plan.view(2).to(torch.int32)


@_plan.register_fake
def _(weight: Tensor, affine: bool) -> Tensor:
    return torch.empty(2, dtype=torch.int32, device=weight.device)


@torch.library.custom_op(
    "gfnode_fast::propagate_exact",
    mutates_args=(),
    schema="(Tensor y0, Tensor weight, Tensor? slope, Tensor times, Tensor plan) "
    "-> (Tensor, Tensor)",
)
def _propagate_exact(
    y0: Tensor, weight: Tensor, slope: Tensor | None, times: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    from gfnode_fast.kernels.propagate_exact_launch import launch_propagate_exact_fwd

    require_triton("propagate_exact", y0)
    return launch_propagate_exact_fwd(y0, weight, slope, times, plan)


@_propagate_exact.register_fake
def _(
    y0: Tensor, weight: Tensor, slope: Tensor | None, times: Tensor, plan: Tensor
) -> tuple[Tensor, Tensor]:
    from gfnode_fast.kernels.propagate_exact_launch import status_shape

    values = y0.new_empty(times.shape[1], *y0.shape)
    return values, torch.empty(status_shape(y0, times), dtype=torch.int32, device=y0.device)


@torch.library.custom_op(
    "gfnode_fast::propagate_exact_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor y0, Tensor weight, Tensor? slope, Tensor times, Tensor plan) "
    "-> (Tensor, Tensor, Tensor)",
)
def _propagate_exact_bwd(
    grad: Tensor,
    y0: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    times: Tensor,
    plan: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y0, W and b, the last one (M, C) or (0,)."""
    from gfnode_fast.kernels.propagate_exact_launch import launch_propagate_exact_bwd

    return launch_propagate_exact_bwd(grad, y0, weight, slope, times, plan, MAX_DEGREE)


@_propagate_exact_bwd.register_fake
def _(
    grad: Tensor,
    y0: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    times: Tensor,
    plan: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_slope = y0.new_empty(slope.shape if slope is not None else (0,))
    return y0.new_empty(y0.shape), weight.new_empty(weight.shape), grad_slope


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)


def _pull(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grad_y0, grad_weight, grad_slope = _propagate_exact_bwd(grad, *ctx.saved_tensors)
    wants_slope = ctx.needs_input_grad[2]
    return grad_y0, grad_weight, grad_slope if wants_slope else None, None, None


_propagate_exact.register_autograd(_pull, setup_context=_save)
