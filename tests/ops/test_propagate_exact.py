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
    compiled_equals_eager,
    gradients,
    opcheck,
    relative_error,
    strided,
)

pytestmark = OF_KERNELS

# Relative to the largest value or gradient, times max(1, ‖W‖); measured: fp64 1e-15, fp32 5e-7.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6}
BATCH, MODES, COMPONENTS, CHANNELS, TIMES = 7, 2, 3, 3, 3  # 21 rows: two programs, one partial


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def problem(
    norm: float = 0.2,
    dtype: torch.dtype = torch.float64,
    *,
    affine: bool = True,
    batch: int = BATCH,
    modes: int = MODES,
    components: int = COMPONENTS,
    channels: int = CHANNELS,
    times: int = TIMES,
) -> tuple[list[Tensor], Tensor]:
    """(y0, W, b), times; ‖W‖ is about `norm`."""
    weight = randn(modes, channels, channels, dtype=dtype, seed=1) * (norm / (2 * channels**0.5))
    inputs = [randn(batch, modes, components, channels, dtype=dtype), weight]
    if affine:
        inputs.append(randn(modes, channels, dtype=dtype, seed=2))
    generator = torch.Generator().manual_seed(3)
    own = torch.rand(batch, times, generator=generator, dtype=torch.float64) * 0.98 + 0.02
    return inputs, own.sort(dim=1)[0].to(DEVICE)


def solve(times: Tensor, backend: str) -> Any:
    def call(y0: Tensor, weight: Tensor, slope: Tensor | None = None) -> Tensor:
        values, status = propagate_exact(y0, weight, times, slope=slope, backend=backend)
        if not torch.compiler.is_compiling():
            check_status(status)  # on a GPU nobody else does
        return values

    return call


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
    pairs = zip(
        gradients(solve(times, backend), inputs), gradients(oracle(times), wide), strict=True
    )
    for mine, exact in pairs:
        assert relative_error(mine, exact) <= tolerance


def test_more_steps_than_backward_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(6.0, torch.float32, batch=2, components=1)
    expected = gradients(solve(times, "triton"), inputs)
    monkeypatch.setattr(launch, "MAX_STARTS", 1)
    for got, kept in zip(gradients(solve(times, "triton"), inputs), expected, strict=True):
        assert torch.equal(got, kept)


def test_more_tiles_of_rows_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(dtype=torch.float32)
    expected = gradients(oracle(times), [x.double() for x in inputs])
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 1)
    for got, exact in zip(gradients(solve(times, "triton"), inputs), expected, strict=True):
        assert relative_error(got, exact) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("affine", [False, True])
def test_gradcheck(affine: bool) -> None:
    inputs, times = problem(affine=affine, batch=2, components=1, channels=2, times=2)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(solve(times, "triton"), leaves, fast_mode=True)


def test_second_derivatives_are_refused() -> None:
    inputs, times = problem(batch=1, components=1, times=1)
    y0, weight, slope = (x.requires_grad_() for x in inputs)
    for backend in BACKENDS:
        out = solve(times, backend)(y0, weight, slope)
        (grad,) = torch.autograd.grad(out.sum(), weight, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable|no autograd|does not require"):
            grad.pow(2).sum().backward()


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine: bool) -> None:
    inputs, times = problem(
        dtype=torch.float32, affine=affine, batch=2, components=1, channels=2, times=1
    )
    y0, weight, *slope = (x.requires_grad_() for x in inputs)
    plan = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    operator = torch.ops.gfnode_fast.propagate_exact
    opcheck(operator, y0, weight, slope[0] if affine else None, times.float(), plan)


def test_compiled() -> None:
    inputs, times = problem(dtype=torch.float32, batch=2, components=1)
    compiled_equals_eager(solve(times, "triton"), inputs, TOLERANCE[torch.float32])


def test_strides() -> None:
    inputs, times = problem(dtype=torch.float32, batch=2, times=2)

    def permuted(*values: Tensor) -> Tensor:
        out = solve(strided(times), "triton")(*values)
        return torch.cat((out.permute(1, 3, 4, 2, 0).flatten(), out.flatten()))[1:]

    views = [strided(x) for x in inputs]
    assert torch.equal(permuted(*views), permuted(*inputs))
    for got, expected in zip(gradients(permuted, views), gradients(permuted, inputs), strict=True):
        assert relative_error(got, expected) <= TOLERANCE[torch.float32]


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
    pairs = zip(gradients(solve(own, backend), inputs), gradients(oracle(own), wide), strict=True)
    for mine, exact in pairs:
        assert relative_error(mine, exact) <= TOLERANCE[torch.float32]


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
    for a, b in zip(
        gradients(solve(times, "triton"), inputs),
        gradients(solve(times, "triton"), inputs),
        strict=True,
    ):
        assert torch.equal(a, b)


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


def arguments(**changes: Any) -> dict[str, Any]:
    (y0, weight, slope), times = problem(dtype=torch.float32, batch=2)
    return {"y0": y0, "weight": weight, "slope": slope, "times": times} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y0": torch.zeros(2, 2, 3)}, ValueError, "`y0` must be (B, M, D, C), got (2, 2, 3)"),
        ({"weight": torch.zeros(2, 3, 4)}, ValueError, "`weight` must be (2, 3, 3) for y0"),
        ({"weight": torch.zeros(2, 3, 3).double()}, TypeError, "`weight` must be torch.float32"),
        (
            {"weight": torch.zeros(2, 3, 3, device="meta")},
            ValueError,
            f"`weight` must be on {DEVICE}",
        ),
        ({"slope": torch.zeros(3, 2)}, ValueError, "`slope` must be (2, 3) for y0"),
        ({"times": torch.ones(3, 2)}, ValueError, "`times` must be (2, T), got (3, 2)"),
        ({"times": torch.ones(2, 2).long()}, TypeError, "`times` must be floating point"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of auto, torch, triton"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        propagate_exact(**arguments(**changes))
    assert str(caught.value).startswith("propagate_exact: ")
    assert message in str(caught.value)


def test_what_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = problem(channels=65, dtype=torch.float32)
    with pytest.raises(ValueError, match="at most 64 channels with backend='triton', got 65"):
        solve(times, "triton")(*inputs)
    inputs, times = problem(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="must be float32 or float64 with backend='triton'"):
        solve(times, "triton")(*inputs)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        given = {k: v.cpu() for k, v in arguments().items()}
        propagate_exact(**given, backend="triton")
