"""The joint solve in two compiled graphs, one forward and one backward.

A graph is made once per structure of the right-hand side, dtype, device, tableau and tolerances;
batch size, number of times and number of steps are dynamic in it. A batch of one molecule has
graphs of its own, because the compiler takes a size of one as fixed.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config as shape_config
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from gfnode_fast._once import once_differentiable
from gfnode_fast.solvers.errors import SolverError, check_all_times, check_state, check_step
from gfnode_fast.solvers.fixed_step import check_uniform
from gfnode_fast.solvers.rhs import GeneralRHS, LinearRHS, RightHandSide
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.traced import Function, TracedSolve, TracedSteps, canonical
from gfnode_fast.solvers.traced_uniform import TracedUniform


def compile_graph(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    """torch.compile of a method into full graphs, with recompilations counted by itself.

    The compiler files its graphs by code object; `name` makes a new one, so that solves of
    different structure neither guard against nor evict each other.
    """
    plain = method.__func__  # type: ignore[attr-defined]
    code = plain.__code__.replace(co_name=name)
    own = types.FunctionType(code, plain.__globals__, name, plain.__defaults__, plain.__closure__)
    return torch.compile(types.MethodType(own, method.__self__), fullgraph=True)  # type: ignore[attr-defined]


def call_graph(graph: Callable[..., Any], *inputs: Tensor, dynamic: Sequence[int]) -> Any:
    """Call a compiled graph; the first `dynamic[i]` dimensions of input i may change.

    Equal sizes, such as B = T, stay independent of each other.

    Raises:
        RuntimeError: inside a `TorchDispatchMode` that the compiler does not trace under.
    """
    _refuse_dispatch_modes()
    for tensor, count in zip(inputs, dynamic, strict=False):
        for dim in range(count):
            if tensor.shape[dim] > 1:
                torch._dynamo.mark_dynamic(tensor, dim)
    with shape_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        return graph(*inputs)


def _refuse_dispatch_modes() -> None:
    """Under such a mode the compiler passes over the graph's code, and up to torch 2.13 for good:
    later calls would trace into the eager loops (pytorch issue 190286).
    """
    for mode in _get_current_dispatch_mode_stack():
        if not (mode.is_infra_mode() or mode.ignore_compile_internals()):
            raise RuntimeError(
                "propagate: `backend='compiled'` must run outside a TorchDispatchMode, which does "
                f"not see into its graphs, got {type(mode).__name__}; use backend='torch' there"
            )


def function_of(rhs: RightHandSide) -> Function:
    """The right-hand side as a function of (s, y, *parameters) that holds none of them.

    Raises:
        RuntimeError: complex states, which the compiler's code generation does not have.
    """
    if isinstance(rhs, GeneralRHS):
        return rhs.function
    if not isinstance(rhs, LinearRHS) or rhs.weight.is_complex():
        raise RuntimeError(
            "solve_compiled: the right-hand side must be real, got a complex one "
            "(fourier_basis='linear'); use backend='torch'"
        )
    forcing = rhs.forcing

    def linear(s: Tensor, y: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        product = torch.bmm(y.transpose(0, 1), weight).transpose(0, 1)
        return product if forcing is None else product + forcing(s.reshape(-1), *rest)

    return linear


@dataclass(frozen=True)
class _Key:
    """What a pair of graphs is made for."""

    structure: Hashable
    shapes: tuple[torch.Size, ...]
    state: tuple[int, ...]
    is_single: bool
    dtype: torch.dtype
    device: torch.device
    method: str
    numbers: tuple[Hashable, ...]  # tolerances, a step size


class Graphs:
    """The compiled methods of a traced solve."""

    def __init__(self, solve: Any, name: str) -> None:
        self.solve = solve
        self.forward = compile_graph(solve.forward, name)
        self.backward = compile_graph(solve.backward, f"{name}_adjoint")


_GRAPHS: dict[_Key, Graphs] = {}


def graphs_for(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    method: str,
    make: Callable[[Function], object],
    numbers: tuple[Hashable, ...],
) -> Graphs:
    """The graphs of this structure, state and method; made, not yet compiled, when new."""
    modes, batch, components, channels = y0.shape
    function = function_of(rhs)
    key = _Key(
        structure=structure,
        shapes=tuple(p.shape for p in rhs.parameters),
        state=(modes, components, channels),
        is_single=batch == 1,
        dtype=y0.dtype,
        device=y0.device,
        method=method,
        numbers=numbers,
    )
    graphs = _GRAPHS.get(key)
    if graphs is None:
        graphs = _GRAPHS[key] = Graphs(make(function), f"{method}_{len(_GRAPHS)}")
    return graphs


class _CompiledSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, graphs: Graphs, stats: SolveStats, times: Tensor, y0: Tensor, *parameters: Tensor
    ) -> Tensor:
        check_all_times(graphs.solve.tableau.name, times)
        given, y0 = y0, canonical(y0)
        copies = [canonical(p) for p in parameters]
        values, t, dt, y, k, report = call_graph(graphs.forward, y0, times, *copies, dynamic=(1, 2))
        *accepted, done = report.tolist()
        if not done:
            _explain(graphs.solve, y0, t, dt, y, k, times, parameters)
        count = int(sum(accepted))
        if count < len(accepted):
            kept = report.nonzero().flatten()
            t, dt, y, k = (a.index_select(0, kept) for a in (t, dt, y, k))
        stats.evaluations += graphs.solve.evaluations(len(accepted))
        stats.accepted += count
        stats.rejected += len(accepted) - count
        ctx.graphs = graphs
        ctx.save_for_backward(given, times, t, dt, y, k, report[0], *parameters)
        out: Tensor = values
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> Any:
        _, times, t, dt, y, k, first_accepted, *parameters = ctx.saved_tensors
        state = 2 if len(times) > 1 else 1  # rows are molecules times components
        grad_y, *grads = call_graph(
            ctx.graphs.backward,
            canonical(grad_values),
            times,
            t,
            dt,
            y,
            k,
            first_accepted,
            *(canonical(p) for p in parameters),
            dynamic=(2, 2, 1, 1, state, state),
        )
        batch = times.shape[0]
        return None, None, None, grad_y.view(batch, -1, *grad_y.shape[1:]), *grads


def _explain(
    solve: TracedSteps,
    y0: Tensor,
    t: Tensor,
    dt: Tensor,
    y: Tensor,
    k: Tensor,
    times: Tensor,
    parameters: Sequence[Tensor],
) -> None:
    """Raise the SolverError of a solve that stopped before its last time."""
    name, components = solve.tableau.name, y0.shape[1]
    check_state(name, y[0], 0.0, 0.0, components)
    check_state(name, y[-1], t[-1].item(), dt[-1].item(), components)
    if isinstance(solve, TracedSolve):  # the attempt that failed is not among the starts
        for when, step, state, slope in zip(t, dt, y, k, strict=True):
            end, _, _ = solve.attempt(when, step, state, slope, *parameters)
            check_state(name, end, when.item(), step.item(), components)
    check_step(name, t[-1].item(), dt[-1].item())
    raise SolverError(
        f"{name}: the solve must pass the last output time, got s = {t[-1].item():.6g} for "
        f"{times.max().item():.6g}; use backend='torch'",
        time=t[-1].item(),
        step=dt[-1].item(),
        rows=[],
    )


def solve_compiled(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    rtol: float,
    atol: float,
    stats: SolveStats | None = None,
) -> Tensor:
    """`solve_joint` with both directions compiled: the same steps and gradients up to rounding.

    Args:
        rhs: right-hand side, real.
        structure: equal for right-hand sides that differ in the values of their parameters only;
            they share graphs.
        y0: (M, B, D, C) state at s = 0, real.
        times: (B, T) normalised times > 0.
        tableau: an adaptive method.
        rtol, atol: tolerances; the error norm is the RMS over the whole batch state.
        stats: counts evaluations and steps when given.

    Returns:
        (B, T, D, M, C).

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: non-finite state or step underflow.
        RuntimeError: a complex right-hand side; a `TorchDispatchMode`, as of FlopCounterMode, that
            is active here or in backward.

    Notes:
        The first call of a structure compiles for half a minute to minutes, the first backward
        pass too; other batch sizes, times and step counts reuse the graphs, except for a batch of
        one molecule, which has its own. With time_mode posenc or rope the published step control
        amplifies rounding, so that there the result agrees with the published one within the
        tolerances only. Deterministic. Time and memory are linear in B and T; memory is linear in
        the number of steps. Once differentiable, in y0 and the parameters. An outer torch.compile
        leaves its graph for the solve, whose steps are read on the host.
    """

    def make(function: Function) -> TracedSolve:
        return TracedSolve(function, tableau, rtol, atol)

    graphs = graphs_for(rhs, structure, y0, tableau.name, make, (rtol, atol))
    stats = SolveStats() if stats is None else stats
    times = times.detach().double()
    return solve_in_graphs(_CompiledSolve, graphs, stats, times, y0, rhs.parameters)


def solve_compiled_fixed(
    rhs: RightHandSide,
    structure: Hashable,
    y0: Tensor,
    times: Tensor,
    tableau: Tableau,
    step_size: float,
    stats: SolveStats | None = None,
) -> Tensor:
    """`solve_fixed` with both directions compiled, a graph each.

    Args:
        rhs, structure, y0, times: as in `solve_compiled`.
        tableau: a fixed-step method.
        step_size: size of a step in normalised time.
        stats: counts evaluations and steps when given.

    Returns:
        (B, T, D, M, C).

    Raises:
        ValueError: times that are not positive and finite.
        SolverError: non-finite state, or more steps than can be taken.
        RuntimeError: a complex right-hand side.

    Notes:
        Deterministic. O(B (steps + T)), memory too. Once differentiable, in y0 and the parameters.
        Graphs are reused as those of `solve_compiled` are.
    """
    times = times.detach().double()
    check_uniform(times, step_size)

    def make(function: Function) -> TracedUniform:
        return TracedUniform(function, tableau, step_size)

    graphs = graphs_for(rhs, structure, y0, tableau.name, make, (step_size,))
    stats = SolveStats() if stats is None else stats
    return solve_in_graphs(_CompiledSolve, graphs, stats, times, y0, rhs.parameters)


def solve_in_graphs(
    node: type[torch.autograd.Function],
    graphs: Graphs,
    extra: object,
    times: Tensor,
    y0: Tensor,
    parameters: Sequence[Tensor],
) -> Tensor:
    """Values (B, T, D, M, C) of `node`, applied to (graphs, extra, times, y0, *parameters).

    y0 is (M, B, D, C); the node gets it as (B, D, M, C), and gives (B, T, D·M·C).
    """
    modes, batch, components, channels = y0.shape
    num_times = times.shape[1]
    # One time would be a fixed size: read it twice.
    times = times.expand(-1, 2) if num_times == 1 else times
    values: Tensor = _apply(node, graphs, extra, times, y0.permute(1, 2, 0, 3), *parameters)
    return values[:, :num_times].view(batch, num_times, components, modes, channels)


@torch.compiler.disable(reason="steps, counts and norms are read on the host")  # type: ignore[untyped-decorator]
def _apply(
    node: type[torch.autograd.Function],
    graphs: Graphs,
    extra: object,
    times: Tensor,
    *tensors: Tensor,
) -> Any:
    return node.apply(graphs, extra, canonical(times), *tensors)
