"""What of solves C++ serves: linear and affine dynamics from its powers (`solvers/powers.py`)."""

from __future__ import annotations

import torch

from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE
from gfnode_fast.solvers.mode import SolverMode
from gfnode_fast.solvers.powers import why_not_compiled
from gfnode_fast.solvers.tableau import ADAPTIVE


def why_no_cpp_solve(
    ode: ModeODE, solver_mode: SolverMode, device: torch.device, dtype: torch.dtype
) -> str | None:
    """What of a solve there is no C++ for, or None; `dtype` is that of the parameters."""
    function = ode.ode_func
    if ode.no_ode:
        return "nothing is solved"
    if isinstance(function, LinearBasisRHS):
        return "the state is complex"
    if function.mode_interaction != "no_interaction":
        return "modes interact"
    if solver_mode == "joint":
        if ode.solver not in ADAPTIVE or not ADAPTIVE[ode.solver].ends_on_last_stage:
            return f"solver={ode.solver!r} goes stage by stage"
        if function.time_mode not in ("none", "concat"):
            return f"time_mode={function.time_mode!r} goes stage by stage"
    elif solver_mode != "exact":
        return f"solver_mode={solver_mode!r} goes stage by stage"
    return why_not_compiled(device, dtype)


def check_cpp_solve(
    op: str, ode: ModeODE, solver_mode: SolverMode, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise RuntimeError unless C++ serves this solve."""
    if problem := why_no_cpp_solve(ode, solver_mode, device, dtype):
        raise RuntimeError(
            f"{op}: `backend` must be one that serves this solve, got 'cpp'; no C++ kernel: "
            f"{problem}; use backend='torch'"
        )
