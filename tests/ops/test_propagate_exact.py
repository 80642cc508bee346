"""The exact propagation in one launch, against matrix exponentials and the torch path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.kernels import propagate_exact_launch as launch
from gfnode_fast.ops.propagate_exact import _plan, check_status, propagate_exact
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.exact import NORM_SLACK, degree_and_substeps
from op_checks import (
    BACKENDS,
    DEVICE,
    OF_KERNELS,
    gradients,
    opcheck,
    relative_error,
)
from solve_cases import EXACT, check_gradients

pytestmark = OF_KERNELS

# Relative to the largest value or gradient, times max(1, ‖W‖); measured: fp64 1e-15, fp32 5e-7.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
problem, solve = EXACT.make, EXACT.solve


def oracle(times: Tensor) -> Any:
    """By matrix exponentials of the system in (y, s, 1), whose derivative is linear."""

    def call(y0: Tensor, weight: Tensor, slope: Tensor | None = None) -> Tensor:
        modes, channels, _ = weight.shape
        system = weight.new_zeros(modes, channels + 2, channels + 2)
        system[:, :channels, :channels] = weight
        if slope is not None:
            system[:, channels, :channels] = slope
        system[:, channels + 1, channels] = 1
        start = torch.cat((y0, y0.new_zeros(*y0.shape[:3], 1), y0.new_ones(*y0.shape[:3], 1)), -1)
        flow = torch.linalg.matrix_exp((times.T[:, :, None, None, None] * system).contiguous())
        return torch.einsum("bmdc,tbmce->tbmde", start, flow)[..., :channels]

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("dtype", "norm"), [(torch.float64, 0.2), (torch.float32, 0.2), (torch.float32, 5.0)]
)
def test_values_and_gradients(backend: str, affine: bool, dtype: torch.dtype, norm: float) -> None:
    """A norm of 5 takes several steps."""
    inputs, times = problem(norm, dtype, affine=affine)
    wide = [x.double() for x in inputs]
    tolerance = TOLERANCE[dtype] * max(1.0, norm)
    got, status = propagate_exact(
        *inputs[:2], times, slope=inputs[2] if affine else None, backend=backend
    )
    assert got.dtype == dtype
    assert not status.any()
    assert relative_error(got, oracle(times)(*wide)) <= tolerance
    check_gradients(solve(times, backend), oracle(times), inputs, tolerance, wide=True)


def test_more_steps_than_backward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(6.0, torch.float32, batch=2, components=1)
    expected = gradients(solve(times, "triton"), inputs)
    monkeypatch.setattr(launch, "MAX_STARTS", 1)
    for got, kept in zip(gradients(solve(times, "triton"), inputs), expected, strict=True):
        assert torch.equal(got, kept)


def test_more_tiles_of_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(dtype=torch.float32)
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 1)
    tolerance = TOLERANCE[torch.float32]
    check_gradients(solve(times, "triton"), oracle(times), inputs, tolerance, wide=True)


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine: bool) -> None:
    inputs, times = problem(
        dtype=torch.float32, affine=affine, batch=2, components=1, channels=2, times=1
    )
    y0, weight, *slope = (x.requires_grad_() for x in inputs)
    plan = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    operator = torch.ops.gfnode_fast.propagate_exact
    opcheck(operator, y0, weight, slope[0] if affine else None, times.float(), plan)


@pytest.mark.parametrize(
    ("batch", "modes", "components", "channels", "times"),
    [(0, 2, 1, 2, 2), (2, 2, 1, 2, 0), (1, 1, 1, 1, 1), (1, 1, 2, 33, 9)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes(
    backend: str, batch: int, modes: int, components: int, channels: int, times: int
) -> None:
    sizes = {"batch": batch, "modes": modes, "components": components, "channels": channels}
    inputs, own = problem(dtype=torch.float32, times=times, **sizes)
    wide = [x.double() for x in inputs]
    got, status = propagate_exact(*inputs[:2], own, slope=inputs[2], backend=backend)
    assert status.shape == (batch,)
    assert relative_error(got, oracle(own)(*wide)) <= TOLERANCE[torch.float32]
    tolerance = TOLERANCE[torch.float32]
    check_gradients(solve(own, backend), oracle(own), inputs, tolerance, wide=True)


@pytest.mark.parametrize("norm", [0.0, 1e-6, 0.3, 2.0, 40.0])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_degree_and_steps_are_those_of_the_torch_path(norm: float, dtype: torch.dtype) -> None:
    weight = torch.eye(2, dtype=dtype).unsqueeze(0) * norm
    for affine in (False, True):
        expected = degree_and_substeps(
            weight.abs().amax().item() * NORM_SLACK, dtype, affine=affine
        )
        assert tuple(_plan(weight, affine).tolist()) == expected


def test_extremes() -> None:
    """‖W‖ = 0, equal times, times close to 0."""
    inputs, times = problem(dtype=torch.float32, batch=2, components=1, affine=False)
    still = torch.zeros_like(inputs[1])
    constant = solve(torch.full_like(times, 0.5), "triton")(inputs[0], still)
    assert torch.equal(constant, inputs[0].expand_as(constant))
    soon = solve(times * 1e-12, "triton")(*inputs)
    assert relative_error(soon, inputs[0].expand_as(soon)) <= 1e-7


def test_a_molecule_does_not_depend_on_its_batch_mates() -> None:
    """Bit for bit, though its tile mates take more steps."""
    inputs, times = problem(5.0, torch.float32, components=1)
    times[0] *= 0.1
    together = solve(times, "triton")(*inputs)
    alone = solve(times[:1], "triton")(inputs[0][:1], *inputs[1:])
    assert torch.equal(together[:, :1], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_reported(value: float) -> None:
    inputs, times = problem(dtype=torch.float32, components=1, affine=False)
    inputs[0][3, 1, 0, 2] = value
    with pytest.raises(SolverError, match=r"must be finite, got others in molecule\(s\) \[3\]"):
        solve(times, "triton")(*inputs)


@pytest.mark.parametrize("value", [0.0, -0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_times_that_are_not_positive_are_refused(backend: str, value: float) -> None:
    inputs, times = problem(dtype=torch.float32, components=1, affine=False)
    times[2, 1] = value
    with pytest.raises(ValueError, match="`times` must be positive( and|,) finite"):
        solve(times, backend)(*inputs)


def test_times_beyond_the_most_steps_are_refused() -> None:
    inputs, times = problem(5.0, torch.float32, batch=1, components=1, affine=False)
    with pytest.raises(ValueError, match="reached in 100000 steps, got others in molecule"):
        solve(times * 1e6, "triton")(*inputs)


def test_status_is_read_later_on_a_gpu() -> None:
    check_status(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(SolverError, match=r"molecule\(s\) \[1\]") as caught:
        check_status(torch.tensor([0, 1, 0], dtype=torch.int32))
    assert caught.value.rows == [1]
