"""Functions of symmetric matrices: right gradients at repeated and at close eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from gfnode_fast.ops.matrix_function import _divided_differences, matrix_function
from op_checks import compiled_equals_eager, gradients, relative_error, strided
from symmetric_matrices import DTYPES, KINDS, random

# Repeated: 0 6 ... 6; 0 1 ... 1 6; 0 1 1 3 3 4; 0 ... 0; 1 ... 1; 0 0 0 1 1 1.
REPEATED = ("complete", "star", "ring", "zero", "identity", "repeated")
# Of values and gradients; measured: 6e-7 and 2e-15.
BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}
# Of divided differences at any gap, over the largest; measured: 8e-4 and 1e-9.
GAPS = {torch.float32: 5e-3, torch.float64: 1e-8}


def heat(A: Tensor, t: Tensor, sizes: Tensor | None = None, backend: str = "auto") -> Tensor:
    return matrix_function((A + A.mT) / 2, lambda w: torch.exp(-t * w), sizes, backend=backend)


def shapes(n: int = 6) -> Tensor:
    return torch.stack([KINDS[kind](n) for kind in REPEATED])


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_matrix_exponential(dtype: torch.dtype) -> None:
    """Whose gradient in torch is that of a series, without eigenvectors."""
    given = [torch.cat((shapes(), random(6, batch=(2,)))), torch.tensor([0.7]).double()]

    def expected(A: Tensor, t: Tensor) -> Tensor:
        return torch.matrix_exp(-t * (A + A.mT) / 2)

    single = [tensor.to(dtype) for tensor in given]
    assert relative_error(heat(*single), expected(*given)) < BOUND[dtype]
    for got, want in zip(gradients(heat, single), gradients(expected, given), strict=True):
        assert relative_error(got, want) < BOUND[dtype]


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_gradcheck_with_repeated_eigenvalues(backend: str) -> None:
    A, t = shapes().requires_grad_(), torch.tensor(0.7).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda A, t: heat(A, t, backend=backend), (A, t))


SMOOTH = [torch.sin, lambda w: -torch.expm1(-w), lambda w: w**3, lambda w: 1 / (7 - w)]


@pytest.mark.parametrize("g", [*SMOOTH, torch.ones_like])
def test_gradcheck_of_other_functions(g) -> None:
    A = shapes(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: matrix_function((A + A.mT) / 2, g), A)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
def test_close_eigenvalues(scale: float, dtype: torch.dtype) -> None:
    """exp(-t w) with t max|w| = scale, at every gap from none to the whole spectrum."""
    gap = torch.cat((torch.zeros(1), torch.logspace(-18, 0, 200))).double()
    for low in (0.0, 0.3):
        w = torch.stack((low + 0 * gap, low + gap, 0 * gap + 1.3), dim=1).to(dtype)
        values = torch.exp(-scale / 1.3 * w)
        got = _divided_differences(w, values, -scale / 1.3 * values)
        w, t = w.double(), scale / 1.3
        run = w[:, None, :] - w[:, :, None]
        ratio = torch.where(run == 0, -t, torch.expm1(-t * run) / torch.where(run == 0, 1, run))
        expected = ratio * torch.exp(-t * w[:, :, None])
        error = (got.double() - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
        assert error.max() < GAPS[dtype]


def test_ragged() -> None:
    """Not asked for values that no matrix has; nothing outside the sizes is read."""
    sizes = torch.tensor([4, 0, 6])
    A = torch.stack([KINDS["complete"](6) + torch.eye(6)] * 3)
    outside = torch.arange(6) >= sizes[:, None]
    A[outside.unsqueeze(-1) | outside.unsqueeze(-2)] = math.nan
    power = torch.tensor(-1.0).double().requires_grad_()

    def inverse(A: Tensor, sizes: Tensor | None = None) -> Tensor:
        return matrix_function(A, lambda w: w**power, sizes)

    leaf = A.clone().requires_grad_()
    out = inverse(leaf, sizes)
    grad, grad_power = torch.autograd.grad(out.sum(), (leaf, power))
    assert grad_power.isfinite()
    assert not out[1].any()
    for b in (0, 2):
        n = int(sizes[b])
        own = A[b, :n, :n].clone().requires_grad_()
        torch.testing.assert_close(out[b, :n, :n], torch.linalg.inv(own))
        (expected,) = torch.autograd.grad(inverse(own).sum(), own)
        assert torch.equal(grad[b, :n, :n], expected)
        for tensor in (out, grad):
            assert not tensor[b, n:].any()
            assert not tensor[b, :, n:].any()
    assert inverse(torch.ones(2, 0, 0).double(), torch.zeros(2).long()).shape == (2, 0, 0)


def test_a_broken_matrix_leaves_the_others() -> None:
    A = random(5, batch=(3,))
    A[1, 3, 2] = math.nan
    A.requires_grad_()
    out = matrix_function(A, torch.exp)
    (grad,) = torch.autograd.grad(out.sum(), A)
    for tensor in (out, grad):
        assert tensor[[0, 2]].isfinite().all()
        assert tensor[1].isnan().all()


def test_strides_permutation_determinism() -> None:
    A, t = random(6, batch=(3,)), torch.tensor(0.3).double()
    out = heat(A, t)
    assert torch.equal(out, heat(A, t))
    assert torch.equal(out, heat(strided(A), t))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = heat(A[:, order][:, :, order], t)
    assert relative_error(permuted, out[:, order][:, :, order]) < BOUND[torch.float64]


def test_compiles_into_one_graph() -> None:
    given = [shapes(), torch.tensor(0.7).double()]
    compiled_equals_eager(heat, given, BOUND[torch.float64])


def test_second_derivatives() -> None:
    """In the parameters of g alone they are there; with the matrix they are refused."""
    A, t = shapes(), torch.tensor(0.7).double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda t: heat(A, t), t)
    for leaf in (A.requires_grad_(), t):
        (grad,) = torch.autograd.grad(heat(A, t).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="matrix_function: has no second derivative"):
            grad.sum().backward()


@pytest.mark.parametrize(
    ("g", "error", "message"),
    [
        (lambda w: 1.0, TypeError, "must return a tensor, got float"),
        (lambda w: w.float(), TypeError, "must return torch.float64 like `A`, got torch.float32"),
        (lambda w: w.sum(-1), ValueError, r"must return \(2, 4\) on cpu .*, got \(2,\) on cpu"),
        (lambda w: 2 * w / w.amax(-1, keepdim=True), ValueError, "must be elementwise, got"),
        (nn.Softmax(dim=0), ValueError, "must be elementwise, got"),
    ],
)
def test_refusals(g, error: type[Exception], message: str) -> None:
    A = random(4, batch=(2,))
    for needs_gradient in (False, True):
        if needs_gradient or "elementwise" not in message:
            with pytest.raises(error, match=f"^matrix_function: `g` {message}.*; "):
                matrix_function(A.requires_grad_(needs_gradient), g)
    with pytest.raises(TypeError, match="eigh_batched: `A` must be"):
        matrix_function([1.0], g)


def test_what_g_takes_from_other_eigenvalues_may_be_detached() -> None:
    A = KINDS["ring"](4).requires_grad_()
    out = matrix_function(A, lambda w: w / w.detach().amax(-1, keepdim=True))
    torch.testing.assert_close(out, A / 4)
    (grad,) = torch.autograd.grad(out[0, 1], A)
    expected = torch.zeros(4, 4).double()
    expected[0, 1] = expected[1, 0] = 1 / 8
    torch.testing.assert_close(grad, expected)
