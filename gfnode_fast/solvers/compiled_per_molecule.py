"""The solve with each molecule's own steps in two compiled graphs, one forward and one backward."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.compiled import Graphs, call_graph, graphs_for, solve_in_graphs
from gfnode_fast.solvers.errors import check_all_times
from gfnode_fast.solvers.per_molecule import Method, check_molecules, refuse_step
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.traced import Function, canonical
from gfnode_fast.solvers.traced_per_molecule import TracedPerMolecule


class _CompiledPerMolecule(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, stats: SolveStats, times: Tensor, y0: Tensor, *parameters: Tensor
    ) -> Tensor:
        copies = [canonical(p) for p in parameters]
        values, time, step, y, k, accepted, summary = call_graph(
            graphs.forward, canonical(y0), times, *copies, dynamic=(1, 2)
        )
        done, taken, refused = summary.tolist()
        if not done:
            _explain(graphs.solve, time, step, y, k, times, copies)
        solve: TracedPerMolecule = graphs.solve
        stats.evaluations += 2 + (len(accepted) - 1) * (solve.tableau.num_stages - 1)
        stats.accepted += int(taken)
        stats.rejected += int(refused)
        ctx.graphs = graphs
        ctx.save_for_backward(y0, times, time, step, y, k, accepted, *parameters)
        out: Tensor = values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        _, times, time, step, y, k, accepted, *parameters = ctx.saved_tensors
        state = 2 if len(times) > 1 else 1  # rows are molecules times components
        grad_y, *grads = call_graph(
            ctx.graphs.backward,
            canonical(grad_values),
            times,
            time,
            step,
            y,
            k,
            accepted,
            *(canonical(p) for p in parameters),
            dynamic=(2, 2, 2, 2, state, state, 2),
        )
        return None, None, None, grad_y.view(times.shape[0], -1, *grad_y.shape[1:]), *grads


def _explain(
    solve: TracedPerMolecule,
    time: Tensor,
    step: Tensor,
    y: Tensor,
    k: Tensor,
    times: Tensor,
    parameters: list[Tensor],
) -> None:
    """Raise the SolverError of a solve that stopped before its last time."""
    last = times.amax(dim=1)
    everyone = torch.ones_like(last, dtype=torch.bool)
    check_molecules(solve.method, y[0], time[0], torch.zeros_like(last), everyone)
    if len(time) > 1:
        before = time[-2], step[-2]
        end, _ = solve.attempt(*before, y[-2], k[-2], *parameters)
        check_molecules(solve.method, end, *before, time[-2] < last)
    refuse_step(time[-1], step[-1], (time[-1] < last) & ~(step[-1] > 0))


def solve_compiled_per_molecule(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
    stats: SolveStats | None = None,
) -> Tensor:
    """`solve_per_molecule` with both directions compiled.

    Args:
        rhs, structure: as in `solve_compiled`.
        y0: (M, B, D, C) state at s = 0, real.
        times: (B, T) normalised times > 0.
        tableau, rtol, atol, stats: as in `solve_per_molecule`.

    Returns:
        (B, T, D, M, C).

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: non-finite state or step underflow.
        RuntimeError: a complex right-hand side.

    Notes:
        Deterministic. Once differentiable, in y0 and the parameters. Graphs are reused as those of
        `solve_compiled` are.
    """
    components = y0.shape[2]
    times = times.detach().double()
    check_all_times("per_molecule", times)

    def make(function: Function) -> TracedPerMolecule:
        return TracedPerMolecule(function, Method(tableau, rtol, atol, components))

    graphs = graphs_for(rhs, structure, y0, tableau.name, make, ("per_molecule", rtol, atol))
    stats = SolveStats() if stats is None else stats
    return solve_in_graphs(_CompiledPerMolecule, graphs, stats, times, y0, rhs.parameters)
