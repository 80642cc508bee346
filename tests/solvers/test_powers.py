"""Powers of linear dynamics in C++: what PyTorch computes; no bit depends on other molecules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops.propagate import propagate
from gfnode_fast.solvers import SolverError, SolveStats, powers, solve_exact
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.powers import CPP, TORCH, choose_powers
from gfnode_fast.solvers.rhs import LinearRHS
from gfnode_fast.solvers.tableau import ADAPTIVE
from golden_files import relative_error
from graph_layer_cases import NEEDS_CPP
from spectral import outputs_and_gradients, propagator, published, signals

# Measured: 2e-7 and 4e-16.
BOUND = {torch.float32: 2e-6, torch.float64: 1e-14}
# B, D, M, C, K: whole vectors, part of one, one of each, more rows than a tile and than a part.
SIZES = [(7, 1, 2, 64, 4), (3, 3, 2, 2, 7), (1, 1, 1, 1, 2), (5, 2, 3, 17, 3), (500, 1, 1, 5, 2)]
TIMES = 3


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def buffer_of(size: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A state in an otherwise empty buffer, W and b."""
    batch, components, modes, channels, degree = size
    buffer = torch.full((degree + 1, batch * components, modes, channels), math.nan, dtype=dtype)
    buffer[0] = random(*buffer.shape[1:], dtype=dtype)
    weight = random(modes, channels, channels, dtype=dtype, seed=1) / channels
    return buffer, weight, random(modes, channels, dtype=dtype, seed=2)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.usefixtures("poison_all_memory")
def test_equal_to_pytorch(size: tuple[int, ...], dtype: torch.dtype, forced: bool) -> None:
    batch, degree = size[0], size[-1]
    found = []
    for computes in (TORCH, CPP):
        buffer, weight, slope = buffer_of(size, dtype)
        b = slope if forced else None
        computes.fill(buffer[:2], weight, b, 0.3)
        computes.fill(buffer, weight, b, 0.3, first=1)
        times = random(batch, TIMES, dtype=torch.float64, seed=3).abs()
        table = random(4, degree + 1, dtype=torch.float64, seed=4)
        weights = computes.weights(times, table, 0.2, 0.7, 1.1, buffer)
        values = computes.read(weights, buffer)
        twice = computes.read(weights, buffer, values.clone())
        grad = computes.pull_readings(weights, random(*values.shape, dtype=dtype), buffer)
        pulled = grad.clone()
        of_weight, of_slope = computes.pull_back(buffer, pulled, weight, b, 0.3)
        rows = random(2, degree + 1, dtype=dtype, seed=5)
        end, squares = computes.measure(buffer, rows, 1e-3, 1e-4)
        found.append(
            [buffer, weights, values, twice, grad, pulled[0], of_weight, end, squares]
            + ([pulled[1], of_slope] if forced else [])
        )
    assert (found[0][1] == 0).any()  # times outside of the step
    for theirs, mine in zip(*found, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) < BOUND[dtype]


def affine(weight: Tensor, slope: Tensor) -> LinearRHS:
    def forcing(s: Tensor, slope: Tensor) -> Tensor:
        return s.view(-1, 1, 1) * slope

    return LinearRHS(lambda s, y: y, weight, forcing, (slope,), is_proportional=True)


@NEEDS_CPP
@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize(("components", "channels"), [(1, 64), (3, 2), (1, 17), (1, 1)])
def test_no_bit_depends_on_batch_mates(
    components: int, channels: int, scale: float, dtype: torch.dtype
) -> None:
    buffer, weight, slope = buffer_of((53, components, 2, channels, 1), dtype)
    y0 = buffer[0].view(53, components, 2, channels).permute(2, 0, 1, 3)
    times = 0.1 + torch.rand(53, TIMES, dtype=torch.float64)
    times[5:] *= 3  # mates past s = 1
    rhs = affine(weight * scale, slope)
    together = solve_exact(rhs, y0, times, backend="cpp")
    for some in (slice(0, 1), slice(7, 30), slice(52, 53)):
        assert torch.equal(
            together[some], solve_exact(rhs, y0[:, some], times[some], backend="cpp")
        )


def solve_dopri5(rhs: LinearRHS, y0: Tensor, times: Tensor, backend: str) -> Tensor:
    return solve_joint(rhs, y0, times, ADAPTIVE["dopri5"], 1e-4, 1e-5, backend=backend)


@NEEDS_CPP
def test_strides() -> None:
    """Of all that is given, and of the gradient of the values."""
    found = []
    for strided in (False, True):
        buffer, weight, slope = buffer_of((5, 3, 2, 4, 1), torch.float64)
        y0 = buffer[0].view(5, 3, 2, 4).permute(2, 0, 1, 3)
        times = random(5, TIMES, dtype=torch.float64).abs() + 0.1
        leaves = [y0.contiguous(), weight, slope]
        if strided:
            leaves = [leaf.mT.contiguous().mT for leaf in leaves]
            times = times.t().contiguous().t()
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        for solve in (solve_exact, solve_dopri5):
            values = solve(affine(*leaves[1:]), leaves[0], times, backend="cpp")
            grad = random(*values.shape, dtype=torch.float64)
            grad = grad.mT.contiguous().mT if strided else grad
            found.append([values, *torch.autograd.grad(values, leaves, grad)])
    for plain, strided in zip(found[:2], found[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


# Not dopri8 at scale 30: its error estimate cancels so far that steps agree to 1e-7 only.
@NEEDS_CPP
@pytest.mark.parametrize(
    ("solver", "scale"),
    [("dopri5", 1.0), ("dopri5", 30.0), ("bosh3", 1.0), ("bosh3", 30.0), ("dopri8", 1.0)],
)
@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_joint_is_the_published_solve(solver: str, time_mode: str, scale: float) -> None:
    model = propagator(solver=solver, time_mode=time_mode, scale=scale)
    given = signals(components=3)
    expected = outputs_and_gradients(published, model, *given)
    floor = 1e-3 * max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    counts = [SolveStats(), SolveStats()]

    def cpp(*arguments: Any) -> Tensor:
        return propagate(*arguments, counts[0], backend="cpp")

    actual = outputs_and_gradients(cpp, model, *given)
    for name, value in expected.items():
        bound = 1e-10 if name == "output" else 1e-8
        assert relative_error(actual[name], value, 0 if name == "output" else floor) < bound, name
    propagate(model, *given, counts[1])
    assert counts[0] == counts[1]


@NEEDS_CPP
@pytest.mark.parametrize("time_mode", ["none", "concat", "mlp"])
def test_exact_is_that_of_pytorch(time_mode: str) -> None:
    model = propagator(time_mode=time_mode, scale=8.0)
    found = [
        outputs_and_gradients(
            lambda *given, backend=backend: propagate(*given, backend=backend, solver_mode="exact"),
            model,
            *signals(components=3),
        )
        for backend in ("torch", "cpp")
    ]
    for name, value in found[0].items():
        assert relative_error(found[1][name], value) < 1e-12, name


@NEEDS_CPP
def test_determinism_over_threads() -> None:
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            buffer, weight, slope = buffer_of((500, 1, 1, 5, 2), torch.float32)
            CPP.fill(buffer, weight, slope, 0.3)
            grad = buffer.clone()
            found.append([buffer, *CPP.pull_back(buffer, grad, weight, slope, 0.3), grad[0]])
        finally:
            torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@NEEDS_CPP
def test_schemas() -> None:
    buffer, weight, slope = buffer_of((3, 1, 2, 4, 3), torch.float32)
    ops = torch.ops.gfnode_fast
    times, table = torch.rand(3, 2, dtype=torch.float64), torch.rand(4, 4, dtype=torch.float64)
    only = {"test_utils": "test_schema"}
    torch.library.opcheck(ops.powers_fill, (buffer, weight, slope, 0.3, 0), **only)
    weights = ops.powers_weights(times, table, 0.0, 1.0, 1.0, buffer)
    values = torch.zeros(3, 2, 8)
    torch.library.opcheck(ops.powers_weights, (times, table, 0.0, 1.0, 1.0, buffer), **only)
    torch.library.opcheck(ops.powers_read, (buffer, weights, values, True), **only)
    torch.library.opcheck(ops.powers_pull_readings, (buffer, weights, values), **only)
    torch.library.opcheck(ops.powers_pull, (buffer, buffer.clone(), weight, 0.3, True), **only)
    torch.library.opcheck(ops.powers_measure, (buffer, torch.rand(2, 4), 1e-3, 1e-4), **only)


@NEEDS_CPP
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    y0 = torch.ones(1, 2, 1, 2)
    y0[0, 1] = bad
    rhs = LinearRHS(lambda s, y: y, torch.eye(2).unsqueeze(0))
    with pytest.raises(SolverError, match=r"in molecule\(s\) \[1\]"):
        solve_exact(rhs, y0, torch.ones(2, 1), backend="cpp")


@NEEDS_CPP
def test_refusals() -> None:
    state = torch.ones(1, 1, 2)
    assert choose_powers("exact", "torch", state) is TORCH
    assert choose_powers("exact", "auto", state) is CPP
    assert choose_powers("exact", "auto", state.to(torch.complex64)) is TORCH
    with pytest.raises(ValueError, match=r"exact: `backend` must be one of .* got 'fast'"):
        choose_powers("exact", "fast", state)
    with pytest.raises(RuntimeError, match="no C\\+\\+ kernel: the state is torch.complex64"):
        choose_powers("exact", "cpp", state.to(torch.complex64))
    given = signals()
    for changes, options, reason in (
        ({"mode_interaction": "attention"}, {}, "modes interact"),
        ({"solver": "adaptive_heun"}, {}, "solver='adaptive_heun' goes stage by stage"),
        ({"time_mode": "mlp"}, {}, "time_mode='mlp' goes stage by stage"),
        ({}, {"solver_mode": "per_molecule"}, "'per_molecule' goes stage by stage"),
    ):
        with pytest.raises(RuntimeError, match=f"propagate: `backend` must be .*{reason}"):
            propagate(propagator(**changes), *given, backend="cpp", **options)
    ops, buffer = torch.ops.gfnode_fast, torch.zeros(3, 2, 1, 4)
    with pytest.raises(RuntimeError, match="powers_fill: `weight` has the wrong shape"):
        ops.powers_fill(buffer, torch.zeros(2, 4, 4), None, 0.0, 0)
    with pytest.raises(RuntimeError, match="`first` must be 0 ... 2, got 3"):
        ops.powers_fill(buffer, torch.zeros(1, 4, 4), None, 0.0, 3)
    with pytest.raises(RuntimeError, match="powers_fill: `weight` has the wrong dtype"):
        ops.powers_fill(buffer, torch.zeros(1, 4, 4).double(), None, 0.0, 0)


def test_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powers, "why_no_extension", lambda: "it was not built")
    assert choose_powers("exact", "auto", torch.ones(1, 1, 2)) is TORCH
    with pytest.raises(RuntimeError, match="propagate: .* no C\\+\\+ kernel: it was not built"):
        propagate(propagator(), *signals(), backend="cpp")
    weight, slope = random(2, 4, 4, dtype=torch.float64), random(2, 4, dtype=torch.float64)
    y0, times = random(2, 3, 1, 4, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    for solve in (solve_exact, solve_dopri5):
        values = [solve(affine(weight, slope), y0, times, backend=b) for b in ("auto", "torch")]
        assert torch.equal(*values)
