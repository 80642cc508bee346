"""The published solve: equal steps, values and gradients, for every method and right-hand side."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.propagator import Propagator
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.published import integrate_published
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE, DOPRI5, FIXED_GRID
from golden_files import relative_error
from spectral import outputs_and_gradients, propagator, published, signals

INTERACTIONS = ("no_interaction", "attention", "concat")
TIME_MODES = ("none", "concat", "mlp", "posenc", "rope")
# Measured: values 4e-15, gradients 3e-13 (a thousandfold margin for other BLAS libraries).
VALUES, GRADIENTS = 1e-10, 1e-9


def assert_published(model: Propagator, given: Any) -> None:
    expected = outputs_and_gradients(published, model, *given)
    actual = outputs_and_gradients(propagate, model, *given)
    floor = 1e-3 * max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    for name, value in expected.items():
        bound = VALUES if name == "output" else GRADIENTS
        assert relative_error(actual[name], value, 0 if name == "output" else floor) < bound, name


def count(model: Propagator, given: Any) -> int:
    """Evaluations of the published solver."""
    calls = []
    handle = model.t_conv.ode_func.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(*given)
    handle.remove()
    return len(calls)


@pytest.mark.parametrize(
    ("interaction", "time_mode"), list(itertools.product(INTERACTIONS, TIME_MODES))
)
@pytest.mark.parametrize("components", [1, 3])
def test_every_right_hand_side(interaction: str, time_mode: str, components: int) -> None:
    chaotic = time_mode in ("posenc", "rope")
    model = propagator(
        mode_interaction=interaction, time_mode=time_mode, rtol=3e-2 if chaotic else 1e-3
    )
    given = signals(components=components)
    assert_published(model, given)
    stats = SolveStats()
    propagate(model, *given, stats=stats)
    assert stats.evaluations == count(model, given)


@pytest.mark.parametrize("solver", [*ADAPTIVE, *FIXED_GRID, "explicit_adams", "implicit_adams"])
@pytest.mark.parametrize("basis", ["graph", "linear", None])
def test_every_solver_and_basis(solver: str, basis: str | None) -> None:
    modes = {"graph": 3, "linear": 3, None: 5}[basis]
    assert_published(propagator(basis, num_modes=modes, solver=solver), signals())


@pytest.mark.parametrize("solver", list(FIXED_GRID))
def test_time_dependent_right_hand_sides_on_the_union_grid(solver: str) -> None:
    model = propagator(solver=solver, mode_interaction="attention", time_mode="mlp")
    given = signals()
    assert_published(model, given)
    stats = SolveStats()
    propagate(model, *given, stats=stats)
    assert stats.evaluations == count(model, given)


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"scale": 0.0}, {}),
        ({"scale": 40.0, "rtol": 1e-2, "atol": 1e-2}, {}),
        ({"num_modes": 1}, {"batch": 1, "num_times": 1}),
        ({"num_modes": 5}, {"batch": 1}),
        ({"rtol": 1e-9, "atol": 1e-9}, {"batch": 2}),
        ({"channels": 1}, {"channels": 1}),
        ({"no_ode": True}, {}),
        ({"no_ode": True, "mode_interaction": "attention"}, {"components": 3}),
    ],
    ids=str,
)
def test_extremes(changes: dict[str, Any], shapes: dict[str, Any]) -> None:
    assert_published(propagator(**changes), signals(**shapes))


@pytest.mark.parametrize("times", ["equal", "tiny", "beyond one", "repeated"])
@pytest.mark.parametrize("solver", ["dopri5", "rk4"])
def test_times(times: str, solver: str) -> None:
    signal, s, eigvecs = signals()
    s = {
        "equal": torch.full_like(s, 0.5),
        "tiny": s * 1e-9,
        "beyond one": s * 3,
        "repeated": s[:, :1].expand_as(s).contiguous(),
    }[times]
    assert_published(propagator(solver=solver), (signal, s, eigvecs))


def test_first_step_rejected() -> None:
    """Then no step size carries gradient; fast forcing makes the first guess too long."""
    model = propagator(time_mode="rope", scale=20.0)
    given = signals(batch=2)
    state = model.transform(given[0], given[2])
    starts = []
    with torch.no_grad():
        _, rejected, first_accepted = integrate_published(
            model.t_conv.ode_func, state.flatten(1, 2), 1.0, DOPRI5, 1e-3, 1e-4,
            lambda y, k, t, h: starts.append(t), 1,
        )  # fmt: skip
    assert rejected
    assert not first_accepted
    assert_published(model, given)


def test_gradcheck() -> None:
    """Inside the first step, whose size carries gradient: later sizes are constants."""
    model = propagator(channels=2, num_modes=2, mode_interaction="attention", time_mode="concat")
    signal, times, eigvecs = signals(batch=2, num_atoms=3, channels=2, num_times=2)
    function = right_hand_side(model.t_conv.ode_func)
    times = times * 1e-2
    y0 = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y: solve_joint(function, y, times, DOPRI5, 1e-3, 1e-4, SolveStats()),
        (y0,),
        atol=1e-7,
    )


def test_second_derivatives_are_refused() -> None:
    model = propagator()
    signal, times, eigvecs = signals()
    out = propagate(model, signal.requires_grad_(), times, eigvecs)
    (grad,) = torch.autograd.grad(out.square().sum(), signal, create_graph=True)
    with pytest.raises(RuntimeError, match="for a second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_backward_twice(time_mode: str) -> None:
    """Two losses of one forward, over several accepted steps."""
    model = propagator(time_mode=time_mode, rtol=1e-8, atol=1e-10)
    stats = SolveStats()
    out = propagate(model, *signals(), stats=stats)
    assert stats.accepted > 1
    parameters = [p for p in model.parameters() if p.requires_grad]
    once, twice = (
        torch.autograd.grad(out.square().sum(), parameters, retain_graph=True, allow_unused=True)
        for _ in range(2)
    )
    assert any(gradient is not None for gradient in once)
    for a, b in zip(once, twice, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_strides_and_determinism() -> None:
    model = propagator()
    signal, times, eigvecs = signals(components=3)
    first = outputs_and_gradients(propagate, model, signal, times, eigvecs)
    strided = signal.transpose(0, 3).contiguous().transpose(0, 3)
    turned = eigvecs.transpose(1, 2).contiguous().transpose(1, 2)
    again = outputs_and_gradients(propagate, model, signal, times, eigvecs)
    other = outputs_and_gradients(propagate, model, strided, times.t().contiguous().t(), turned)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert relative_error(other[name], value) < 1e-12, name


def test_expanded_cotangent() -> None:
    """A cotangent without strides of its own, as a sum gives."""
    model = propagator()
    signal, times, eigvecs = signals()
    leaf, twin = signal.clone().requires_grad_(), signal.clone().requires_grad_()
    propagate(model, leaf, times, eigvecs).sum().backward()
    published(model, twin, times, eigvecs).sum().backward()
    assert relative_error(leaf.grad, twin.grad) < GRADIENTS


@pytest.mark.parametrize("solver", ["dopri5", "rk4", "explicit_adams", "implicit_adams"])
def test_a_molecule_with_a_non_finite_state_is_named(solver: str) -> None:
    signal, times, eigvecs = signals()
    signal[1, 2] = math.nan
    with pytest.raises(SolverError, match=r"in molecule\(s\) \[1\]") as caught:
        propagate(propagator(solver=solver), signal, times, eigvecs)
    assert caught.value.rows == [1]


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
@pytest.mark.parametrize(
    "changes",
    [{}, {"mode_interaction": "attention"}, {"solver": "rk4"}, {"solver": "implicit_adams"}],
    ids=str,
)
def test_times_must_be_positive_and_finite(changes: dict[str, Any], bad: float) -> None:
    signal, times, eigvecs = signals()
    times[1, 0] = bad
    with pytest.raises(ValueError, match="(joint|implicit_adams): `times` must be positive and"):
        propagate(propagator(**changes), signal, times, eigvecs)


@pytest.mark.parametrize("solver", ["dopri5", "bosh3", "dopri8"])
@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_powers_of_large_weights(solver: str, time_mode: str) -> None:
    """A product that magnifies the state: powers of W are scaled, or dopri8's would overflow."""
    model = propagator(solver=solver, time_mode=time_mode, scale=1e30, rtol=1e-2, atol=1e-2)
    signal, times, eigvecs = signals(components=3)
    assert_published(model, (signal, times * 1e-30, eigvecs))


def test_overflow_names_time_and_step() -> None:
    model = propagator(scale=1e200)
    with pytest.raises(SolverError, match="step") as caught:
        propagate(model, *signals())
    assert math.isfinite(caught.value.time)


@pytest.mark.parametrize("solver", list(ADAPTIVE))
def test_error_falls_with_the_tolerance(solver: str) -> None:
    """Against the matrix exponential; each method's global error follows its tolerance."""
    model = propagator(solver=solver)
    weights = model.t_conv.ode_func.weights1.detach()
    y0 = torch.randn(3, 2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    times = torch.ones(2, 1, dtype=torch.float64)
    exact = torch.einsum("mbdc,mce->bdme", y0, torch.linalg.matrix_exp(weights))
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        function = right_hand_side(model.t_conv.ode_func)
        out = solve_joint(function, y0, times, ADAPTIVE[solver], tolerance, tolerance, SolveStats())
        errors.append(relative_error(out[:, 0], exact))
    assert errors[2] < errors[0]
    assert errors[2] < 1e-4


def kept(solver: str, signal: Tensor, times: Tensor, eigvecs: Tensor) -> int:
    """Numbers kept for backward."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        propagate(propagator(solver=solver), signal.requires_grad_(), times, eigvecs)
    return total


def test_memory_does_not_grow_with_the_union() -> None:
    """What is kept for backward: accepted steps, not united times."""
    few, many = (kept("dopri5", *signals(batch=batch, num_times=8)) / batch for batch in (4, 16))
    assert many < 1.2 * few


@pytest.mark.parametrize("solver", ["euler", "midpoint", "rk4"])
def test_memory_of_the_union_grid_grows_with_its_root(solver: str) -> None:
    """A state every sqrt(L) steps of the L united times."""
    signal, times, eigvecs = signals(batch=16, num_times=8)
    united = 16 * 8
    together = times[:1].expand_as(times)
    assert (len(together.unique()), len(times.unique())) == (8, united)
    state = signal[..., 0, :].numel() * 3 // 5  # M = 3 modes of N = 5 atoms
    more = kept(solver, signal, times, eigvecs) - kept(solver, signal, together, eigvecs)
    assert state <= more <= 1.3 * united**0.5 * state  # all of them: 120 states
