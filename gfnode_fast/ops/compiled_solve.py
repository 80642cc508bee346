"""backend="compiled" of the propagation: what can be compiled, and the solve."""

from __future__ import annotations

from torch import Tensor

from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE
from gfnode_fast.solvers.mode import FixedStep, SolverMode
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE, FIXED_GRID, TABLEAUS


def check_compilable(ode: ModeODE) -> None:
    """Refuse what backend="compiled" does not have.

    Raises:
        RuntimeError: the linear (FFT) basis, `no_ode`, or a multistep or implicit solver.
    """
    reason = None
    if ode.no_ode:
        reason = "no_ode=True, which has no solve to compile"
    elif isinstance(ode.ode_func, LinearBasisRHS):
        reason = "fourier_basis='linear', whose complex states cannot be compiled"
    elif ode.solver not in TABLEAUS:
        reason = f"solver={ode.solver!r}, which torchdiffeq runs; choose one of {sorted(TABLEAUS)}"
    if reason is not None:
        raise RuntimeError(
            f"propagate: `backend='compiled'` must have a real Runge-Kutta solve, got {reason}; "
            "or use backend='torch'"
        )


def compiled_solve(
    ode: ModeODE,
    modes: Tensor,
    times: Tensor,
    stats: SolveStats,
    solver_mode: SolverMode = "joint",
) -> Tensor:
    """(M, B, D, C) at s = 0, times (B, T) → (B, T, D, M, C).

    Raises:
        RuntimeError: see `check_compilable`.
        SolverError: non-finite state or step underflow.
    """
    # Here, not above: torch's compiler takes a second to import.
    from gfnode_fast.solvers.compiled import solve_compiled, solve_compiled_fixed
    from gfnode_fast.solvers.compiled_exact import solve_compiled_exact
    from gfnode_fast.solvers.compiled_grid import solve_compiled_grid
    from gfnode_fast.solvers.compiled_per_molecule import solve_compiled_per_molecule

    check_compilable(ode)
    rhs = right_hand_side(ode.ode_func)
    structure = (ode.ode_func.mode_interaction, ode.ode_func.time_mode)
    if solver_mode == "exact":
        return solve_compiled_exact(rhs, structure, modes, times, stats)
    if isinstance(solver_mode, FixedStep):
        fixed, size = FIXED_GRID[ode.solver], solver_mode.step_size
        return solve_compiled_fixed(rhs, structure, modes, times, fixed, size, stats)
    if ode.solver in FIXED_GRID:
        return solve_compiled_grid(rhs, structure, modes, times, FIXED_GRID[ode.solver], stats)
    tableau = ADAPTIVE[ode.solver]
    if solver_mode == "per_molecule":
        return solve_compiled_per_molecule(
            rhs, structure, modes, times, tableau, ode.rtol, ode.atol, stats
        )
    return solve_compiled(rhs, structure, modes, times, tableau, ode.rtol, ode.atol, stats)
