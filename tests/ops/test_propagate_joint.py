"""The joint solve of linear dynamics on the device, against the published solve in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gfnode_fast.kernels import propagate_joint_launch as launch
from gfnode_fast.ops.joint_operator import FSAL
from gfnode_fast.ops.joint_status import (
    DONE,
    MAX_ATTEMPTS,
    RUNNING,
    UNDERFLOW,
    attempts_to_launch,
    check_joint_status,
)
from gfnode_fast.ops.propagate_joint import polynomial_table, propagate_joint
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.tableau import ADAPTIVE
from op_checks import (
    DEVICE,
    OF_KERNELS,
    gradients,
    opcheck,
    relative_error,
)
from solve_cases import JOINT, check_gradients

pytestmark = OF_KERNELS

# Relative to the largest value or gradient; measured: fp64 3e-15, fp32 5e-7 (a norm's rounding in
# fp32 moves the first step, and with it the dense output within the solver's own error).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
problem, solve = JOINT.make, JOINT.solve


def late_growth(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """(y0, W), times: yW and yWW are small and yWWW is not, so the first step is too large."""
    (y0, weight), times = problem(dtype=dtype, batch=17, components=1, times=2)
    y0[..., 1:] = 0
    weight.zero_()
    weight[:, 0, 1] = weight[:, 1, 2] = 1
    weight[:, 2, 0] = 1e6
    return [y0, weight], times * 0.04


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        ("dopri5", torch.float64),
        ("dopri5", torch.float32),
        *(pytest.param(s, torch.float64, marks=pytest.mark.slow) for s in FSAL if s != "dopri5"),
    ],
)
@pytest.mark.parametrize(
    ("size", "attempts"),
    [
        (0.5, 8),  # one or a few steps
        (2.0, 18),  # several, none rejected
        (None, 12),  # the first one rejected
        (1e-9, 12),  # norms that are tiny
    ],
)
def test_values_and_gradients_are_the_published_ones(
    solver: str, size: float | None, attempts: int, dtype: torch.dtype
) -> None:
    sized: dict[str, int] = {"batch": 17, "components": 1, "times": 2}
    inputs, times = late_growth(dtype) if size is None else problem(size, dtype, **sized)
    options = {"solver": solver, "max_attempts": attempts if solver == "bosh3" else attempts // 2}
    tolerance = max(TOLERANCE[dtype], 1e-6 if solver == "dopri8" else 0)
    got, status = propagate_joint(*inputs[:2], times, backend="triton", **options)
    wide = [x.double() for x in inputs]
    published = solve(times, "torch", **options)
    assert got.dtype == dtype
    assert status[3] == DONE
    assert relative_error(got, published(*wide)) <= tolerance
    check_gradients(solve(times, "triton", **options), published, inputs, tolerance, wide=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_affine_dynamics(dtype: torch.dtype) -> None:
    """Several steps, so that the time of a step's start counts, and moves with the first size."""
    inputs, times = problem(2.0, dtype, batch=17, components=1, times=2, affine=True)
    wide, options = [x.double() for x in inputs], {"max_attempts": 9}
    got, status = propagate_joint(*inputs[:2], times, slope=inputs[2], backend="triton", **options)
    published = solve(times, "torch")
    assert status[2] > 2
    assert relative_error(got, published(*wide)) <= TOLERANCE[dtype]
    triton = solve(times, "triton", **options)
    check_gradients(triton, published, inputs, TOLERANCE[dtype], wide=True)


def test_the_steps_are_the_published_ones() -> None:
    """Sizes, and which attempts are rejected."""
    for ((y0, weight), times), expected_rejections in (
        (problem(2.0, components=1), False),
        (late_growth(), True),
    ):
        (accepted, rejected), sizes = published_steps(y0, weight, times)
        _, record, steps, _, _ = torch.ops.gfnode_fast.propagate_joint(
            y0, weight, None, times, "dopri5", 1e-3, 1e-4, accepted + rejected
        )
        assert bool(rejected) == expected_rejections
        assert record[2] == accepted
        assert (
            relative_error(steps[:accepted, 1], torch.tensor(sizes, dtype=torch.float64)) <= 1e-12
        )
        with pytest.raises(SolverError, match="pass max_attempts="):
            solve(times, "triton", max_attempts=accepted + rejected - 1)(y0, weight)


def published_steps(
    y0: Tensor, weight: Tensor, times: Tensor
) -> tuple[tuple[int, int], list[float]]:
    from gfnode_fast.solvers.published import integrate_published

    sizes: list[float] = []
    _, rejected, _ = integrate_published(
        lambda s, y: torch.bmm(y, weight),
        y0.transpose(0, 1).flatten(1, 2),
        times.max().item(),
        ADAPTIVE["dopri5"],
        1e-3,
        1e-4,
        lambda start, stages, time, size: sizes.append(size),
        1,
    )
    return (len(sizes), rejected), sizes


@pytest.mark.parametrize("solver", FSAL)
def test_the_table_reproduces_a_step(solver: str) -> None:
    tableau, size, rate = ADAPTIVE[solver], 0.3, 0.7
    table = polynomial_table(tableau)
    stages = []
    for beta in ((), *tableau.beta):
        point = 1 + size * sum(b * k for b, k in zip(beta, stages, strict=False))
        stages.append(rate * point)
    powers = torch.tensor([(size * rate) ** k for k in range(len(table))], dtype=torch.float64)
    end = 1 + size * sum(b * k for b, k in zip(tableau.solution, stages, strict=True))
    error = size * sum(b * k for b, k in zip(tableau.error, stages, strict=True))
    assert abs(powers @ table[:, 5] - end) < 1e-15
    assert abs(powers @ table[:, 6] - error) < 1e-15
    at_one = table[:, :5].sum(dim=1)
    assert abs(powers @ at_one - end) < 1e-14  # dense output ends on y_1


def test_components_times_and_rows_beyond_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(times=9)
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 1)
    triton, published = solve(times, "triton", max_attempts=3), solve(times, "torch")
    assert relative_error(triton(*inputs), published(*inputs)) <= 1e-12
    check_gradients(triton, published, inputs, TOLERANCE[torch.float64])


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine: bool) -> None:
    sizes = {"batch": 2, "components": 1, "channels": 2, "times": 1}
    inputs, times = problem(dtype=torch.float32, affine=affine, **sizes)
    y0, weight, *slope = (x.requires_grad_() for x in inputs)
    operator = torch.ops.gfnode_fast.propagate_joint
    opcheck(operator, y0, weight, slope[0] if affine else None, times, "dopri5", 1e-3, 1e-4, 2)


@pytest.mark.parametrize(
    ("batch", "modes", "components", "channels", "times"),
    [(0, 2, 1, 2, 2), (2, 2, 1, 2, 0), (1, 1, 1, 1, 1), (1, 1, 2, 33, 1)],
)
def test_sizes(batch: int, modes: int, components: int, channels: int, times: int) -> None:
    sizes = {"batch": batch, "modes": modes, "components": components, "channels": channels}
    inputs, own = problem(0.2, times=times, **sizes)
    triton, published = solve(own, "triton", max_attempts=4), solve(own, "torch")
    assert relative_error(triton(*inputs), published(*inputs)) <= TOLERANCE[torch.float64]
    check_gradients(triton, published, inputs, TOLERANCE[torch.float64])


def test_zero_state_and_zero_weight() -> None:
    inputs, times = problem(batch=2, components=1)
    for factors in ((0.0, 1.0), (1.0, 0.0)):
        scaled = [x * factor for x, factor in zip(inputs, factors, strict=True)]
        triton, published = (solve(times, b, max_attempts=8) for b in ("triton", "torch"))
        assert torch.equal(triton(*scaled), published(*scaled))
        for grad in gradients(triton, scaled):
            assert torch.isfinite(grad).all()


def test_states_that_are_not_finite_are_reported() -> None:
    (y0, weight), times = problem(components=1)
    y0[3, 1, 0, 2] = float("nan")
    with pytest.raises(SolverError, match="not finite") as caught:
        solve(times, "triton")(y0, weight)
    assert caught.value.rows == ([3] if DEVICE.type == "cpu" else [])
    with pytest.raises(SolverError, match="not finite|advances time"):
        solve(times, "triton")(y0.nan_to_num(), weight * 1e200)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_times_that_are_not_positive_are_refused(backend: str, value: float) -> None:
    inputs, times = problem(components=1)
    times[2, 1] = value
    with pytest.raises(ValueError, match="`times` must be positive and finite"):
        solve(times, backend, max_attempts=2)(*inputs)


def test_status_is_read_later_on_a_gpu() -> None:
    record = torch.tensor([0.25, 1e-9, 3, DONE, 1, 4, 1, 0], dtype=torch.float64)
    check_joint_status(record)
    record[3] = UNDERFLOW
    with pytest.raises(SolverError, match=r"at s = 0.25 \(step 1e-09\) it .* no longer advances"):
        check_joint_status(record)


@pytest.mark.parametrize(
    ("record", "attempts"),
    [
        ([1.1, 0.5, 3, DONE, 1, 3, 1.0, 0], MAX_ATTEMPTS),
        ([1.1, 0.1, 16, DONE, 1, 16, 1.0, 0], 32),
        ([1.1, 0.1, 15, DONE, 1, 17, 1.0, 0], 64),
        ([0.9, 0.1, 16, RUNNING, 1, 16, 1.0, 0], 32),  # twice as many, as always
        ([0.2, 0.1, 16, RUNNING, 1, 16, 1.0, 0], 128),  # 80 at this pace, and a quarter more
        ([0.0, 0.1, 0, RUNNING, 0, 16, 1.0, 0], 256),
    ],
)
def test_attempts_of_the_next_solve(record: list[float], attempts: int) -> None:
    assert attempts_to_launch(record) == attempts
