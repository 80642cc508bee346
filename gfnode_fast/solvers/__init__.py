"""Solvers of the spectral ODE: tableaus, step control, dense output, discrete adjoints.

`solver_mode` of the model chooses among them: `solve_joint` and, for fixed-step methods,
`solve_grid` are the published numbers; `solve_per_molecule`, `solve_exact` and `solve_fixed` are
linear in the batch and give an answer that does not depend on batch mates.
"""

from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.exact import solve_exact
from gfnode_fast.solvers.fixed_step import solve_fixed
from gfnode_fast.solvers.grid import solve_grid
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.mode import FixedStep, SolverMode, fixed
from gfnode_fast.solvers.per_molecule import solve_per_molecule
from gfnode_fast.solvers.rhs import GeneralRHS, LinearRHS, RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE, FIXED_GRID, TABLEAUS, Tableau

__all__ = [
    "ADAPTIVE",
    "FIXED_GRID",
    "TABLEAUS",
    "FixedStep",
    "GeneralRHS",
    "LinearRHS",
    "RightHandSide",
    "SolveStats",
    "SolverError",
    "SolverMode",
    "Tableau",
    "fixed",
    "solve_exact",
    "solve_fixed",
    "solve_grid",
    "solve_joint",
    "solve_per_molecule",
]
