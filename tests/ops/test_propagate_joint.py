"""The joint solve of linear dynamics on the device, against the published solve in torch."""

from __future__ import annotations

from typing import Any

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
    compiled_equals_eager,
    gradients,
    opcheck,
    relative_error,
    strided,
)

pytestmark = OF_KERNELS

# Relative to the largest value or gradient; measured: fp64 3e-15, fp32 5e-7 (a norm's rounding in
# fp32 moves the first step, and with it the dense output within the solver's own error).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
BATCH, MODES, COMPONENTS, CHANNELS, TIMES = 7, 2, 3, 3, 3  # 21 rows: two programs, one partial


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(
    size: float = 0.5,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = BATCH,
    modes: int = MODES,
    components: int = COMPONENTS,
    channels: int = CHANNELS,
    times: int = TIMES,
    affine: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """(y0, W) or (y0, W, b), times."""
    weight = randn(modes, channels, channels, dtype=dtype, seed=1) * size
    y0 = randn(batch, modes, components, channels, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    own = torch.rand(batch, times, generator=generator, dtype=torch.float64) * 0.98 + 0.02
    slope = [randn(modes, channels, dtype=dtype, seed=2) * (size * 20)] if affine else []
    return [y0, weight, *slope], own.sort(dim=1)[0].to(DEVICE)


def late_growth(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor]:
    """(y0, W), times: yW and yWW are small and yWWW is not, so the first step is too large."""
    (y0, weight), times = problem(dtype=dtype, batch=17, components=1, times=2)
    y0[..., 1:] = 0
    weight.zero_()
    weight[:, 0, 1] = weight[:, 1, 2] = 1
    weight[:, 2, 0] = 1e6
    return [y0, weight], times * 0.04


def solve(times: Tensor, backend: str, **options: Any) -> Any:
    def call(y0: Tensor, weight: Tensor, slope: Tensor | None = None) -> Tensor:
        values, status = propagate_joint(y0, weight, times, slope=slope, backend=backend, **options)
        if not torch.compiler.is_compiling():
            check_joint_status(status)  # on a GPU nobody else does
        return values

    return call


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
    pairs = zip(
        gradients(solve(times, "triton", **options), inputs),
        gradients(published, wide),
        strict=True,
    )
    for mine, exact in pairs:
        assert relative_error(mine, exact) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_affine_dynamics(dtype: torch.dtype) -> None:
    """Several steps, so that the time of a step's start counts, and moves with the first size."""
    inputs, times = problem(2.0, dtype, batch=17, components=1, times=2, affine=True)
    wide, options = [x.double() for x in inputs], {"max_attempts": 9}
    got, status = propagate_joint(*inputs[:2], times, slope=inputs[2], backend="triton", **options)
    published = solve(times, "torch")
    assert status[2] > 2
    assert relative_error(got, published(*wide)) <= TOLERANCE[dtype]
    triton = gradients(solve(times, "triton", **options), inputs)
    for mine, exact in zip(triton, gradients(published, wide), strict=True):
        assert relative_error(mine, exact) <= TOLERANCE[dtype]


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
    expected = gradients(solve(times, "torch"), inputs)
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 1)
    triton = solve(times, "triton", max_attempts=4)
    assert relative_error(triton(*inputs), solve(times, "torch")(*inputs)) <= 1e-12
    for got, exact in zip(gradients(triton, inputs), expected, strict=True):
        assert relative_error(got, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(affine: bool) -> None:
    inputs, times = problem(batch=2, components=1, channels=2, times=2, affine=affine)
    leaves = [x.requires_grad_() for x in inputs]
    call = solve(times, "triton", max_attempts=4)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    inputs, times = problem(batch=1, components=1, times=1)
    y0, weight = (x.requires_grad_() for x in inputs)
    out = solve(times, "triton", max_attempts=4)(y0, weight)
    (grad,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd|does not require grad"):
        grad.pow(2).sum().backward()


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine: bool) -> None:
    sizes = {"batch": 2, "components": 1, "channels": 2, "times": 1}
    inputs, times = problem(dtype=torch.float32, affine=affine, **sizes)
    y0, weight, *slope = (x.requires_grad_() for x in inputs)
    operator = torch.ops.gfnode_fast.propagate_joint
    opcheck(operator, y0, weight, slope[0] if affine else None, times, "dopri5", 1e-3, 1e-4, 2)


def test_compiled() -> None:
    inputs, times = problem(dtype=torch.float32, batch=2, components=1)
    call = solve(times, "triton", max_attempts=4)
    compiled_equals_eager(call, inputs, 1e-6)


def test_strides() -> None:
    inputs, times = problem(dtype=torch.float32, batch=2, times=2)

    def permuted(*values: Tensor) -> Tensor:
        out = solve(strided(times), "triton", max_attempts=4)(*values)
        return torch.cat((out.permute(1, 3, 4, 2, 0).flatten(), out.flatten()))[1:]

    views = [strided(x) for x in inputs]
    assert torch.equal(permuted(*views), permuted(*inputs))
    for got, expected in zip(gradients(permuted, views), gradients(permuted, inputs), strict=True):
        assert relative_error(got, expected) <= 1e-6


@pytest.mark.parametrize(
    ("batch", "modes", "components", "channels", "times"),
    [(0, 2, 1, 2, 2), (2, 2, 1, 2, 0), (1, 1, 1, 1, 1), (1, 1, 2, 33, 1)],
)
def test_sizes(batch: int, modes: int, components: int, channels: int, times: int) -> None:
    sizes = {"batch": batch, "modes": modes, "components": components, "channels": channels}
    inputs, own = problem(0.2, times=times, **sizes)
    triton, published = solve(own, "triton", max_attempts=4), solve(own, "torch")
    assert relative_error(triton(*inputs), published(*inputs)) <= TOLERANCE[torch.float64]
    pairs = zip(gradients(triton, inputs), gradients(published, inputs), strict=True)
    for mine, exact in pairs:
        assert relative_error(mine, exact) <= TOLERANCE[torch.float64]


def test_zero_state_and_zero_weight() -> None:
    inputs, times = problem(batch=2, components=1)
    for factors in ((0.0, 1.0), (1.0, 0.0)):
        scaled = [x * factor for x, factor in zip(inputs, factors, strict=True)]
        triton, published = (solve(times, b, max_attempts=8) for b in ("triton", "torch"))
        assert torch.equal(triton(*scaled), published(*scaled))
        for grad in gradients(triton, scaled):
            assert torch.isfinite(grad).all()


def test_deterministic() -> None:
    inputs, times = problem(dtype=torch.float32, components=1, batch=17, times=1)
    call = solve(times, "triton", max_attempts=3)
    assert torch.equal(call(*inputs), call(*inputs))
    for once, again in zip(gradients(call, inputs), gradients(call, inputs), strict=True):
        assert torch.equal(once, again)


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


def arguments(**changes: Any) -> dict[str, Any]:
    (y0, weight), times = problem(dtype=torch.float32, batch=2)
    return {"y0": y0, "weight": weight, "times": times, "backend": "triton"} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y0": torch.zeros(2, 2, 3)}, ValueError, "`y0` must be (B, M, D, C), got (2, 2, 3)"),
        ({"weight": torch.zeros(2, 3, 4)}, ValueError, "`weight` must be (2, 3, 3) for y0"),
        ({"times": torch.ones(3, 2)}, ValueError, "`times` must be (2, T), got (3, 2)"),
        ({"solver": "rk4"}, ValueError, "`solver` must be one of dopri5, bosh3"),
        ({"solver": "fehlberg2"}, ValueError, "must be one of dopri5, bosh3, dopri8 with backend="),
        ({"max_attempts": 0}, ValueError, "`max_attempts` must be at least 1, got 0"),
        ({"max_attempts": 9.0}, TypeError, "`max_attempts` must be an int, got float"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of auto, torch, triton"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        propagate_joint(**arguments(**changes))
    assert str(caught.value).startswith("propagate_joint: ")
    assert message in str(caught.value)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments().items()}
        propagate_joint(**given)
