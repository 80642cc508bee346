"""Uniform steps: order at the output times, gradients, independence of batch mates, refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.solvers import (
    FIXED_GRID,
    TABLEAUS,
    SolverError,
    SolveStats,
    fixed,
    solve_fixed,
)
from golden_files import relative_error
from spectral import outputs_and_gradients, propagator, published, signals


def in_steps(step_size: float) -> Any:
    def solve(*given: Any) -> Tensor:
        return propagate(*given, solver_mode=fixed(step_size))

    return solve


@pytest.mark.parametrize("solver", list(FIXED_GRID))
@pytest.mark.parametrize("interaction", ["no_interaction", "attention"])
def test_order_at_the_output_times(solver: str, interaction: str) -> None:
    """Slopes within ±0.2 between the grid points, a third of a step from one in every grid."""
    changes: dict[str, Any] = {"mode_interaction": interaction, "time_mode": "concat", "scale": 1.0}
    signal, _, eigvecs = signals(batch=2)
    times = (torch.tensor([[1.0, 5.0, 12.0], [3.0, 9.0, 15.0]], dtype=torch.float64) + 1 / 3) / 16
    given = signal, times, eigvecs
    exact = in_steps(1 / 1024)(propagator(**changes, solver="rk4"), *given)
    model = propagator(**changes, solver=solver)
    errors = [(in_steps(1 / n)(model, *given) - exact).norm().item() for n in (16, 32, 64, 128)]
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - FIXED_GRID[solver].order) <= 0.2 for slope in slopes[1:]), slopes


@pytest.mark.parametrize("solver", list(FIXED_GRID))
@pytest.mark.parametrize("basis", ["graph", "linear", None])
def test_at_grid_points_the_published_method(solver: str, basis: str | None) -> None:
    model = propagator(basis, num_modes={"graph": 3, "linear": 3, None: 5}[basis], solver=solver)
    signal, _, eigvecs = signals(components=3)
    grid = torch.arange(5, dtype=torch.float64) / 4
    times = grid[1:].expand(3, -1).contiguous()
    state = model.transform(signal, eigvecs)
    solution = odeint(model.t_conv.ode_func, state.flatten(1, 2), grid, method=solver)[1:]
    expected = model.transform_back(solution.view(4, *state.shape).transpose(1, 2), 5, eigvecs)
    assert relative_error(in_steps(0.25)(model, signal, times, eigvecs), expected) < 1e-13


@pytest.mark.parametrize("solver", list(FIXED_GRID))
@pytest.mark.parametrize("interaction", ["no_interaction", "attention"])
def test_gradients_converge_to_those_of_a_tight_solve(solver: str, interaction: str) -> None:
    changes: dict[str, Any] = {"mode_interaction": interaction, "time_mode": "concat", "scale": 1.0}
    given = signals(batch=2, components=3, num_times=3)
    size = 1 / 200
    actual = outputs_and_gradients(in_steps(size), propagator(**changes, solver=solver), *given)
    tight = propagator(**changes, rtol=1e-9, atol=1e-10)
    expected = outputs_and_gradients(published, tight, *given)
    floor = 1e-2 * max(v.norm().item() for v in expected.values())
    bound = max(10 * size ** FIXED_GRID[solver].order, 1e-6)
    for name, value in expected.items():
        assert relative_error(actual[name], value, floor) < bound, name


@pytest.mark.parametrize(
    ("solver", "kind"),
    [("rk4", "linear"), ("rk4", "general"), ("rk4", "complex")]
    + [(solver, "linear") for solver in FIXED_GRID if solver != "rk4"],
)
def test_gradcheck(solver: str, kind: str) -> None:
    """More steps than a segment between checkpoints, times inside, at and past grid points."""
    model = propagator(
        "linear" if kind == "complex" else "graph",
        channels=2,
        num_modes=2,
        mode_interaction="attention" if kind == "general" else "no_interaction",
        time_mode="mlp",
        solver=solver,
    )
    times = torch.tensor([[0.3, 0.4, 0.03], [0.5, 0.1, 0.5]], dtype=torch.float64)
    dtype = torch.complex128 if kind == "complex" else torch.float64
    y0 = torch.randn(2, 2, 1, 2, dtype=dtype, requires_grad=True)
    function = right_hand_side(model.t_conv.ode_func)
    weight = function.parameters[0].detach().clone().requires_grad_()

    def solve(y0: Tensor, weight: Tensor) -> Tensor:
        bound = function.bind((weight, *(p.detach() for p in function.parameters[1:])))
        return solve_fixed(bound, y0, times, TABLEAUS[solver], 0.125)

    assert torch.autograd.gradcheck(solve, (y0, weight), atol=1e-6)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_answers_do_not_depend_on_batch_mates(dtype: torch.dtype, bound: float) -> None:
    model = propagator(solver="rk4", mode_interaction="attention", time_mode="mlp").to(dtype)
    signal, times, eigvecs = (t.to(dtype) for t in signals(batch=4))
    times[2:] *= 3
    together = in_steps(0.05)(model, signal, times, eigvecs)
    for b in range(4):
        one = slice(b, b + 1)
        alone = in_steps(0.05)(model, signal[one], times[one], eigvecs[one])
        assert relative_error(together[:, one], alone) < bound


@pytest.mark.parametrize(
    "times", [[[1e-12]], [[0.5, 0.5], [0.5, 0.5]], [[0.1, 0.2, 0.3]], [[2.5, 0.05]]], ids=str
)
def test_times(times: list[list[float]]) -> None:
    """s → 0, equal times, times on grid points up to rounding, times past one; M = 1, M = N."""
    s = torch.tensor(times, dtype=torch.float64)
    for modes in (1, 5):
        model = propagator(solver="rk4", num_modes=modes, scale=1.0)
        signal, _, eigvecs = signals(batch=len(s))
        out = in_steps(0.1)(model, signal, s, eigvecs)
        tight = propagator(num_modes=modes, scale=1.0, rtol=1e-10, atol=1e-11)
        assert relative_error(out, published(tight, signal, s, eigvecs)) < 1e-3


def test_counts() -> None:
    model = propagator(solver="rk4")
    signal, times, eigvecs = signals()
    stats = SolveStats()
    propagate(model, signal, times * 0 + 0.95, eigvecs, stats, solver_mode=fixed(0.1))
    assert (stats.accepted, stats.rejected, stats.evaluations) == (10, 0, 41)


def test_strides_and_determinism() -> None:
    model = propagator(solver="heun3", time_mode="posenc")
    signal, times, eigvecs = signals(components=3)
    first = outputs_and_gradients(in_steps(0.1), model, signal, times, eigvecs)
    again = outputs_and_gradients(in_steps(0.1), model, signal, times, eigvecs)
    strided = signal.transpose(0, 3).contiguous().transpose(0, 3)
    other = outputs_and_gradients(
        in_steps(0.1), model, strided, times.t().contiguous().t(), eigvecs
    )
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert relative_error(other[name], value) < 1e-12, name


def test_second_derivatives_are_refused() -> None:
    signal, times, eigvecs = signals()
    out = in_steps(0.1)(propagator(solver="rk4"), signal.requires_grad_(), times, eigvecs)
    (grad,) = torch.autograd.grad(out.square().sum(), signal, create_graph=True)
    with pytest.raises(RuntimeError, match="for a second derivative"):
        grad.sum().backward()


def test_a_molecule_with_a_non_finite_state_is_named() -> None:
    signal, times, eigvecs = signals()
    signal[1, 2] = math.nan
    with pytest.raises(SolverError, match=r"in molecule\(s\) \[1\]") as caught:
        in_steps(0.1)(propagator(solver="rk4"), signal, times, eigvecs)
    assert (caught.value.rows, caught.value.time) == ([1], 0.0)


def test_overflow_names_time_and_step() -> None:
    with pytest.raises(SolverError, match=r"at s = .* \(step 0.1\)") as caught:
        in_steps(0.1)(propagator(solver="rk4", scale=1e60), *signals())
    assert 0 < caught.value.time <= 1.1


def test_too_many_steps() -> None:
    with pytest.raises(SolverError, match=r"at most .* steps, got .* raise step_size"):
        in_steps(1e-12)(propagator(solver="rk4"), *signals())


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
def test_times_must_be_positive_and_finite(bad: float) -> None:
    signal, times, eigvecs = signals()
    times[1, 2] = bad
    with pytest.raises(ValueError, match="`times` must be positive and finite"):
        in_steps(0.1)(propagator(solver="rk4"), signal, times, eigvecs)


@pytest.mark.parametrize(
    ("step_size", "error", "message"),
    [
        (0.0, ValueError, r"`step_size` must be in \(0, 1\], got 0.0; "),
        (2, ValueError, "got 2; "),
        (math.nan, ValueError, "got nan; "),
        ("0.1", TypeError, "`step_size` must be a number, got str; "),
        (True, TypeError, "got bool; "),
    ],
)
def test_step_sizes_that_are_refused(step_size: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"fixed: .*{message}"):
        fixed(step_size)


def test_adaptive_methods_are_refused() -> None:
    function = right_hand_side(propagator().t_conv.ode_func)
    y0, times = torch.ones(3, 1, 1, 6, dtype=torch.float64), torch.ones(1, 1)
    with pytest.raises(ValueError, match="`tableau` must be a fixed-step method, got 'dopri5'"):
        solve_fixed(function, y0, times, TABLEAUS["dopri5"], 0.1)


def test_equality_and_text_of_the_mode() -> None:
    assert fixed(0.1) == fixed(0.1)
    assert repr(fixed(0.1)) == "fixed(0.1)"
