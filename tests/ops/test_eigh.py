"""Batched eigendecompositions by LAPACK's own measures, and their gradients."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gfnode_fast import _extension, info
from gfnode_fast.ops import eigh as module
from gfnode_fast.ops.eigh import LARGEST_COMPILED, choose_backend, eigh_batched
from op_checks import compiled_equals_eager, opcheck, relative_error, strided
from symmetric_matrices import BOUND, DTYPES, KINDS, NORMS, bits, check, matrix, measures, random

BACKENDS = ("cpp", "torch")
SIZES = (*range(18), 21, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, *NORMS])
def test_accuracy(kind: str, dtype: torch.dtype) -> None:
    for n in SIZES:
        A = matrix(kind, n, dtype)
        check(A, *eigh_batched(A, backend="cpp"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 13])
def test_denormal_numbers(n: int, dtype: torch.dtype) -> None:
    quantum = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    A = (random(n) * 1e4).round()
    w, V = eigh_batched((A * quantum).to(dtype), backend="cpp")
    error = (w.double() / quantum - torch.linalg.eigvalsh(A)).abs().max()
    assert error <= 0.51  # rounded to a whole number of quanta
    assert measures(A.to(dtype), torch.linalg.eigvalsh(A).to(dtype), V)[1] <= BOUND


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*KINDS, "tiny"])
def test_accuracy_beyond_the_compiled_sizes(kind: str, dtype: torch.dtype) -> None:
    """Not "huge", whose eigenvalues are beyond float32's range at this size."""
    A = matrix(kind, 370, dtype)
    assert choose_backend(A.device, 370)[0] == "torch"
    check(A, *eigh_batched(A))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_matrices(dtype: torch.dtype) -> None:
    for n in (2, 3, 5, 13, 20):
        A = random(n, batch=(301,)).to(dtype)
        check(A, *eigh_batched(A))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_shapes(backend: str) -> None:
    A = random(5, batch=(2, 3, 4))
    w, V = eigh_batched(A, backend=backend)
    check(A, w, V)
    one = eigh_batched(A[1, 2, 3], backend=backend)
    torch.testing.assert_close(w[1, 2, 3], one[0], rtol=0, atol=1e-14)
    for shape in ((0, 4, 4), (3, 0, 0), (0, 0)):
        w, V = eigh_batched(torch.ones(shape), backend=backend)
        assert w.shape == shape[:-1]
        assert V.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    A = random(9, batch=(5,))
    expected = eigh_batched(A, backend=backend)
    for got, want in zip(eigh_batched(strided(A), backend=backend), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_lower_triangle_is_read(backend: str) -> None:
    A = random(9, batch=(5,))
    expected = eigh_batched(A, backend=backend)
    spoilt = A.tril() + torch.full_like(A, math.nan).triu(1)
    for got, want in zip(eigh_batched(spoilt, backend=backend), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.usefixtures("poison_all_memory")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ragged(backend: str, dtype: torch.dtype) -> None:
    A = random(12, batch=(4, 25))
    sizes = torch.randint(0, 13, (4, 25), generator=torch.Generator().manual_seed(3), dtype=dtype)
    outside = torch.arange(12) >= sizes[..., None]
    A[outside.unsqueeze(-1) | outside.unsqueeze(-2)] = math.nan
    A[1] *= 1e300
    w, V = eigh_batched(A, sizes, backend=backend)
    for index in torch.cartesian_prod(torch.arange(4), torch.arange(25)).tolist():
        b, n = tuple(index), int(sizes[tuple(index)])
        check(A[b][:n, :n], w[b][:n], V[b][:n, :n])
        if backend == "cpp":
            for got, want in zip((w[b][:n], V[b][:n, :n]), eigh_batched(A[b][:n, :n]), strict=True):
                assert torch.equal(got, want)
        assert not w[b][n:].any()
        assert not V[b][n:].any()
        assert not V[b][:, n:].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 33])
def test_a_matrix_has_the_same_bits_in_any_batch(n: int, dtype: torch.dtype) -> None:
    A = random(n, batch=(75,)).to(dtype)
    A[::5] = KINDS["ring"](n).to(dtype)
    A[::7] = KINDS["graded"](n).to(dtype)
    A[3::11] = 0
    w, V = eigh_batched(A)
    order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
    for chosen in (order, order[:40], order[:17], order[:3], *order[:9].split(1)):
        some_w, some_V = eigh_batched(A[chosen])
        assert torch.equal(bits(some_w), bits(w[chosen]))
        assert torch.equal(bits(some_V), bits(V[chosen]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_matrix_is_nan_and_leaves_the_others(
    backend: str, value: float, dtype: torch.dtype
) -> None:
    for n in (1, 2, 3, 6):
        A = random(n, batch=(37,)).to(dtype)
        w, V = eigh_batched(A, backend=backend)
        A[20, n - 1, 0] = value
        got_w, got_V = eigh_batched(A, backend=backend)
        assert got_w[20].isnan().all()
        assert got_V[20].isnan().all()
        others = torch.arange(37) != 20
        assert torch.equal(bits(got_w[others]), bits(w[others]))
        assert torch.equal(bits(got_V[others]), bits(V[others]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_threads(dtype: torch.dtype) -> None:
    A = random(13, batch=(200,)).to(dtype)
    sizes = torch.arange(200) % 14
    expected = eigh_batched(A, sizes)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for got, want in zip(eigh_batched(A, sizes), expected, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)


NARROW = """
import torch
from gfnode_fast.ops.eigh import eigh_batched
from symmetric_matrices import DTYPES, KINDS, NORMS, check, matrix
for dtype in DTYPES:
    for kind in [*KINDS, *NORMS]:
        for n in (1, 2, 3, 4, 13, 34):
            A = matrix(kind, n, dtype).expand(9, n, n)
            w, V = eigh_batched(A, backend="cpp")
            check(A, w, V)
            assert torch.equal(V[0], V[8])
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", NARROW], env=environment, check=True)


# Gradients. Functions that a choice of basis inside an eigenspace does not change.


def eigenvalue_sums(A: Tensor, backend: str, sizes: Tensor | None = None) -> Tensor:
    w, _ = eigh_batched((A + A.mT) / 2, sizes, backend=backend)
    return torch.stack((w[..., :2].sum(-1), w.square().sum(-1)), dim=-1)


def projector(A: Tensor, backend: str, sizes: Tensor | None = None) -> Tensor:
    """Onto the three lowest modes."""
    _, V = eigh_batched((A + A.mT) / 2, sizes, backend=backend)
    return V[..., :3] @ V[..., :3].mT


def filtered(A: Tensor, backend: str, sizes: Tensor | None = None) -> Tensor:
    w, V = eigh_batched((A + A.mT) / 2, sizes, backend=backend)
    return (V * torch.exp(-w).unsqueeze(-2)) @ V.mT


FUNCTIONS = [eigenvalue_sums, projector, filtered]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck(function: Callable[..., Tensor], backend: str) -> None:
    A = random(6, batch=(3,)).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: function(A, backend), A)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradcheck_ragged(function: Callable[..., Tensor], backend: str) -> None:
    A, sizes = random(6, batch=(3,)).requires_grad_(), torch.tensor([4, 6, 3])
    assert torch.autograd.gradcheck(lambda A: function(A, backend, sizes), A)
    (grad,) = torch.autograd.grad(function(A, backend, sizes).sum(), A)
    assert not grad[0, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["repeated", "complete"])
def test_gradcheck_with_repeated_eigenvalues(kind: str, backend: str) -> None:
    """repeated: 0 0 0 1 1 1 2 2, complete: 0 8 ... 8; the cut lies between eigenspaces."""
    cut = {"repeated": 3, "complete": 1}[kind]
    A = KINDS[kind](8).requires_grad_()

    def low(A: Tensor) -> Tensor:
        w, V = eigh_batched((A + A.mT) / 2, backend=backend)
        return V[:, :cut] @ V[:, :cut].mT * 2 + w[:cut].sum() + w.square().sum()

    assert torch.autograd.gradcheck(low, A)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_repeated_eigenvalues_are_finite(dtype: torch.dtype, backend: str) -> None:
    for kind in ("zero", "identity", "complete", "ring", "disconnected", "repeated"):
        A = KINDS[kind](9).to(dtype).requires_grad_()
        w, V = eigh_batched(A, backend=backend)
        (grad,) = torch.autograd.grad((V * torch.arange(9.0)).sum() + w[0], A)
        assert grad.isfinite().all()
        assert torch.equal(grad, grad.mT)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_against_torch(backend: str) -> None:
    A = random(7, batch=(4,))
    grads = []
    for solve in (lambda A: eigh_batched(A, backend=backend), torch.linalg.eigh):
        leaf = A.clone().requires_grad_()
        w, V = solve(leaf)
        (grad,) = torch.autograd.grad((w * w.detach().cos()).sum() + V.pow(4).sum(), leaf)
        grads.append((grad + grad.mT) / 2)
    assert relative_error(*grads) < 1e-11


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_one_output_and_of_none(backend: str) -> None:
    A = random(5).requires_grad_()
    w, V = eigh_batched(A, backend=backend)
    (grad,) = torch.autograd.grad(w[0], A)
    torch.testing.assert_close(grad, torch.outer(V[:, 0], V[:, 0]))
    frozen = eigh_batched(A.detach(), backend=backend)
    assert not frozen[0].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    A = random(5).requires_grad_()
    w, _ = eigh_batched(A, backend=backend)
    (grad,) = torch.autograd.grad(w.square().sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="eigh_batched: has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_stays_in_its_matrix(backend: str) -> None:
    A = random(5, batch=(3,))
    A[1, 3, 2] = math.nan
    A.requires_grad_()
    w, V = eigh_batched(A, backend=backend)
    (grad,) = torch.autograd.grad(w.sum() + V.pow(3).sum(), A)
    assert grad[[0, 2]].isfinite().all()
    assert grad[1].isnan().all()


# The operator.


def test_opcheck() -> None:
    assert module.why_not_compiled() is None
    operator = torch.ops.gfnode_fast.eigh_batched.default
    A = random(6, batch=(3,))
    opcheck(operator, A)
    opcheck(operator, A.float().requires_grad_())
    opcheck(operator, A.requires_grad_(), torch.tensor([6, 2, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str) -> None:
    A = random(6, batch=(3,))
    compiled_equals_eager(lambda A: filtered(A, backend), [A], 1e-13)
    sizes = torch.tensor([6, 2, 4])
    compiled_equals_eager(lambda A: filtered(A, backend, sizes), [A], 1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "`A` must be a float32 or float64 tensor, got list"),
        ((torch.ones(2, 2, dtype=torch.int64),), TypeError, "`A` must be .*, got torch.int64"),
        ((torch.ones(3),), ValueError, r"`A` must be \(..., n, n\), got \(3,\)"),
        ((torch.ones(2, 3),), ValueError, r"`A` must be \(..., n, n\), got \(2, 3\)"),
        ((torch.ones(4, 2, 2), [2]), TypeError, "`sizes` must be .*, got list"),
        ((torch.ones(1, 2, 2), torch.ones(1)), TypeError, "`sizes` must be .*, got torch.float32"),
        ((torch.ones(4, 2, 2), torch.ones(3).long()), ValueError, r"`sizes` must be \(4,\) on cpu"),
        ((torch.ones(1, 2, 2), torch.tensor([3])), ValueError, r"`sizes` must lie .*, got 3"),
        ((torch.ones(1, 2, 2), torch.tensor([-1])), ValueError, r"`sizes` must lie .*, got -1"),
    ],
)  # fmt: skip
def test_refusals(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^eigh_batched: {message}.*; "):
        eigh_batched(*arguments)


def test_backends_that_do_not_serve() -> None:
    with pytest.raises(ValueError, match="`backend` must be one of auto, torch, cpp, got 'cuda'"):
        eigh_batched(torch.ones(2, 2), backend="cuda")
    large = torch.eye(LARGEST_COMPILED + 1)
    with pytest.raises(ValueError, match=r"got 'cpp'; .* up to 128 rows, A has 129"):
        eigh_batched(large, backend="cpp")
    with pytest.raises(ValueError, match=r"got 'cpp'; .* A is on meta"):
        eigh_batched(torch.ones(2, 2, device="meta"), backend="cpp")
    if _extension.binary_info()["cuda"] is None:
        with pytest.raises(RuntimeError, match="without its CUDA part"):
            choose_backend(torch.device("cuda"), 13, "cpp")


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module._say_once.cache_clear()
    monkeypatch.setattr(module, "why_no_extension", lambda: "it was not built")
    yield
    module._say_once.cache_clear()


@pytest.mark.usefixtures("no_extension")
def test_without_the_extension(caplog: pytest.LogCaptureFixture) -> None:
    A = random(5, batch=(3,))
    with caplog.at_level(logging.INFO, "gfnode_fast"):
        check(A, *eigh_batched(A))
        eigh_batched(A)
    assert [r.message for r in caplog.records] == ["eigh_batched: backend torch: it was not built"]
    with pytest.raises(RuntimeError, match="got 'cpp'; it was not built"):
        eigh_batched(A, backend="cpp")
    assert info()["auto"]["eigh_batched on the CPU"] == {
        "backend": "torch",
        "reason": "it was not built",
    }


def test_info_says_what_serves() -> None:
    assert info()["auto"]["eigh_batched on the CPU"]["backend"] == "cpp"
