"""backend="triton" of the propagation: what the kernels serve, and the solve."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gfnode_fast.ops.joint_operator import FSAL
from gfnode_fast.ops.joint_status import (
    MAX_ATTEMPTS,
    attempts_to_launch,
    check_joint_status,
    ran_out,
)
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
    ode: ModeODE,
    modes: Tensor,
    times: Tensor,
    stats: SolveStats,
    solver_mode: SolverMode,
    max_attempts: int | None = None,
) -> Tensor:
    """(M, B, D, C) at s = 0, times (B, T) → (B, T, D, M, C).

    Args:
        max_attempts: how many step attempts a joint solve launches, those after its end costing a
            launch each; None follows what earlier solves with these `stats` took.

    Raises:
        RuntimeError: see `check_triton_solve`; no GPU.
        TypeError, ValueError: a dtype or width that the kernels do not have.
        ValueError, SolverError: on the CPU, times that are not positive and finite, a solve that
            failed. On a GPU `stats` raises them (see there); until then the values are NaN.

    Notes:
        Deterministic: values do not depend on the number of attempts. Without `max_attempts` the
        first joint solve with these `stats` is read on the host, where kernels are being compiled
        anyway, and solved again with more attempts as long as it runs out of them. Later ones have
        twice as many as the longest so far took; a GPU reads nothing on the host then, nor in a
        captured graph, which has as many as are known when it is captured. In graphs of
        torch.compile there are `MAX_ATTEMPTS`.
    """
    check_triton_solve(ode, solver_mode)
    rhs = right_hand_side(ode.ode_func)
    y0 = modes.transpose(0, 1)
    if isinstance(rhs, LinearRHS) and solver_mode == "exact":
        values = _solve_exact(rhs, y0, times, stats)
        return values.permute(1, 0, 3, 2, 4)
    method = (ode.solver, ode.rtol, ode.atol)
    if isinstance(rhs, LinearRHS):
        solve = partial(joint_on_triton, y0, rhs.weight, rhs.slope(), times, *method)
    else:
        weight, *mixer = rhs.parameters
        folded = fold_attention_in_time(weight, y0.shape[3], *mixer)
        solve = partial(attention_on_triton, y0, *folded, times, *method)
    learns = max_attempts is None and not torch.compiler.is_compiling()
    attempts = max_attempts or (stats.launches if learns else 0) or MAX_ATTEMPTS
    values, record, bad = solve(attempts)
    if learns and _may_read(record, stats):
        while ran_out(read := record.tolist()):
            _learn(read, stats)
            values, record, bad = solve(stats.launches)
        _learn(read, stats)
    outcome = partial(_joint_outcome, ode.solver, y0.shape[2], bad, stats if learns else None)
    _expect(stats, record, outcome)
    return values.permute(1, 0, 3, 2, 4)


def _may_read(record: Tensor, stats: SolveStats) -> bool:
    """Whether to wait for a solve: on the CPU, and on a GPU for the first one."""
    if not record.is_cuda:
        return True
    return stats.launches == 0 and not torch.cuda.is_current_stream_capturing()


def _learn(record: list[float], stats: SolveStats) -> None:
    stats.launches = max(stats.launches, attempts_to_launch(record))


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
    solver: str, components: int, bad: Tensor, learning: SolveStats | None, record: list[float]
) -> tuple[int, int, int]:
    """Counts of the published solver, whose initial step costs two evaluations."""
    if learning is not None:
        _learn(record, learning)
    status = torch.tensor(record, dtype=torch.float64)
    check_joint_status(
        status, bad, op="propagate", components=components, learns=learning is not None
    )
    accepted, attempts = int(record[2]), int(record[5])
    evaluations = 2 + attempts * (ADAPTIVE[solver].num_stages - 1) if attempts else 0
    return evaluations, accepted, attempts - accepted
