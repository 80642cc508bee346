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


RAGGED = [(5, 3, 5, 1, 13), (2, 2), (0, 4, 0), (1,), ()]


@pytest.mark.parametrize("sizes", RAGGED, ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.usefixtures("poison_all_memory")
def test_molecules_of_different_size(sizes: tuple[int, ...], parts: int) -> None:
    """Bit by bit what each has alone; zeros as gradient of modes that a molecule does not have."""
    modes, times, width = 3, 2, 7
    alone = [inputs(1, times, parts, min(modes, n), width, n) for n in sizes]
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(len(sizes), times, parts, modes, width, generator=generator)
    for b, (own, _, _) in enumerate(alone):
        values[b, :, :, : own.shape[3]] = own[0]
    eigvecs = torch.cat([torch.zeros(0), *(u.float().flatten() for _, u, _ in alone)])
    signal = torch.cat([torch.zeros(0, parts, width), *(x[0].float() for _, _, x in alone)])
    beside = torch.randn(times, len(sizes), 5, generator=generator) if parts == 1 else None
    values.requires_grad_()
    signal.requires_grad_()
    assert synthesis.serves(values, eigvecs, signal, nn.SiLU(), beside)
    out = synthesis.synthesise_solved(values, eigvecs, signal, nn.SiLU(), beside, ptr)
    cotangent = torch.randn(out.shape, generator=generator)
    grad_values, grad_signal = torch.autograd.grad(out, (values, signal), cotangent)
    assert out.shape == (times, sum(sizes), parts, width + 5 * (parts == 1))
    for b, n in enumerate(sizes):
        if n == 0:
            assert not grad_values[b].any()
            continue
        atoms, kept = slice(ptr[b], ptr[b + 1]), min(modes, n)
        own_values, u, own_signal = (tensor.float() for tensor in alone[b])
        own_values.requires_grad_()
        own_signal.requires_grad_()
        own_beside = None if beside is None else beside[:, b : b + 1]
        expected = synthesis.synthesise_solved(own_values, u, own_signal, nn.SiLU(), own_beside)
        assert torch.equal(out[:, None, atoms], expected)
        grads = torch.autograd.grad(
            expected, (own_values, own_signal), cotangent[:, None, atoms].contiguous()
        )
        assert torch.equal(grad_values[b : b + 1, :, :, :kept], grads[0])
        assert not grad_values[b, :, :, kept:].any()
        assert torch.equal(grad_signal[None, atoms], grads[1])


@pytest.mark.parametrize(
    ("ptr", "message"),
    [
        ([0, 4, 2, 6], "`ptr` must ascend, got -2 atoms of molecule 1"),
        ([1, 2, 4, 6], "`ptr` must begin with 0, got 1"),
        ([0, 2, 4], "`ptr` has the wrong shape"),
        ([0, 3, 4, 6], "`eigvecs` has the wrong shape"),
        ([0.0, 2.0, 4.0, 6.0], "`ptr` has the wrong dtype"),
    ],
)
def test_offsets_are_checked(ptr: list[float], message: str) -> None:
    values, signal = torch.randn(3, 2, 1, 2, 4), torch.randn(6, 1, 4)
    with pytest.raises(RuntimeError, match=message):
        synthesis.synthesise_solved(
            values, torch.randn(12), signal, nn.SiLU(), ptr=torch.tensor(ptr)
        )


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
    flat = eigvecs.flatten(), rows.flatten(0, 1)
    for width, (u, x), ptr in ((0, (eigvecs, rows), None), (3, flat, torch.tensor([0, 5, 10]))):
        given = (values.detach(), u, x.detach(), torch.randn(2, 2, width), 0, ptr)
        opcheck(ops.synthesis_backward, ops.synthesis(*given), *given)
        opcheck(
            ops.synthesis,
            values.requires_grad_(),
            u,
            x.detach().requires_grad_(),
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


def test_propagate_molecules_of_different_size() -> None:
    """In C++ and in PyTorch; one of them has fewer atoms than modes."""
    model, ptr = propagator().float(), torch.tensor([0, 5, 7, 12])
    signal, times, eigvecs = (tensor.float() for tensor in signals())
    squares = [eigvecs[0], torch.linalg.qr(eigvecs[1, :2, :2])[0], eigvecs[2]]
    given = signal.flatten(0, 1)[:12], times, torch.cat([u.flatten() for u in squares])
    beside = torch.randn(4, 3, 2)
    found = [
        outputs_and_gradients(
            lambda *tensors, backend=backend: propagate(
                *tensors, activation=nn.SiLU(), beside=beside, ptr=ptr, transforms=backend
            ),
            model,
            *given,
        )
        for backend in ("auto", "torch")
    ]
    for name, value in found[1].items():
        assert relative_error(found[0][name], value) < 1e-5, name


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
