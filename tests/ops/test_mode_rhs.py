"""The right-hand side, all mode interactions and time modes, against the reference module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops.mode_rhs import mode_rhs
from gfnode_fast.reference.propagator import MODE_INTERACTIONS, ModeRHS
from gfnode_fast.reference.time_embedding import TIME_MODES
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

# Relative to the largest value or gradient; measured: fp64 1e-15, fp32 4e-7.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 4e-6}
ROWS, MODES, CHANNELS, TIME_WIDTH = 18, 3, 6, 4  # two programs, the second one partial


def rhs(
    interaction: str,
    time_mode: str = "none",
    dtype: torch.dtype = torch.float64,
    modes: int = MODES,
    channels: int = CHANNELS,
) -> ModeRHS:
    torch.manual_seed(0)
    module = ModeRHS(channels, modes, interaction, time_mode, TIME_WIDTH).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in module.parameters():  # large enough for a softmax that is not flat
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.7)
    return module


def state(rows: int = ROWS, dtype: torch.dtype = torch.float64, **sizes: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (sizes.get("modes", MODES), rows, sizes.get("channels", CHANNELS))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def time(module: ModeRHS) -> Tensor | None:
    return (
        None
        if module.time_mode == "none"
        else torch.tensor(0.013, dtype=torch.float64, device=DEVICE)
    )


def functional(module: ModeRHS, backend: str) -> tuple[Any, list[Tensor]]:
    """(f(y, *parameters), parameters): the module's value as a function of its parameters."""
    names = [name for name, _ in module.named_parameters()]
    s = time(module)
    if s is not None:
        s = s.to(module.weights1.dtype)

    def call(y: Tensor, *parameters: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(
            module, dict(zip(names, parameters, strict=True))
        ):
            if backend == "oracle":
                result: Tensor = module(s, y)
                return result
            return mode_rhs(module, s, y, backend=backend)

    return call, [p.detach() for p in module.parameters()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time_mode", TIME_MODES)
@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_values_and_gradients_are_the_reference(
    backend: str, interaction: str, time_mode: str
) -> None:
    compare_with_reference(backend, interaction, time_mode, torch.float64)


@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_float32(interaction: str) -> None:
    compare_with_reference("triton", interaction, "posenc", torch.float32)


def compare_with_reference(
    backend: str, interaction: str, time_mode: str, dtype: torch.dtype
) -> None:
    module = rhs(interaction, time_mode)
    oracle, parameters = functional(module, "oracle")
    inputs = [state(), *parameters]
    expected = oracle(*inputs)
    expected_grads = gradients(oracle, inputs)
    mine, _ = functional(rhs(interaction, time_mode, dtype), backend)
    inputs = [x.to(dtype) for x in inputs]
    got = mine(*inputs)
    assert got.dtype == dtype
    tolerance = TOLERANCE[dtype]
    if dtype == torch.float32 and time_mode in ("posenc", "rope"):
        tolerance = 2e-5  # the angle 5000 s = 65 is off by 4e-6 in float32
    assert relative_error(got, expected) <= tolerance
    for g, e in zip(gradients(mine, inputs), expected_grads, strict=True):
        if e.abs().max() > 1e-12:  # the keys' bias has none: the softmax does not see it
            assert relative_error(g, e) <= 4 * tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_gradcheck(backend: str, interaction: str) -> None:
    call, parameters = functional(rhs(interaction, "concat", modes=2, channels=2), backend)
    inputs = [state(2, modes=2, channels=2), *parameters]
    leaves = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_second_derivatives_are_right_or_refused(interaction: str) -> None:
    module = rhs(interaction, modes=2, channels=2)
    y = state(2, modes=2, channels=2).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y: mode_rhs(module, None, y).pow(2), y)
    if interaction == "no_interaction":
        assert torch.autograd.gradgradcheck(
            lambda y: mode_rhs(module, None, y, backend="triton").pow(2), y, fast_mode=True
        )
        return
    out = mode_rhs(module, None, y, backend="triton")
    (grad,) = torch.autograd.grad(out.pow(2).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd|does not require grad"):
        grad.pow(2).sum().backward()


def test_opcheck() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True, device=DEVICE)

    ops = torch.ops.gfnode_fast
    y = leaf(3, 2, 2)
    opcheck(ops.mode_linear, y, leaf(2, 2, 2), leaf(2, 2))
    opcheck(ops.mode_mlp, y, leaf(2, 2, 4), leaf(4), leaf(2, 4, 2), leaf(2, 2))
    opcheck(ops.mode_attention, y, leaf(2, 2), leaf(2), leaf(2, 2, 2), leaf(2, 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_compiled(backend: str, interaction: str) -> None:
    module = rhs(interaction, "concat")
    s = time(module)

    def step(y: Tensor) -> Tensor:
        return y + 0.1 * mode_rhs(module, s, y.sin(), backend=backend)

    compiled_equals_eager(step, [state()], TOLERANCE[torch.float64])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_strides(backend: str, interaction: str) -> None:
    module = rhs(interaction)
    call, parameters = functional(module, backend)
    dense = [state(), *parameters]
    views = [strided(x) for x in dense]

    def flipped(*inputs: Tensor) -> Tensor:
        out = call(*inputs)
        return torch.cat((out.permute(2, 1, 0).flatten(), out.flatten()))[1:]

    assert relative_error(flipped(*views), flipped(*dense)) <= TOLERANCE[torch.float64]
    for got, expected in zip(gradients(flipped, views), gradients(flipped, dense), strict=True):
        if expected.abs().max() > 1e-12:
            assert relative_error(got, expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
@pytest.mark.parametrize(("rows", "modes", "channels"), [(0, 2, 3), (1, 1, 1), (17, 2, 33)])
def test_sizes(backend: str, interaction: str, rows: int, modes: int, channels: int) -> None:
    module = rhs(interaction, modes=modes, channels=channels)
    oracle, parameters = functional(module, "oracle")
    mine, _ = functional(module, backend)
    inputs = [state(rows, modes=modes, channels=channels), *parameters]
    if rows == 0:  # the reference cannot reshape an empty batch
        assert mine(*inputs).shape == inputs[0].shape
        assert not any(grad.any() for grad in gradients(mine, inputs))
        return
    assert relative_error(mine(*inputs), oracle(*inputs)) <= TOLERANCE[torch.float64]
    for got, expected in zip(gradients(mine, inputs), gradients(oracle, inputs), strict=True):
        assert relative_error(got, expected) <= 1e-12 or expected.abs().max() < 1e-12


def test_scores_of_any_size() -> None:
    """The running maximum keeps exponentials finite."""
    module = rhs("attention")
    y = state() * 1e3
    got = mode_rhs(module, None, y, backend="triton")
    assert relative_error(got, module(None, y)) <= 1e-9  # rounding of scores of 1e6
    assert torch.isfinite(torch.autograd.grad(
        mode_rhs(module, None, y.requires_grad_(), backend="triton").sum(), y
    )[0]).all()  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"y": torch.zeros(3, 6).double()}, ValueError, "`y` must be (3, R, 6) for weights1"),
        ({"y": torch.zeros(2, 5, 6).double()}, ValueError, "got (2, 5, 6)"),
        ({"y": torch.zeros(3, 5, 6)}, TypeError, "`y` must be torch.float64 like the parameters"),
        (
            {"y": torch.zeros(3, 5, 6, dtype=torch.float64, device="meta")},
            ValueError,
            f"`y` must be on {DEVICE}",
        ),
        ({"s": torch.tensor(0.1)}, ValueError, "`s` must be None with time_mode='none', got ()"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of auto, torch, triton"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"module": rhs("no_interaction"), "s": None, "y": state()} | changes
    with pytest.raises(error) as caught:
        mode_rhs(**arguments)
    assert str(caught.value).startswith("mode_rhs: ")
    assert message in str(caught.value)


def test_a_missing_time_is_refused() -> None:
    with pytest.raises(ValueError, match="`s` must be a 0-dim tensor with time_mode='concat'"):
        mode_rhs(rhs("no_interaction", "concat"), None, state())


def test_what_triton_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = rhs("no_interaction", channels=65)
    with pytest.raises(ValueError, match="at most 64 channels with backend='triton', got 65"):
        mode_rhs(wide, None, state(channels=65), backend="triton")
    half = rhs("no_interaction", dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="must be float32 or float64 with backend='triton'"):
        mode_rhs(half, None, state(dtype=torch.bfloat16), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        mode_rhs(rhs("attention").cpu(), None, state().cpu(), backend="triton")


@pytest.mark.parametrize("interaction", MODE_INTERACTIONS)
def test_deterministic_and_independent_of_batch_mates(interaction: str) -> None:
    module = rhs(interaction)
    y = state()
    once = mode_rhs(module, None, y, backend="triton")
    assert torch.equal(once, mode_rhs(module, None, y, backend="triton"))
    alone = mode_rhs(module, None, y[:, 16:], backend="triton")
    assert torch.equal(once[:, 16:], alone)
