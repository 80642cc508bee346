"""backend="triton" of the propagation: what the kernels serve, and the solve."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gfnode_fast.ops.joint_operator import FSAL
from gfnode_fast.ops.joint_status import check_joint_status
from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.ops.mode_rhs_folded import fold_attention_in_time
from gfnode_fast.ops.mode_rhs_registered import LARGEST_C
from gfnode_fast.ops.propagate_attention import LARGEST_M, attention_on_triton
from gfnode_fast.ops.propagate_exact import check_status, exact_on_triton
from gfnode_fast.ops.propagate_joint import joint_on_triton
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE
from gfnode_fast.solvers.mode import SolverMode
from gfnode_fast.solvers.rhs import LinearRHS
from gfnode_fast.solvers.stats import Outcome, SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE

SERVED_TIME_MODES = ("none", "concat")
SERVED_INTERACTIONS = ("no_interaction", "attention")


def why_no_triton_solve(ode: ModeODE, solver_mode: SolverMode) -> str | None:
    """What of this solve the Triton kernels do not serve, or None."""
    function = ode.ode_func
    if ode.no_ode:
        return "no_ode=True, which has no solve"
    if isinstance(function, LinearBasisRHS):
        return "fourier_basis='linear', whose states are complex"
    if function.time_mode not in SERVED_TIME_MODES:
        return f"time_mode={function.time_mode!r}, not one of {list(SERVED_TIME_MODES)}"
    if function.mode_interaction not in SERVED_INTERACTIONS:
        return f"mode_interaction={function.mode_interaction!r}, not {list(SERVED_INTERACTIONS)}"
    modes, _, channels = function.weights1.shape
    if channels > LARGEST_C:
        return f"{channels} channels, more than {LARGEST_C}"
    if function.mode_interaction == "attention" and modes > LARGEST_M:
        return f"attention across {modes} modes, more than {LARGEST_M}"
    if solver_mode == "exact":
        return None
    if solver_mode != "joint":
        return f"solver_mode={solver_mode!r}, neither 'joint' nor 'exact'"
    if ode.solver not in FSAL:
        return f"solver={ode.solver!r}, not one of {list(FSAL)}"
    return None


def check_triton_solve(ode: ModeODE, solver_mode: SolverMode) -> None:
    """Refuse what backend="triton" does not have.

    Raises:
        RuntimeError: naming it.
    """
    if reason := why_no_triton_solve(ode, solver_mode):
        raise RuntimeError(
            f"propagate: `backend='triton'` must have kernels for the solve, got {reason}; use "
            "backend='auto' or 'torch'"
        )


def triton_solve(
    ode: ModeODE, modes: Tensor, times: Tensor, stats: SolveStats, solver_mode: SolverMode
) -> Tensor:
    """(M, B, D, C) at s = 0, times (B, T) → (B, T, D, M, C).

    Raises:
        RuntimeError: see `check_triton_solve`; no GPU.
        TypeError, ValueError: a dtype or width that the kernels do not have.
        ValueError, SolverError: on the CPU, times that are not positive and finite, a solve that
            failed. On a GPU `stats` raises them (see there); until then the values are NaN.

    Notes:
        Deterministic. Nothing is read on the host.
    """
    check_triton_solve(ode, solver_mode)
    rhs = right_hand_side(ode.ode_func)
    y0 = modes.transpose(0, 1)
    if isinstance(rhs, LinearRHS) and solver_mode == "exact":
        values = _solve_exact(rhs, y0, times, stats)
        return values.permute(1, 0, 3, 2, 4)
    method = (ode.solver, ode.rtol, ode.atol)
    if isinstance(rhs, LinearRHS):
        values, record, bad = joint_on_triton(y0, rhs.weight, rhs.slope(), times, *method)
    else:
        weight, *mixer = rhs.parameters
        folded = fold_attention_in_time(weight, y0.shape[3], *mixer)
        values, record, bad = attention_on_triton(y0, *folded, times, *method)
    _expect(stats, record, partial(_joint_outcome, ode.solver, y0.shape[2], bad))
    return values.permute(1, 0, 3, 2, 4)


def _solve_exact(rhs: LinearRHS, y0: Tensor, times: Tensor, stats: SolveStats) -> Tensor:
    """Values (T, B, M, D, C)."""
    values, status, plan = exact_on_triton(y0, rhs.weight, rhs.slope(), times)
    if values.numel():
        last = times.detach().double().amax().view(1)
        _expect(stats, torch.cat((plan.double(), last, status.double())), _exact_outcome)
    return values


def _expect(stats: SolveStats, report: Tensor, outcome: Outcome) -> None:
    if not torch.compiler.is_compiling():  # in a graph nobody waits: values say it by NaN
        stats.expect(report, outcome)


def _exact_outcome(report: list[float]) -> tuple[int, int, int]:
    """Products and steps, from (degree, steps per unit of time, last time, status (B,))."""
    degree, per_time, last, *status = report
    check_status(torch.tensor(status, dtype=torch.int32))
    steps = math.ceil(per_time * last)
    return int(degree) * steps, steps, 0


def _joint_outcome(
    solver: str, components: int, bad: Tensor, record: list[float]
) -> tuple[int, int, int]:
    """Counts of the published solver, whose initial step costs two evaluations."""
    status = torch.tensor(record, dtype=torch.float64)
    check_joint_status(status, bad, op="propagate", components=components)
    accepted, attempts = int(record[2]), int(record[5])
    evaluations = 2 + attempts * (ADAPTIVE[solver].num_stages - 1) if attempts else 0
    return evaluations, accepted, attempts - accepted
