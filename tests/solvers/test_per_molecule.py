"""Each molecule with its own steps: for one molecule the joint solve, for several each its own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.solvers import (
    ADAPTIVE,
    TABLEAUS,
    GeneralRHS,
    LinearRHS,
    SolverError,
    SolveStats,
    solve_exact,
    solve_per_molecule,
)
from golden_files import relative_error
from spectral import outputs_and_gradients, propagator, signals

INTERACTIONS = ("no_interaction", "attention", "concat")
# Measured: values 4e-15, gradients 2e-12 (concat with dopri8).
VALUES, GRADIENTS = 1e-11, 1e-9


def own_steps(*given: Any) -> Tensor:
    return propagate(*given, solver_mode="per_molecule")


def one_by_one(model: Any, signal: Tensor, times: Tensor, eigvecs: Tensor) -> Tensor:
    """The joint solve of each molecule by itself."""
    parts = [
        propagate(model, signal[b : b + 1], times[b : b + 1], eigvecs[b : b + 1])
        for b in range(len(signal))
    ]
    return torch.cat(parts, dim=1)


def assert_each_is_solved_alone(model: Any, given: Any) -> None:
    actual = outputs_and_gradients(own_steps, model, *given)
    expected = outputs_and_gradients(one_by_one, model, *given)
    floor = 1e-3 * max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    for name, value in expected.items():
        bound = VALUES if name == "output" else GRADIENTS
        assert relative_error(actual[name], value, 0 if name == "output" else floor) < bound, name


def varied(**shapes: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Molecules whose states, and hence steps, differ by orders of magnitude."""
    signal, times, eigvecs = signals(**shapes)
    scale = torch.logspace(-3, 3, len(signal), dtype=signal.dtype)
    return signal * scale.view(-1, 1, 1, 1), times, eigvecs


@pytest.mark.parametrize(
    ("interaction", "time_mode"), list(itertools.product(INTERACTIONS, ("none", "concat", "mlp")))
)
@pytest.mark.parametrize("components", [1, 3])
def test_every_right_hand_side(interaction: str, time_mode: str, components: int) -> None:
    model = propagator(mode_interaction=interaction, time_mode=time_mode)
    assert_each_is_solved_alone(model, varied(components=components))


@pytest.mark.parametrize("time_mode", ["posenc", "rope"])
def test_oscillating_embeddings(time_mode: str) -> None:
    """Where step control amplifies rounding, over few steps."""
    model = propagator(time_mode=time_mode, rtol=3e-2)
    signal, times, eigvecs = signals()
    given = signal, times * 1e-3, eigvecs
    actual, expected = own_steps(model, *given), one_by_one(model, *given)
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("solver", list(ADAPTIVE))
@pytest.mark.parametrize("basis", ["graph", "linear", None])
def test_every_solver_and_basis(solver: str, basis: str | None) -> None:
    modes = {"graph": 3, "linear": 3, None: 5}[basis]
    assert_each_is_solved_alone(propagator(basis, num_modes=modes, solver=solver), varied())


@pytest.mark.parametrize(
    ("changes", "shapes"),
    [
        ({"scale": 0.0}, {}),
        ({"scale": 40.0, "rtol": 1e-2, "atol": 1e-2}, {}),
        ({"num_modes": 1}, {"batch": 1, "num_times": 1}),
        ({"num_modes": 5}, {"batch": 1}),
        ({"rtol": 1e-9, "atol": 1e-9}, {"batch": 2}),
        ({"channels": 1}, {"channels": 1}),
    ],
    ids=str,
)
def test_extremes(changes: dict[str, Any], shapes: dict[str, Any]) -> None:
    assert_each_is_solved_alone(propagator(**changes), varied(**shapes))


@pytest.mark.parametrize("times", ["equal", "tiny", "beyond one", "far apart"])
def test_times(times: str) -> None:
    signal, s, eigvecs = varied()
    factor = torch.tensor([[1e-6], [1.0], [3.0]], dtype=s.dtype)
    s = {
        "equal": torch.full_like(s, 0.5),
        "tiny": s * 1e-9,
        "beyond one": s * 3,
        "far apart": s * factor,
    }[times]
    assert_each_is_solved_alone(propagator(), (signal, s, eigvecs))


def test_first_step_rejected_for_some() -> None:
    """There no step size carries gradient; the others' first size does."""
    model = propagator(mode_interaction="attention", scale=30.0)
    given = varied(batch=5)
    stats = SolveStats()
    propagate(model, *given, stats=stats, solver_mode="per_molecule")
    assert stats.rejected
    assert_each_is_solved_alone(model, given)


def test_a_molecule_at_rest() -> None:
    """Zero state, zero slope: constants where norms vanish, no NaN in the gradient."""
    signal, times, eigvecs = signals()
    signal[1] = 0
    found = outputs_and_gradients(own_steps, propagator(), signal, times, eigvecs)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert (found["output"][:, 1] == 0).all()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_answers_do_not_depend_on_batch_mates(dtype: torch.dtype, bound: float) -> None:
    model = propagator(mode_interaction="attention", scale=0.5).to(dtype)
    signal, times, eigvecs = (t.to(dtype) for t in varied(batch=4))
    times[2:] *= 3
    together = own_steps(model, signal, times, eigvecs)
    for b in range(4):
        one = slice(b, b + 1)
        alone = own_steps(model, signal[one], times[one], eigvecs[one])
        assert relative_error(together[:, one], alone) < bound


@pytest.mark.parametrize("solver", list(ADAPTIVE))
def test_error_falls_with_the_tolerance(solver: str) -> None:
    """Of every molecule, however large its mates are."""
    model = propagator()
    function = right_hand_side(model.t_conv.ode_func)
    signal, times, eigvecs = varied(batch=3, num_times=1)
    y0, times = model.transform(signal, eigvecs), torch.full_like(times, 2.0)
    exact = solve_exact(function, y0, times)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        values = solve_per_molecule(
            function, y0, times, TABLEAUS[solver], tolerance, 1e-6 * tolerance
        )
        errors.append([relative_error(values[b], exact[b]) for b in range(3)])
    for first, _, third in zip(*errors, strict=True):
        if solver in ("bosh3", "dopri8"):  # limited by their published interpolants
            assert third < 1e-3
        else:
            assert abs(math.log10(first / third) / 4 - 1) < 0.2


def test_counts() -> None:
    """Evaluations of the whole batch, steps of all molecules."""
    model, stats, alone = propagator(), SolveStats(), SolveStats()
    given = varied()
    propagate(model, *given, stats=stats, solver_mode="per_molecule")
    for b in range(3):
        one = tuple(t[b : b + 1] for t in given)
        propagate(model, *one, stats=alone)
    assert (stats.accepted, stats.rejected) == (alone.accepted, alone.rejected)
    assert stats.evaluations < alone.evaluations


def test_gradcheck() -> None:
    """Inside the first step, whose size carries gradient: later sizes are constants."""
    model = propagator(channels=2, num_modes=2, mode_interaction="attention", time_mode="concat")
    _, times, _ = signals(batch=2, num_times=2)
    function = right_hand_side(model.t_conv.ode_func)
    y0 = torch.randn(2, 2, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda y: solve_per_molecule(function, y, times * 1e-2, TABLEAUS["dopri5"], 1e-3, 1e-4),
        (y0,),
        atol=1e-7,
    )


def test_strides_and_determinism() -> None:
    model = propagator()
    signal, times, eigvecs = varied(components=3)
    first = outputs_and_gradients(own_steps, model, signal, times, eigvecs)
    again = outputs_and_gradients(own_steps, model, signal, times, eigvecs)
    strided = signal.transpose(0, 3).contiguous().transpose(0, 3)
    other = outputs_and_gradients(own_steps, model, strided, times.t().contiguous().t(), eigvecs)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        assert relative_error(other[name], value) < 1e-12, name


def test_second_derivatives_are_refused() -> None:
    signal, times, eigvecs = signals()
    out = own_steps(propagator(), signal.requires_grad_(), times, eigvecs)
    (grad,) = torch.autograd.grad(out.square().sum(), signal, create_graph=True)
    with pytest.raises(RuntimeError, match="for a second derivative"):
        grad.sum().backward()


def test_a_molecule_with_a_non_finite_state_is_named() -> None:
    signal, times, eigvecs = signals()
    signal[1, 2] = math.nan
    with pytest.raises(SolverError, match=r"at s = 0 .* in molecule\(s\) \[1\]") as caught:
        own_steps(propagator(), signal, times, eigvecs)
    assert caught.value.rows == [1]


def test_overflow_names_time_step_and_molecule() -> None:
    rhs = LinearRHS(lambda s, y: y, 40 * torch.eye(2, dtype=torch.float64).unsqueeze(0))
    y0 = torch.tensor([1e300, 1.0], dtype=torch.float64).view(1, 2, 1, 1).expand(1, 2, 1, 2)
    times = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(SolverError, match=r"step .* in molecule\(s\) \[0\]") as caught:
        solve_per_molecule(rhs, y0, times, TABLEAUS["dopri5"], 1e-3, 1e-4)
    assert 0 < caught.value.time < 1


def test_underflow_names_time_step_and_molecule() -> None:
    """A pole at s = 1/2, which no step passes, for the molecule that has to."""

    def pole(s: Tensor, y: Tensor) -> Tensor:
        return torch.ones_like(y) / ((s - 0.5).abs() + 1e-300).view(-1, 1, 1)

    y0 = torch.ones(1, 2, 1, 2, dtype=torch.float64)
    times = torch.tensor([[0.4], [0.6]], dtype=torch.float64)
    with pytest.raises(SolverError, match=r"must advance time, got step .* in molecule") as caught:
        solve_per_molecule(GeneralRHS(pole, pole, ()), y0, times, TABLEAUS["dopri5"], 1e-6, 1e-6)
    assert caught.value.rows == [1]
    assert caught.value.time == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [0.0, -0.5, math.nan, math.inf])
def test_times_must_be_positive_and_finite(bad: float) -> None:
    signal, times, eigvecs = signals()
    times[1, 2] = bad
    with pytest.raises(ValueError, match="`times` must be positive and finite"):
        own_steps(propagator(), signal, times, eigvecs)


def test_fixed_step_methods_are_refused() -> None:
    function = right_hand_side(propagator().t_conv.ode_func)
    y0, times = torch.ones(3, 1, 1, 6, dtype=torch.float64), torch.ones(1, 1)
    with pytest.raises(ValueError, match="`tableau` must be an adaptive method, got 'rk4'"):
        solve_per_molecule(function, y0, times, TABLEAUS["rk4"], 1e-3, 1e-4)
