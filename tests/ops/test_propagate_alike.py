"""What the exact and both joint solves by Triton promise alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from op_checks import (
    DEVICE,
    OF_KERNELS,
    compiled_equals_eager,
    gradients,
    relative_error,
    strided,
)
from solve_cases import ATTENTION, EXACT, JOINT, Case

pytestmark = OF_KERNELS

TOLERANCE = 1e-6  # of fp32, relative to the largest value or gradient; measured 2e-7
CASES = [
    pytest.param(EXACT, id="exact"),
    pytest.param(JOINT, id="joint"),
    pytest.param(ATTENTION, id="attention", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        *((case, {"affine": affine}) for case in (EXACT, JOINT) for affine in (False, True)),
        pytest.param(ATTENTION, {}, marks=pytest.mark.slow),
    ],
)
def test_gradcheck(case: Case, changes: dict[str, Any]) -> None:
    inputs, times = case.make(**case.tiny, **changes)
    leaves = [x.requires_grad_() for x in inputs]
    call = case.solve(times, "triton", **case.options)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("case", CASES)
def test_second_derivatives_are_refused(case: Case) -> None:
    inputs, times = case.make(**case.tiny)
    leaves = [x.requires_grad_() for x in inputs]
    for backend in ("triton", "torch") if case is EXACT else ("triton",):
        out = case.solve(times, backend, **case.options)(*leaves)
        (grad,) = torch.autograd.grad(out.sum(), leaves[1], create_graph=True)
        with pytest.raises(RuntimeError, match="for a second derivative|no autograd"):
            grad.pow(2).sum().backward()


@pytest.mark.parametrize("case", CASES)
def test_compiled(case: Case) -> None:
    inputs, times = case.make(dtype=torch.float32, **case.tiny)
    compiled_equals_eager(case.solve(times, "triton", **case.options), inputs, TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_strides(case: Case) -> None:
    """The same bits; gradients for a cotangent with strides of its own."""
    inputs, times = case.make(dtype=torch.float32, batch=2, times=2)

    def permuted(*values: Tensor) -> Tensor:
        out = case.solve(strided(times), "triton", **case.options)(*values)
        return torch.cat((out.permute(1, 3, 4, 2, 0).flatten(), out.flatten()))[1:]

    views = [strided(x) for x in inputs]
    assert torch.equal(permuted(*views), permuted(*inputs))
    for mine, other in zip(gradients(permuted, views), gradients(permuted, inputs), strict=True):
        assert relative_error(mine, other) <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_deterministic(case: Case) -> None:
    inputs, times = case.make(dtype=torch.float32, times=1)
    call = case.solve(times, "triton", **case.options)
    assert torch.equal(call(*inputs), call(*inputs))
    for once, again in zip(gradients(call, inputs), gradients(call, inputs), strict=True):
        assert torch.equal(once, again)


ALL = (EXACT, JOINT, ATTENTION)
OF_ALL: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"y0": torch.zeros(2, 2, 3)}, ValueError, "`y0` must be (B, M, D, C), got (2, 2, 3)"),
    ({"weight": torch.zeros(2, 3, 4)}, ValueError, "`weight` must be (2, 3, 3) for y0"),
    ({"weight": torch.zeros(2, 3, 3).double()}, TypeError, "`weight` must be torch.float32"),
    ({"weight": torch.zeros(2, 3, 3).to("meta")}, ValueError, f"`weight` must be on {DEVICE}"),
    ({"times": torch.ones(3, 2)}, ValueError, "`times` must be (2, T), got (3, 2)"),
    ({"times": torch.ones(2, 2).long()}, TypeError, "`times` must be floating point"),
    ({"backend": "cuda"}, ValueError, "`backend` must be one of auto, torch, triton"),
]
OF_JOINT: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"solver": "rk4"}, ValueError, "`solver` must be one of dopri5, bosh3"),
    ({"solver": "fehlberg2"}, ValueError, "must be one of dopri5, bosh3, dopri8 with backend="),
    ({"max_attempts": 0}, ValueError, "`max_attempts` must be at least 1, got 0"),
    ({"max_attempts": 9.0}, TypeError, "`max_attempts` must be an int, got float"),
]


@pytest.mark.parametrize(
    ("case", "changes", "error", "message"),
    [
        *((case, *row) for case in ALL for row in OF_ALL),
        *((case, *row) for case in (JOINT, ATTENTION) for row in OF_JOINT),
        (EXACT, {"slope": torch.zeros(3, 2)}, ValueError, "`slope` must be (2, 3) for y0"),
        (JOINT, {"slope": torch.zeros(3, 2)}, ValueError, "`slope` must be (2, 3) for y0"),
        (ATTENTION, {"key": torch.zeros(3, 4)}, ValueError, "`key` must be (3, 3) for y0"),
        (ATTENTION, {"query_bias": torch.zeros(3, 3)}, ValueError, "must be (1, C) or (2, C)"),
        (ATTENTION, {"bias": torch.zeros(1, 2, 3)}, ValueError, "`bias` must be (2, 2, 3) for y0"),
    ],
)
def test_what_is_refused(
    case: Case, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        case.operation(**case.arguments(**changes))
    assert str(caught.value).startswith(f"{case.operation.__name__}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("case", ALL)
def test_what_triton_does_not_serve(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, times = case.make(channels=65, batch=1)
    with pytest.raises(ValueError, match="at most 64 channels with backend='triton', got 65"):
        case.solve(times, "triton")(*inputs)
    inputs, times = case.make(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="must be float32 or float64 with backend='triton'"):
        case.solve(times, "triton")(*inputs)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in case.arguments().items()}
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        case.operation(**given)
