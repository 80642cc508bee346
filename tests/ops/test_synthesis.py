"""The compiled inverse transform of a solve: equal to the float64 formula, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gfnode_fast import FourierMD, reference
from gfnode_fast.ops import synthesis
from gfnode_fast.ops.graph_fourier_torch import sum_beside
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.model import side_by_side
from model_inputs import constructor
from model_inputs import inputs as model_inputs
from op_checks import compiled_equals_eager, opcheck, relative_error
from spectral import outputs_and_gradients, propagator, signals

pytestmark = pytest.mark.skipif(
    synthesis.why_not_compiled() is not None, reason=f"{synthesis.why_not_compiled()}"
)
# Measured: 1e-7.
BOUND = 2e-6
SIZES = [(3, 2, 1, 2, 64, 13), (2, 3, 3, 2, 2, 13), (1, 1, 1, 1, 1, 1), (2, 2, 3, 5, 7, 5)]
SIZES += [(5, 1, 1, 4, 17, 9), (0, 2, 1, 2, 4, 3)]


def inputs(batch: int, times: int, parts: int, modes: int, width: int, atoms: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch + atoms)
    shapes = [(batch, times, parts, modes, width), (batch, atoms, atoms)]
    shapes.append((batch, atoms, parts, width))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def formula(
    values: Tensor,
    eigvecs: Tensor,
    signal: Tensor,
    activation: nn.Module,
    beside: Tensor | None = None,
) -> Tensor:
    kept = eigvecs[:, :, : values.shape[3]]
    out = signal + activation(torch.einsum("bnm,btdmc->tbndc", kept, values))
    return side_by_side(out, beside)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.Tanh()], ids=str)
@pytest.mark.usefixtures("poison_all_memory")
def test_against_the_formula(size: tuple[int, ...], activation: nn.Module) -> None:
    exact = inputs(*size)
    single = [tensor.float() for tensor in exact]
    for values, _, signal in (exact, single):
        values.requires_grad_()
        signal.requires_grad_()
    batch, times, components = size[:3]
    beside = torch.randn(times, batch, 5) if components == 1 else None
    assert synthesis.serves(*single, activation, beside)
    expected = formula(*exact, activation, beside)
    actual = synthesis.synthesise_solved(*single, activation, beside)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) < BOUND
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    wanted = torch.autograd.grad(expected, (exact[0], exact[2]), cotangent.double())
    got = torch.autograd.grad(actual, (single[0], single[2]), cotangent)
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.shape == theirs.shape
        assert relative_error(mine, theirs) < BOUND


def test_strides_and_determinism() -> None:
    values, eigvecs, signal = (tensor.float() for tensor in inputs(3, 2, 3, 2, 4, 5))
    first = synthesis.synthesise_solved(values, eigvecs, signal, nn.SiLU())
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (values, eigvecs, signal)]
    assert torch.equal(first, synthesis.synthesise_solved(*turned, nn.SiLU()))
    shared = eigvecs[:1].expand(3, -1, -1)
    again = synthesis.synthesise_solved(values, shared, signal, nn.SiLU())
    alone = synthesis.synthesise_solved(values[2:], eigvecs[:1], signal[2:], nn.SiLU())
    assert torch.equal(again[:, 2:], alone)


def test_registered() -> None:
    values, eigvecs, signal = (tensor.float() for tensor in inputs(2, 2, 1, 2, 4, 5))
    rows = signal.flatten(2)
    ops = torch.ops.gfnode_fast
    for width in (0, 3):
        given = (values.detach(), eigvecs, rows.detach(), torch.randn(2, 2, width), 0)
        opcheck(ops.synthesis_beside_backward, ops.synthesis_beside(*given), *given)
        opcheck(
            ops.synthesis_beside,
            values.requires_grad_(),
            eigvecs,
            rows.requires_grad_(),
            *given[3:],
        )


def test_second_derivatives_are_refused() -> None:
    values, eigvecs, signal = (tensor.float() for tensor in inputs(2, 2, 1, 2, 4, 5))
    out = synthesis.synthesise_solved(values.requires_grad_(), eigvecs, signal, nn.SiLU())
    (grad,) = torch.autograd.grad(out.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("basis", ["graph", "linear", None])
def test_propagate_with_an_activation(activation: nn.Module, basis: str | None) -> None:
    """Compiled or not, it is the signal plus the activation of what was propagated."""
    model = propagator(basis, num_modes=5 if basis is None else 3).float()
    given = [tensor.float() for tensor in signals(components=3)]

    def apart(*arguments: Tensor) -> Tensor:
        return arguments[1] + activation(propagate(*arguments))

    def together(*arguments: Tensor) -> Tensor:
        return propagate(*arguments, activation=activation)

    expected = outputs_and_gradients(apart, model, *given)
    actual = outputs_and_gradients(together, model, *given)
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-5, name


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.ReLU()], ids=str)
@pytest.mark.parametrize("basis", ["graph", "linear", None])
def test_propagate_beside_an_embedding(activation: nn.Module, basis: str | None) -> None:
    """In C++ and in PyTorch, the result and the embedding in one tensor."""
    model = propagator(basis, num_modes=5 if basis is None else 3).float()
    given = [tensor.float() for tensor in signals()]
    beside = torch.randn(4, 3, 2)

    def apart(*arguments: Tensor) -> Tensor:
        return side_by_side(propagate(*arguments, activation=activation), beside)

    def together(*arguments: Tensor) -> Tensor:
        out = propagate(*arguments, activation=activation, beside=beside)
        assert out.is_contiguous()
        return out

    expected = outputs_and_gradients(apart, model, *given)
    actual = outputs_and_gradients(together, model, *given)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_gradient_of_an_embedding(backend: str) -> None:
    """Of times with a gradient, which the published model takes without a solve."""
    settings = constructor(no_ode=True)
    torch.manual_seed(0)
    models = reference.FourierMD(**settings), FourierMD(**settings, backend=backend)
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model in models:
        given = model_inputs()
        given["timeframes"].requires_grad_()
        model(**given)[2].square().sum().backward()
        found.append(given["timeframes"].grad)
    assert relative_error(found[1], found[0]) < 1e-5


def test_a_sum_beside_an_embedding_traced_whole() -> None:
    signal, activated, beside = torch.randn(3, 5, 2), torch.randn(4, 3, 5, 2), torch.randn(4, 3, 6)

    def run(*tensors: Tensor) -> Tensor:
        return sum_beside(*tensors, None)

    compiled_equals_eager(run, [signal, activated, beside], BOUND)


def test_what_stands_beside_is_checked() -> None:
    model, given = propagator(), signals()
    beside = torch.zeros(4, 3, 2, dtype=torch.float64)
    for wrong, options, error, message in (
        (beside, {}, ValueError, "`beside` must come with `activation`"),
        (beside[:3], {"activation": nn.SiLU()}, ValueError, r"`beside` must be \(4, 3, W\)"),
        (beside.float(), {"activation": nn.SiLU()}, TypeError, "`beside` must be torch.float64"),
    ):
        with pytest.raises(error, match=message):
            propagate(model, *given, beside=wrong, **options)
    with pytest.raises(ValueError, match="D = 1, got D = 3"):
        propagate(model, *signals(components=3), beside=beside, activation=nn.SiLU())
