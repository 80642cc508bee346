"""backend="compiled": the eager solves' steps, values and gradients from two full graphs.

Compiling to C++ takes a minute, so the arithmetic is tested with plain loops (`plain`), the graphs
as traced (`traced`), and the generated code by few tests, most of them slow.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gfnode_fast
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.propagator import Propagator
from gfnode_fast.solvers import compiled
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.mode import SolverMode, fixed
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE, FIXED_GRID
from golden_files import relative_error
from model_inputs import constructor
from spectral import outputs_and_gradients, propagator, signals

# Measured: values 2e-15, gradients 3e-15.
BOUND = 1e-8
# Sizes of 20 batches; equal sizes, one time and one molecule included.
SHAPES = [(4, 4), (1, 3), (2, 1), (5, 5), (1, 1)]
SHAPES += [(2 + i % 7, 1 + i % 4) for i in range(20 - len(SHAPES))]

in_graphs = functools.partial(propagate, backend="compiled")


def assert_eager(model: Propagator, given: Any, mode: SolverMode = "joint") -> None:
    stats, expected_stats = SolveStats(), SolveStats()
    eager = functools.partial(propagate, stats=expected_stats, solver_mode=mode)
    graphs = functools.partial(in_graphs, stats=stats, solver_mode=mode)
    expected = outputs_and_gradients(eager, model, *given)
    actual = outputs_and_gradients(graphs, model, *given)
    floor = 1e-3 * max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    for name, value in expected.items():
        assert relative_error(actual[name], value, 0 if name == "output" else floor) < BOUND, name
    if mode == "exact":  # whose graphs take steps of one degree, whatever the norm
        assert stats.evaluations % stats.accepted == 0
    else:
        assert stats == expected_stats


@pytest.fixture(autouse=True)
def fresh_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "_GRAPHS", {})
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be traced runs as it stands."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and run without generating code."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    ("interaction", "time_mode"),
    list(itertools.product(("no_interaction", "attention", "concat"), ("none", "concat", "mlp"))),
)
def test_every_right_hand_side(interaction: str, time_mode: str) -> None:
    model = propagator(mode_interaction=interaction, time_mode=time_mode, solver="bosh3")
    assert_eager(model, signals(components=3))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("solver", [*ADAPTIVE, *FIXED_GRID])
def test_every_solver(solver: str) -> None:
    assert_eager(propagator(solver=solver, time_mode="mlp"), signals(components=3))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("solver", list(ADAPTIVE))
@pytest.mark.parametrize("interaction", ["no_interaction", "attention"])
def test_own_steps(solver: str, interaction: str) -> None:
    model = propagator(solver=solver, mode_interaction=interaction, time_mode="mlp", scale=5.0)
    assert_eager(model, signals(components=3), "per_molecule")


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("solver", list(FIXED_GRID))
@pytest.mark.parametrize("size", [0.07, 0.25, 1.0])
def test_uniform_steps(solver: str, size: float) -> None:
    """A size that divides times among them."""
    signal, times, eigvecs = signals(components=3)
    times[0] = 0.5
    given = (signal, times, eigvecs)
    assert_eager(propagator(solver=solver, time_mode="mlp"), given, fixed(size))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("time_mode", ["none", "concat"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 40.0])
def test_exact(time_mode: str, scale: float) -> None:
    signal, times, eigvecs = signals(components=3)
    given = (signal, times * (0.1 if scale > 1 else 2.0), eigvecs)
    assert_eager(propagator(time_mode=time_mode, scale=scale), given, "exact")


@pytest.mark.usefixtures("plain")
def test_exact_has_no_other_forcing() -> None:
    with pytest.raises(ValueError, match="`time_mode` must be 'none' or 'concat'"):
        in_graphs(propagator(time_mode="mlp"), *signals(), solver_mode="exact")
    with pytest.raises(SolverError, match="backend='torch'"):
        in_graphs(propagator(scale=1e4), *signals(), solver_mode="exact")


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("mode", "solver", "interaction"),
    [
        ("joint", "adaptive_heun", "attention"),
        ("joint", "midpoint", "concat"),
        ("per_molecule", "adaptive_heun", "attention"),
        (fixed(0.2), "midpoint", "attention"),
        ("exact", "dopri5", "no_interaction"),
    ],
    ids=str,
)
def test_one_pair_of_graphs(mode: SolverMode, solver: str, interaction: str) -> None:
    """For all batches and all models of a structure; another pair for a single molecule."""
    for batch, num_times in SHAPES:
        model = propagator(solver=solver, mode_interaction=interaction, seed=batch)
        assert_eager(model, signals(batch=batch, num_times=num_times), mode)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


class Unseeing(TorchDispatchMode):
    supports_higher_order_operators = True  # which graphs as traced still have

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("solver", ["adaptive_heun", "euler"])
def test_dispatch_modes_leave_graphs_usable(solver: str) -> None:
    """Torch's compiler would never again look at code that it met inside one."""
    model = propagator(solver=solver)
    signal, *rest = signals(batch=2)
    refused = "outside a TorchDispatchMode.*FlopCounterMode; use backend='torch'"
    with pytest.raises(RuntimeError, match=refused), FlopCounterMode(display=False):
        in_graphs(model, signal, *rest)
    out = in_graphs(model, signal.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=refused), FlopCounterMode(display=False):
        out.sum().backward()
    for batch in (2, 5):
        assert_eager(model, signals(batch=batch))
    with Unseeing():
        in_graphs(model, signal, *rest)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


def test_graphs_hold_the_products(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []

    def record(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        for module in graph.modules():
            if isinstance(module, torch.fx.GraphModule):
                found.extend(str(node.target) for node in module.graph.nodes)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=record))
    with torch.no_grad():
        in_graphs(propagator(solver="adaptive_heun"), *signals())
    assert sum("bmm" in target for target in found) == 3  # k_0, the first step's, k_1
    assert not any("gfnode" in target for target in found)


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize(
    "changes",
    [{"scale": 0.0}, {"scale": 40.0, "rtol": 1e-2, "atol": 1e-2}, {"num_modes": 1}],
    ids=str,
)
def test_extremes(changes: dict[str, Any]) -> None:
    assert_eager(propagator(solver="bosh3", **changes), signals())


@pytest.mark.usefixtures("plain")
def test_zero_state() -> None:
    signal, times, eigvecs = signals()
    assert_eager(propagator(), (torch.zeros_like(signal), times, eigvecs))


@pytest.mark.usefixtures("plain")
def test_first_step_rejected() -> None:
    """Then no step size carries gradient; fast forcing makes the first guess too long."""
    model = propagator(time_mode="rope", scale=20.0)
    signal, times, eigvecs = signals(batch=2)
    given = (signal, times * 0.03, eigvecs)
    assert_eager(model, given)
    stats = SolveStats()
    in_graphs(model, *given, stats=stats)
    assert (stats.accepted, stats.rejected) == (2, 1)


@pytest.mark.usefixtures("plain")
def test_strides_and_determinism() -> None:
    model = propagator(solver="adaptive_heun")
    signal, times, eigvecs = signals(components=3)
    first = outputs_and_gradients(in_graphs, model, signal, times, eigvecs)
    again = outputs_and_gradients(in_graphs, model, signal, times, eigvecs)
    strided = signal.transpose(0, 3).contiguous().transpose(0, 3)
    other = outputs_and_gradients(in_graphs, model, strided, times.t().contiguous().t(), eigvecs)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert relative_error(other[name], value) < 1e-12, name


@pytest.mark.usefixtures("plain")
def test_failures_are_named() -> None:
    signal, times, eigvecs = signals()
    model = propagator(solver="bosh3")
    signal[1, 2] = math.nan
    with pytest.raises(SolverError, match=r"in molecule\(s\) \[1\]"):
        in_graphs(model, signal, times, eigvecs)
    with pytest.raises(SolverError, match="step"):
        in_graphs(propagator(solver="bosh3", scale=1e200), *signals())
    for mode, solver in (("joint", "midpoint"), (fixed(0.2), "midpoint"), ("per_molecule", "bosh3"),
                         ("exact", "dopri5")):  # fmt: skip
        with pytest.raises(SolverError, match=r"in molecule\(s\) \[1\]"):
            in_graphs(propagator(solver=solver), signal, times, eigvecs, solver_mode=mode)
    with pytest.raises(SolverError, match=r"per_molecule: .* in molecule\(s\)"):
        in_graphs(propagator(scale=1e200), *signals(), solver_mode="per_molecule")
    for mode, solver in (("joint", "bosh3"), ("joint", "midpoint"), (fixed(0.2), "midpoint"),
                         ("per_molecule", "bosh3"), ("exact", "dopri5")):  # fmt: skip
        for bad in (-times, torch.full_like(times, math.nan)):
            with pytest.raises(ValueError, match="`times` must be positive and finite"):
                in_graphs(propagator(solver=solver), *signals()[:1], bad, eigvecs, solver_mode=mode)


@pytest.mark.usefixtures("plain")
def test_second_derivatives_are_refused() -> None:
    signal, times, eigvecs = signals()
    out = in_graphs(propagator(solver="adaptive_heun"), signal.requires_grad_(), times, eigvecs)
    (grad,) = torch.autograd.grad(out.square().sum(), signal, create_graph=True)
    with pytest.raises(RuntimeError, match="for a second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"fourier_basis": "linear"}, "fourier_basis='linear'"),
        ({"no_ode": True}, "no_ode=True"),
        ({"solver": "implicit_adams"}, "solver='implicit_adams'"),
    ],
)
def test_unsupported_combinations_are_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(RuntimeError, match=named):
        gfnode_fast.FourierMD(**constructor(**changes), backend="compiled")


def test_auto_does_not_compile() -> None:
    parts = gfnode_fast.FourierMD(**constructor()).backend_report().parts
    assert "compiled" not in {part.backend for part in parts.values()}


@pytest.mark.parametrize(
    ("mode", "interaction", "solver", "time_mode"),
    [
        ("joint", "no_interaction", "euler", "mlp"),
        pytest.param("joint", "attention", "adaptive_heun", "concat", marks=pytest.mark.slow),
        pytest.param("joint", "concat", "euler", "none", marks=pytest.mark.slow),
        pytest.param(
            "per_molecule", "no_interaction", "adaptive_heun", "concat", marks=pytest.mark.slow
        ),
        pytest.param(fixed(0.2), "no_interaction", "midpoint", "concat", marks=pytest.mark.slow),
        pytest.param("exact", "no_interaction", "dopri5", "concat", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_generated_code(mode: SolverMode, interaction: str, solver: str, time_mode: str) -> None:
    """Every loop, and every right-hand side and forcing in one of them, with the least stages."""
    model = propagator(mode_interaction=interaction, time_mode=time_mode, solver=solver)
    for batch, num_times in [shape for shape in SHAPES if shape[0] > 1]:
        assert_eager(model, signals(batch=batch, num_times=num_times), mode)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
