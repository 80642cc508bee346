"""backend="triton" of the propagation, against the reference's published solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops import joint_status
from gfnode_fast.ops import triton_solve as module
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.ops.triton_solve import check_triton_solve
from gfnode_fast.reference.propagator import Propagator
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.mode import fixed
from gfnode_fast.solvers.stats import SolveStats
from op_checks import DEVICE, OF_KERNELS, relative_error
from spectral import outputs_and_gradients, published
from spectral import propagator as on_cpu
from spectral import signals as signals_on_cpu

pytestmark = OF_KERNELS

TOLERANCE = 1e-10  # relative to the largest value or gradient; measured 2e-12


def propagator(*args: Any, **options: Any) -> Propagator:
    return on_cpu(*args, **options).to(DEVICE)


def signals(**sizes: int) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in signals_on_cpu(**sizes))


def on(backend: str, **options: Any) -> Any:
    def call(model: Propagator, signal: Tensor, times: Tensor, eigvecs: Tensor) -> Tensor:
        return propagate(model, signal, times, eigvecs, backend=backend, **options)

    return call


FEW = on("triton", max_attempts=4)  # a launch takes the interpreter long, whether it does anything


def compare(model: Propagator, expected: Any, got: Any, **sizes: int) -> None:
    given = signals(**sizes)
    found = outputs_and_gradients(got, model, *given)
    for name, exact in outputs_and_gradients(expected, model, *given).items():
        if exact.abs().max() > 1e-12:  # the keys' bias has none: the softmax does not see it
            assert relative_error(found[name], exact) <= TOLERANCE, name


@pytest.mark.parametrize("time_mode", ["none", "concat"])
@pytest.mark.parametrize("components", [1, 3])
def test_joint_is_the_published_solve(time_mode: str, components: int) -> None:
    model = propagator(time_mode=time_mode, num_modes=2)
    compare(model, published, FEW, batch=3, components=components, num_times=2)


@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_attention(time_mode: str) -> None:
    model = propagator(
        time_mode=time_mode, mode_interaction="attention", num_modes=2, channels=3, scale=0.5
    )
    sizes = {"batch": 2, "components": 1 if time_mode == "none" else 2, "channels": 3}
    compare(model, published, FEW, num_times=2, **sizes)


@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_exact(time_mode: str) -> None:
    model = propagator(time_mode=time_mode, num_modes=2)
    exact = {"solver_mode": "exact"}
    compare(model, on("torch", **exact), on("triton", **exact), batch=3, num_times=2)


@pytest.mark.parametrize("activation", [torch.nn.SiLU(), torch.nn.Tanh()])
def test_activation_and_residual(activation: torch.nn.Module) -> None:
    def expected(model: Propagator, signal: Tensor, *given: Tensor) -> Tensor:
        return signal + activation(published(model, signal, *given))

    model = propagator(num_modes=2)
    ours = on("triton", activation=activation, max_attempts=4)
    compare(model, expected, ours, batch=2, num_times=2)


def test_no_basis() -> None:
    model = propagator(None, num_modes=5)
    compare(model, published, FEW, batch=2, num_times=1)


@pytest.mark.parametrize("solver_mode", ["joint", "exact"])
def test_counts_are_those_of_torch(solver_mode: str) -> None:
    model, given = propagator(num_modes=2), signals(batch=2, num_times=2)
    stats, expected = SolveStats(), SolveStats()
    for found, backend in ((stats, "triton"), (expected, "torch")):
        propagate(model, *given, found, backend=backend, solver_mode=solver_mode)
    assert stats == expected
    assert stats.accepted > 1 or solver_mode == "exact"


def test_failures_reach_the_host() -> None:
    signal, times, eigvecs = signals(batch=3, num_times=1)
    model, stats = propagator(num_modes=2), SolveStats()
    with pytest.raises(ValueError, match="`times` must be positive and finite"):
        propagate(model, signal, times - 2, eigvecs, stats, backend="triton")
        stats.wait()
    signal[2, 0, 0, 0] = float("nan")
    for mode in ("joint", "exact"):
        with pytest.raises(SolverError, match=r"finite.*molecule\(s\) \[2\]") as caught:
            propagate(model, signal, times, eigvecs, stats, backend="triton", solver_mode=mode)
            stats.wait()
        assert caught.value.rows == [2]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The attempts of each solve by `triton_solve`."""
    numbers: list[int] = []

    def spied(solve: Any) -> Any:
        def call(*given: Any) -> Any:
            numbers.append(given[-1])
            return solve(*given)

        return call

    for name in ("joint_on_triton", "attention_on_triton"):
        monkeypatch.setattr(module, name, spied(getattr(module, name)))
    return numbers


def test_a_stiff_solve_is_given_the_attempts_it_needs(launched: list[int]) -> None:
    model = propagator(num_modes=1, channels=2, scale=20.0, rtol=1e-7, atol=1e-8)
    stats = SolveStats()
    compare(model, published, on("triton", stats=stats), batch=2, channels=2, num_times=2)
    assert (stats.accepted, stats.rejected) == (16, 2)
    assert launched == [16, 32]
    assert stats.launches == 64  # of the next one


@pytest.mark.parametrize(
    "interaction", ["no_interaction", pytest.param("attention", marks=pytest.mark.slow)]
)
def test_a_solve_that_ran_out_unseen_can_be_repeated(
    interaction: str, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU after the first solve; the report is read when the values are used."""
    for place in (module, joint_status):
        monkeypatch.setattr(place, "MAX_ATTEMPTS", 1)
    monkeypatch.setattr(joint_status, "LARGEST_RAISE", 3)
    monkeypatch.setattr(module, "_may_read", lambda record, stats: False)
    model = propagator(num_modes=2, channels=3, mode_interaction=interaction)
    sizes, stats = {"batch": 2, "channels": 3, "num_times": 1}, SolveStats()
    with pytest.raises(SolverError, match=r"; solve again \(4 will be launched\), pass max_"):
        propagate(model, *signals(**sizes), stats, backend="triton")
        stats.wait()
    compare(model, published, on("triton", stats=stats), **sizes)
    assert launched == [1, 4]


def test_a_solve_that_ran_out_says_what_to_pass() -> None:
    model, given = propagator(num_modes=2), signals(batch=2, num_times=1)
    # without stats to report to, a failure on a GPU is NaN alone
    for stats in (SolveStats(), *([None] if DEVICE.type == "cpu" else [])):
        with pytest.raises(SolverError, match=r"1 attempts on the way to .*; pass max_.*=16, "):
            propagate(model, *given, stats, backend="triton", max_attempts=1)
            stats.wait()
    for value, error in ((0, ValueError), (True, TypeError), ("16", TypeError)):
        with pytest.raises(error, match="propagate: `max_attempts` must be"):
            propagate(model, *given, max_attempts=value)


class _Late:
    """A report that arrives when told."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.arrived = values.tolist(), False

    def has_arrived(self) -> bool:
        return self.arrived

    def read(self) -> list[float]:
        self.arrived = True
        return self.values


class _OnDevice:
    """As much of a tensor on a GPU as `SolveStats.expect` looks at."""

    is_cuda = True

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def tolist(self) -> list[float]:
        return self.values


def test_reports_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits at the solve or at the next one; reading a count does."""
    monkeypatch.setattr("gfnode_fast.solvers.stats.DeviceReport", _Late)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def outcome(values: list[float]) -> tuple[int, int, int]:
        if values[0] < 0:
            raise SolverError("failed", time=0.0, step=0.0, rows=[])
        return int(values[0]), 1, 0

    stats = SolveStats()
    stats.expect(_OnDevice([3.0]), outcome)
    stats.reset()  # the first solve's counts are nobody's any more
    stats.expect(_OnDevice([5.0]), outcome)
    assert not any(report.arrived for report, _, _ in stats._pending)
    assert (stats.evaluations, stats.accepted, stats.rejected) == (5, 1, 0)

    stats.expect(_OnDevice([-1.0]), outcome)
    stats.reset()
    stats._pending[0][0].arrived = True
    with pytest.raises(SolverError, match="failed"):
        stats.reset()
    stats.expect(_OnDevice([-1.0]), outcome)
    with pytest.raises(SolverError, match="failed"):
        stats.wait()
    assert stats.evaluations == 0


@pytest.mark.parametrize(
    ("options", "solver_mode", "named"),
    [
        ({"no_ode": True}, "joint", "no_ode=True"),
        ({"basis": "linear"}, "joint", "fourier_basis='linear'"),
        ({"time_mode": "posenc"}, "joint", "time_mode='posenc'"),
        ({"mode_interaction": "concat"}, "joint", "mode_interaction='concat'"),
        ({"mode_interaction": "attention", "num_modes": 17}, "joint", "attention across 17 modes"),
        ({"channels": 65}, "joint", "65 channels"),
        ({"solver": "rk4"}, "joint", "solver='rk4'"),
        ({"solver": "adaptive_heun"}, "joint", "solver='adaptive_heun'"),
        ({"solver": "explicit_adams"}, "joint", "solver='explicit_adams'"),
        ({}, "per_molecule", "solver_mode='per_molecule'"),
        ({"solver": "rk4"}, fixed(0.1), r"solver_mode=fixed\(0.1\)"),
    ],
)
def test_what_is_refused(options: dict[str, Any], solver_mode: Any, named: str) -> None:
    model = propagator(**options)
    with pytest.raises(RuntimeError, match=f"`backend='triton'` must have kernels.*{named}"):
        check_triton_solve(model.t_conv, solver_mode)
    with pytest.raises(RuntimeError, match=named):
        given = signals(num_atoms=model.num_modes + 2, channels=options.get("channels", 6))
        propagate(model, *given, backend="triton", solver_mode=solver_mode)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        propagate(on_cpu(), *signals_on_cpu(), backend="triton")
