"""The joint solve of attention on the device, against the published solve in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.kernels import propagate_attention_launch as launch
from gfnode_fast.ops import dispatch
from gfnode_fast.ops.joint_status import DONE, check_joint_status
from gfnode_fast.ops.propagate_attention import propagate_attention
from gfnode_fast.solvers.errors import SolverError
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

# Relative to the largest value or gradient; measured: fp64 1e-11 (the initial step divides a small
# difference of slopes by a small time, on either side), fp32 1e-6.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(
    size: float = 0.3,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    modes: int = 2,
    components: int = 1,
    channels: int = 3,
    times: int = 2,
    in_time: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """(y0, P, q, W, b), times."""
    rows = 2 if in_time else 1
    shapes = (
        (batch, modes, components, channels), (channels, channels), (rows, channels),
        (modes, channels, channels), (rows, modes, channels),
    )  # fmt: skip
    inputs = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    inputs[3] *= size
    inputs[4] *= size
    generator = torch.Generator().manual_seed(9)
    own = torch.rand(batch, times, generator=generator, dtype=torch.float64) * 0.98 + 0.02
    return inputs, own.sort(dim=1)[0].to(DEVICE)


def solve(times: Tensor, backend: str, **options: Any) -> Any:
    def call(*inputs: Tensor) -> Tensor:
        values, status = propagate_attention(*inputs, times, backend=backend, **options)
        if not torch.compiler.is_compiling():
            check_joint_status(status)  # on a GPU nobody else does
        return values

    return call


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
    triton = gradients(solve(times, "triton", **options), inputs)
    for mine, exact in zip(triton, gradients(published, inputs), strict=True):
        assert relative_error(mine, exact) <= tolerance


@pytest.mark.slow
def test_float32_is_deterministic_and_takes_strides() -> None:
    inputs, times = problem(dtype=torch.float32, times=1)
    call = solve(times, "triton", max_attempts=2)
    expected = solve(times, "torch")(*(x.double() for x in inputs))
    got = call(*inputs)
    assert got.dtype == torch.float32
    assert relative_error(got, expected) <= TOLERANCE[torch.float32]

    def permuted(*values: Tensor) -> Tensor:
        out = solve(strided(times), "triton", max_attempts=2)(*values)
        return torch.cat((out.permute(1, 3, 4, 2, 0).flatten(), out.flatten()))[1:]

    views = [strided(x) for x in inputs]
    assert torch.equal(permuted(*views), permuted(*inputs))
    for a, b in zip(gradients(permuted, views), gradients(permuted, inputs), strict=True):
        assert torch.equal(a, b)
    wide = gradients(solve(times, "torch"), [x.double() for x in inputs])
    for mine, exact in zip(gradients(call, inputs), wide, strict=True):
        assert relative_error(mine, exact) <= TOLERANCE[torch.float32]


@pytest.mark.slow
def test_gradcheck() -> None:
    inputs, times = problem(0.1, batch=1, channels=2, times=1)
    leaves = [x.requires_grad_() for x in inputs]
    call = solve(times, "triton", max_attempts=2)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.slow
def test_opcheck_and_second_derivatives() -> None:
    inputs, times = problem(0.1, torch.float32, batch=1, channels=2, times=1)
    times *= 1e-3  # in the first step
    leaves = [x.requires_grad_() for x in inputs]
    operator = torch.ops.gfnode_fast.propagate_attention
    opcheck(operator, *leaves, times, "dopri5", 1e-3, 1e-4, 1)
    out, *_ = operator(*leaves, times, "dopri5", 1e-3, 1e-4, 1)
    (grad,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd|does not require grad"):
        grad.pow(2).sum().backward()


@pytest.mark.slow
def test_compiled() -> None:
    inputs, times = problem(dtype=torch.float32, batch=1, times=1)
    compiled_equals_eager(solve(times, "triton", max_attempts=2), inputs, 1e-6)


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


def arguments(**changes: Any) -> dict[str, Any]:
    (y0, key, query_bias, weight, bias), times = problem(dtype=torch.float32)
    given = {"y0": y0, "key": key, "query_bias": query_bias, "weight": weight, "bias": bias}
    return given | {"times": times, "backend": "triton"} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y0": torch.zeros(2, 2, 3)}, ValueError, "`y0` must be (B, M, D, C), got (2, 2, 3)"),
        ({"key": torch.zeros(3, 4)}, ValueError, "`key` must be (3, 3) for y0"),
        ({"query_bias": torch.zeros(3, 3)}, ValueError, "`query_bias` must be (1, C) or (2, C)"),
        ({"weight": torch.zeros(2, 3, 4)}, ValueError, "`weight` must be (2, 3, 3) for y0"),
        ({"bias": torch.zeros(1, 2, 3)}, ValueError, "`bias` must be (2, 2, 3) for y0"),
        ({"times": torch.ones(3, 2)}, ValueError, "`times` must be (2, T), got (3, 2)"),
        ({"solver": "rk4"}, ValueError, "`solver` must be one of dopri5, bosh3"),
        ({"solver": "fehlberg2"}, ValueError, "must be one of dopri5, bosh3, dopri8 with backend="),
        ({"max_attempts": 0}, ValueError, "`max_attempts` must be at least 1, got 0"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        propagate_attention(**arguments(**changes))
    assert str(caught.value).startswith("propagate_attention: ")
    assert message in str(caught.value)


def test_what_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(modes=17, batch=1)
    with pytest.raises(ValueError, match="at most 16 modes with backend='triton', got 17"):
        solve(times, "triton")(*inputs)
    inputs, times = problem(channels=65, batch=1)
    with pytest.raises(ValueError, match="at most 64 channels with backend='triton', got 65"):
        solve(times, "triton")(*inputs)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments().items()}
        propagate_attention(**given)


def test_auto_leaves_more_modes_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "choose_automatically", lambda device: ("triton", "a row"))
    inputs, times = problem(modes=17, batch=1)
    assert torch.equal(solve(times, "auto")(*inputs), solve(times, "torch")(*inputs))
