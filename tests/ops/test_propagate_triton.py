"""backend="triton" of the propagation, against the reference's published solve."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

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
    compare(model, published, on("triton"), batch=3, components=components, num_times=2)


@pytest.mark.parametrize("time_mode", ["none", "concat"])
def test_attention(time_mode: str) -> None:
    model = propagator(
        time_mode=time_mode, mode_interaction="attention", num_modes=2, channels=3, scale=0.5
    )
    sizes = {"batch": 2, "components": 1 if time_mode == "none" else 2, "channels": 3}
    compare(model, published, on("triton"), num_times=2, **sizes)


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
    compare(model, expected, on("triton", activation=activation), batch=2, num_times=2)


def test_no_basis() -> None:
    model = propagator(None, num_modes=5)
    compare(model, published, on("triton"), batch=2, num_times=1)


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
