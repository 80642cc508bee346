"""The exact solve of linear and affine dynamics in two compiled graphs."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.compiled import Graphs, call_graph, graphs_for, solve_in_graphs
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.exact import HALF, largest_thetas, make_plan
from gfnode_fast.solvers.rhs import LinearRHS, RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.traced import canonical
from gfnode_fast.solvers.traced_exact import TracedExact

THETA = 0.5  # ‖hW‖ that the graphs' degree serves


def _degree(dtype: torch.dtype, affine: bool) -> tuple[int, float]:
    """The lowest degree that serves THETA, and how much it serves."""
    return next(entry for entry in largest_thetas(dtype, affine) if entry[1] >= THETA)


class _CompiledExact(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, substeps: Tensor, times: Tensor, y0: Tensor, *dynamics: Tensor
    ) -> Tensor:
        copies = [canonical(p) for p in dynamics]
        values, starts = call_graph(
            graphs.forward, canonical(y0), times, substeps, *copies, dynamic=(1, 2)
        )
        ctx.graphs = graphs
        ctx.save_for_backward(y0, times, starts, substeps, *dynamics)
        out: Tensor = values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        _, times, starts, substeps, *dynamics = ctx.saved_tensors
        state = 2 if len(times) > 1 else 1  # rows are molecules times components
        grad_y, *grads = call_graph(
            ctx.graphs.backward,
            canonical(grad_values),
            times,
            starts,
            substeps,
            *(canonical(p) for p in dynamics),
            dynamic=(2, 2, state),
        )
        return None, None, None, grad_y.view(times.shape[0], -1, *grad_y.shape[1:]), *grads


def solve_compiled_exact(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    times: Tensor,
    stats: SolveStats | None = None,
) -> Tensor:
    """`solve_exact` with both directions compiled, for a forcing of none or s b.

    Args:
        rhs: a right-hand side that does not mix modes, real.
        structure: as in `solve_compiled`.
        y0: (M, B, D, C) state at s = 0, real.
        times: (B, T) normalised times > 0.
        stats: counts products with W (evaluations) and steps when given.

    Returns:
        (B, T, D, M, C), with the error bounds of `solve_exact`.

    Raises:
        TypeError: a state of half precision.
        ValueError: times that are not positive and finite.
        SolverError: a state or weights that are not finite, or may overflow on the way.
        RuntimeError: complex dynamics, dynamics that mixes modes, or another forcing.

    Notes:
        Deterministic. Steps all have one degree, so that the graphs do not depend on W; memory is
        O(steps B T) for the graph's loop. Once differentiable, in y0 and the parameters. Graphs are
        reused as those of `solve_compiled` are.
    """
    if not isinstance(rhs, LinearRHS) or (rhs.forcing is not None and not rhs.is_proportional):
        raise RuntimeError(
            "solve_compiled_exact: the right-hand side must be linear with a forcing of none or s "
            "b, got another (time_mode mlp, posenc, rope or interacting modes); use "
            "backend='torch'"
        )
    if y0.dtype in HALF:
        raise TypeError(
            f"exact: `y0` must be float32 or float64 with backend='compiled', got {y0.dtype}; use "
            "backend='torch'"
        )
    modes, batch, components, channels = y0.shape
    times = times.detach().double()
    slope = rhs.slope()
    rows = y0.detach().transpose(0, 1).reshape(batch * components, modes, channels)
    plan = make_plan(rows, rhs.weight, slope, times, components)
    if plan.may_overflow:
        raise SolverError(
            f"exact: the powers of W must stay below the largest {y0.dtype}, got a norm of "
            f"{plan.norm:.3g} at s = 0; use backend='torch', which steps around an overflow",
            time=0.0,
            step=1 / plan.substeps,
            rows=[],
        )
    degree, theta = _degree(y0.dtype, slope is not None)
    substeps = max(1, math.ceil(plan.norm / theta))
    graphs = graphs_for(rhs, structure, y0, "exact", lambda _: TracedExact(degree), (degree,))
    if stats is not None:
        steps = max(1, math.ceil(times.max().item() * substeps))
        stats.evaluations += degree * steps
        stats.accepted += steps
    count = torch.full((), substeps, dtype=torch.float64, device=y0.device)
    dynamics = (rhs.weight,) if slope is None else (rhs.weight, slope)
    return solve_in_graphs(_CompiledExact, graphs, count, times, y0, dynamics)
