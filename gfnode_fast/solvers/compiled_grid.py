"""Fixed-step methods on the union of all molecules' times, compiled a piece of the grid at a time.

As in `grid`, the union of the output times is the step grid and memory is O(sqrt(L)): the state at
the start of each piece of sqrt(L) steps is kept, the rest recomputed in backward. One forward and
one backward graph serve all pieces.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.compiled import Graphs, call_graph, graphs_for
from gfnode_fast.solvers.errors import check_all_times, check_state
from gfnode_fast.solvers.rhs import RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.traced import canonical
from gfnode_fast.solvers.traced_grid import TracedGrid


class _Piece(NamedTuple):
    """Grid points of n steps, and which (point, molecule, time slot) are read in it."""

    grid: Tensor  # (n+1,)
    point: Tensor
    molecule: Tensor
    slot: Tensor


def _pieces(times: Tensor) -> Iterator[_Piece]:
    """times (B, T) float64 → pieces of about sqrt(L) steps, in order."""
    union, position = torch.unique(times, sorted=True, return_inverse=True)
    grid = torch.cat((union.new_zeros(1), union))
    position = position.flatten()
    pairs = position.argsort(stable=True)
    ends = [0, *torch.bincount(position).cumsum(0).tolist()]
    length = max(1, round(len(union) ** 0.5))
    for first in range(0, len(union), length):
        last = min(first + length, len(union))
        own = pairs[ends[first] : ends[last]]
        yield _Piece(
            grid[first : last + 1].clone(),
            position[own] - first + 1,
            own // times.shape[1],
            own % times.shape[1],
        )


class _CompiledGridSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, stats: SolveStats, times: Tensor, y0: Tensor, *parameters: Tensor
    ) -> Tensor:
        check_all_times(graphs.solve.tableau.name, times)
        batch = times.shape[0]
        y = canonical(y0)
        copies = [canonical(p) for p in parameters]
        values = y.new_empty(*times.shape, y[0].numel() * (y.shape[0] // batch))
        starts, pieces = [], list(_pieces(times))
        tableau = graphs.solve.tableau
        for piece in pieces:
            starts.append(y)
            states = call_graph(graphs.forward, y, piece.grid, *copies, dynamic=(1, 1))
            by_molecule = states.view(len(states), batch, -1)
            values[piece.molecule, piece.slot] = by_molecule[piece.point, piece.molecule]
            y = states[-1].clone()
            stats.accepted += len(piece.grid) - 1
            stats.evaluations += (len(piece.grid) - 1) * tableau.num_stages
        end = pieces[-1].grid[-1].item()
        check_state(tableau.name, y, end, 0.0, y.shape[0] // batch)
        ctx.graphs, ctx.pieces, ctx.count = graphs, pieces, len(parameters)
        ctx.save_for_backward(y0, *parameters, *starts)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        _, *saved = ctx.saved_tensors
        parameters, starts = saved[: ctx.count], saved[ctx.count :]
        copies = [canonical(p) for p in parameters]
        grad_y = torch.zeros_like(starts[0])
        grads = [torch.zeros_like(p) for p in parameters]
        for piece, y in zip(reversed(ctx.pieces), reversed(starts), strict=True):
            grad_states = y.new_zeros(len(piece.grid), *y.shape)
            grad_states.view(len(piece.grid), len(grad_values), -1).index_put_(
                (piece.point, piece.molecule),
                grad_values[piece.molecule, piece.slot],
                accumulate=True,
            )
            grad_y, *more = call_graph(
                ctx.graphs.backward,
                y,
                piece.grid,
                grad_states,
                grad_y,
                *copies,
                dynamic=(1, 1, 2, 1),
            )
            grads = [a + b for a, b in zip(grads, more, strict=True)]
        return None, None, None, grad_y, *grads


def solve_compiled_grid(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    stats: SolveStats | None = None,
) -> Tensor:
    """`solve_grid` with both directions compiled.

    Args:
        rhs: right-hand side, real.
        structure: as in `solve_compiled`.
        y0: (M, B, D, C) state at s = 0, real.
        times: (B, T) normalised times > 0.
        tableau: a fixed-step method.
        stats: counts evaluations and steps when given.

    Returns:
        (B, T, D, M, C).

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: non-finite state.
        RuntimeError: a complex right-hand side.

    Notes:
        Deterministic. O(L) steps for L united times, as published; memory O(sqrt(L)). Once
        differentiable, in y0 and the parameters. Batch sizes, times and L reuse the graphs; a
        batch of one molecule has its own.
    """
    modes, batch, components, channels = y0.shape
    graphs = graphs_for(
        rhs, structure, y0, tableau.name, lambda function: TracedGrid(function, tableau), ()
    )
    values: Tensor = _solve(
        graphs,
        SolveStats() if stats is None else stats,
        times.detach().double(),
        y0.permute(1, 2, 0, 3).flatten(0, 1),
        rhs,
    )
    return values.view(batch, times.shape[1], components, modes, channels)


@torch.compiler.disable(reason="the union of the times is formed on the host")  # type: ignore[untyped-decorator]
def _solve(
    graphs: Graphs, stats: SolveStats, times: Tensor, rows: Tensor, rhs: RightHandSide
) -> Tensor:
    values: Tensor = _CompiledGridSolve.apply(  # type: ignore[no-untyped-call]
        graphs, stats, times, rows, *rhs.parameters
    )
    return values
