"""The joint solve of attention on the device, against the published solve in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfnode_fast.kernels import propagate_attention_launch as launch
from gfnode_fast.ops import dispatch
from gfnode_fast.ops.joint_status import DONE
from gfnode_fast.ops.propagate_attention import propagate_attention
from gfnode_fast.solvers.errors import SolverError
from op_checks import (
    DEVICE,
    OF_KERNELS,
    gradients,
    opcheck,
    relative_error,
)
from solve_cases import ATTENTION, check_gradients

pytestmark = OF_KERNELS

# Relative to the largest value or gradient; measured: fp64 1e-11 (the initial step divides a small
# difference of slopes by a small time, on either side), fp32 1e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
problem, solve = ATTENTION.make, ATTENTION.solve


@pytest.mark.parametrize(
    ("solver", "size", "attempts", "sizes"),
    [
        ("dopri5", 0.5, 3, {"components": 3}),
        pytest.param(
            "dopri5", 0.2, 2, {"batch": 17, "in_time": False, "times": 1}, marks=pytest.mark.slow
        ),
        pytest.param(
            "dopri5", 0.5, 5, {"modes": 5, "channels": 5, "times": 5}, marks=pytest.mark.slow
        ),
        pytest.param("bosh3", 0.1, 3, {}, marks=pytest.mark.slow),
        pytest.param("dopri8", 0.1, 2, {"batch": 1}, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_the_published_ones(
    solver: str, size: float, attempts: int, sizes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several steps; two programs and a partial tile; five modes, with rejected attempts."""
    inputs, times = problem(size, **sizes)
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 1)  # backward walks its tiles
    options = {"solver": solver, "max_attempts": attempts}
    tolerance = 1e-6 if solver == "dopri8" else TOLERANCE[torch.float64]
    got, status = propagate_attention(*inputs, times, backend="triton", **options)
    published = solve(times, "torch", solver=solver)
    assert (status[3], status[5]) == (DONE, attempts)
    assert relative_error(got, published(*inputs)) <= tolerance
    check_gradients(solve(times, "triton", **options), published, inputs, tolerance)


@pytest.mark.slow
def test_float32() -> None:
    inputs, times = problem(dtype=torch.float32, times=1)
    call = solve(times, "triton", max_attempts=2)
    published, tolerance = solve(times, "torch"), TOLERANCE[torch.float32]
    got = call(*inputs)
    assert got.dtype == torch.float32
    assert relative_error(got, published(*(x.double() for x in inputs))) <= tolerance
    check_gradients(call, published, inputs, tolerance, wide=True)


@pytest.mark.slow
def test_opcheck() -> None:
    inputs, times = problem(0.1, torch.float32, batch=1, channels=2, times=1)
    times *= 1e-3  # in the first step
    leaves = [x.requires_grad_() for x in inputs]
    operator = torch.ops.gfnode_fast.propagate_attention
    opcheck(operator, *leaves, times, "dopri5", 1e-3, 1e-4, 1)


@pytest.mark.parametrize(
    ("batch", "modes", "channels", "times"), [(0, 2, 2, 2), (1, 2, 2, 0), (1, 1, 1, 1)]
)
def test_sizes(batch: int, modes: int, channels: int, times: int) -> None:
    inputs, own = problem(0.1, batch=batch, modes=modes, channels=channels, times=times)
    triton, published = solve(own, "triton", max_attempts=2), solve(own, "torch")
    assert relative_error(triton(*inputs), published(*inputs)) <= TOLERANCE[torch.float64]
    for mine, exact in zip(gradients(triton, inputs), gradients(published, inputs), strict=True):
        assert (mine - exact).abs().sum() <= TOLERANCE[torch.float64] * exact.abs().sum()


def test_failures() -> None:
    inputs, times = problem(times=1)
    with pytest.raises(SolverError, match="its 1 attempts .* pass max_attempts=") as caught:
        solve(times, "triton", max_attempts=1)(*inputs)
    assert 0 < caught.value.time < 1
    values, record, *_ = torch.ops.gfnode_fast.propagate_attention(
        *inputs, times, "dopri5", 1e-3, 1e-4, 1
    )
    assert values.isnan().any()
    with pytest.raises(ValueError, match="`times` must be positive and finite"):
        solve(times - 2, "triton", max_attempts=1)(*inputs)
    inputs[0][1, 0, 0, 2] = float("inf")
    with pytest.raises(SolverError, match="not finite") as caught:
        solve(times, "triton", max_attempts=1)(*inputs)
    assert caught.value.rows == ([1] if DEVICE.type == "cpu" else [])


def test_more_modes_than_the_kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(modes=17, batch=1)
    with pytest.raises(ValueError, match="at most 16 modes with backend='triton', got 17"):
        solve(times, "triton")(*inputs)
    monkeypatch.setattr(dispatch, "choose_automatically", lambda device: ("triton", "a row"))
    assert torch.equal(solve(times, "auto")(*inputs), solve(times, "torch")(*inputs))
