"""Graph Fourier transforms: both backends, molecules of one size and of several."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gfnode_fast.kernels import graph_fourier_launch as kernels
from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
from graph_fourier_cases import (
    EPILOGUES,
    SIZES,
    TOLERANCE,
    batch_of,
    call_inverse,
    eigenvectors,
    forward_oracle,
    inverse_case,
    inverse_oracle,
    offsets,
    randn,
    rows,
)
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_forward_is_the_definition(backend: str, ragged: bool, dtype: torch.dtype) -> None:
    sizes = SIZES if ragged else (5, 5)
    eigvecs, ptr = batch_of(sizes, ragged, dtype)
    signal = rows(sizes, ragged, 3, dtype=dtype)
    got = graph_fourier(signal, eigvecs, 2, ptr=ptr, backend=backend)
    expected = forward_oracle(signal.double(), eigvecs.double(), 2, ptr)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inverse_is_the_definition(
    backend: str, ragged: bool, epilogue: str, dtype: torch.dtype
) -> None:
    inputs, options = inverse_case(SIZES if ragged else (5, 5), ragged, epilogue, dtype=dtype)
    got = call_inverse(epilogue, backend, options)(*inputs)
    expected = call_inverse(epilogue, "oracle", options)(*(x.double() for x in inputs))
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_inverse_beside_an_embedding(backend: str, ragged: bool) -> None:
    """The same bits beside the embedding of each molecule and time, and its gradients."""
    sizes = SIZES if ragged else (5, 5)
    inputs, options = inverse_case(sizes, ragged, "features", channels=20)
    beside = randn(2, len(sizes), 3)
    atoms = torch.tensor(sizes, device=DEVICE)
    expected = beside.repeat_interleave(atoms, dim=1)

    def together(*arguments: Tensor) -> Tensor:
        out = call_inverse("features", backend, options | {"beside": beside})(*arguments)
        assert out.is_contiguous()
        assert torch.equal(out[..., 20:].reshape(expected.shape), expected)
        return out[..., :20]

    apart = call_inverse("features", backend, options)
    assert torch.equal(together(*inputs), apart(*inputs))
    for mine, theirs in zip(gradients(together, inputs), gradients(apart, inputs), strict=True):
        assert relative_error(mine, theirs) <= TOLERANCE[torch.float64]
    for wrong, message in ((beside[:1], "`beside` must be"), (beside.requires_grad_(), "not req")):
        with pytest.raises(ValueError, match=message):
            call_inverse("features", backend, options | {"beside": wrong})(*inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inverse_in_16_bits(dtype: torch.dtype) -> None:
    inputs, options = inverse_case((5, 5), False, "coordinates", dtype=dtype)
    got = call_inverse("coordinates", "triton", options)
    expected = call_inverse("coordinates", "oracle", options)
    wide = [x.double() for x in inputs]
    assert relative_error(got(*inputs), expected(*wide)) <= TOLERANCE[dtype]
    for mine, exact in zip(gradients(got, inputs), gradients(expected, wide), strict=True):
        assert mine.dtype == dtype
        assert relative_error(mine, exact) <= TOLERANCE[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_every_gradient_of_the_forward_transform(backend: str, ragged: bool) -> None:
    sizes = SIZES if ragged else (4, 4)
    eigvecs, ptr = batch_of(sizes, ragged, torch.float64)
    inputs = (rows(sizes, ragged, 3), eigvecs)
    got = gradients(lambda x, u: graph_fourier(x, u, 2, ptr=ptr, backend=backend), inputs)
    expected = gradients(lambda x, u: forward_oracle(x, u, 2, ptr), inputs)
    for mine, exact in zip(got, expected, strict=True):
        assert relative_error(mine, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_gradient_of_the_inverse(backend: str, ragged: bool, epilogue: str) -> None:
    inputs, options = inverse_case(SIZES if ragged else (4, 4), ragged, epilogue)
    got = gradients(call_inverse(epilogue, backend, options), inputs)
    expected = gradients(call_inverse(epilogue, "oracle", options), inputs)
    for mine, exact in zip(got, expected, strict=True):
        assert relative_error(mine, exact) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    eigvecs, ptr = batch_of((3, 2), True, torch.float64)
    inputs = (rows((3, 2), True, 2).requires_grad_(), eigvecs.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x, u: graph_fourier(x, u, 2, ptr=ptr, backend=backend), inputs, fast_mode=True
    )
    leaves, options = inverse_case((3, 2), True, "coordinates", channels=2)
    assert torch.autograd.gradcheck(
        call_inverse("coordinates", backend, options),
        [x.requires_grad_() for x in leaves],
        fast_mode=True,
    )


def test_second_derivatives_are_right_or_refused() -> None:
    eigvecs, _ = batch_of((3, 3), False, torch.float64)
    signal = rows((3, 3), False, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x, u: graph_fourier(x, u, 2).pow(2), (signal, eigvecs.requires_grad_())
    )
    assert torch.autograd.gradgradcheck(
        lambda x: graph_fourier(x, eigvecs.detach(), 2, backend="triton").pow(2),
        signal,
        fast_mode=True,
    )
    leaves, options = inverse_case((3, 3), False, "features", channels=2)
    modes = leaves[0].requires_grad_()
    for backend in BACKENDS:
        out = call_inverse("features", backend, options)(modes, *leaves[1:])
        (grad,) = torch.autograd.grad(out.sum(), modes, create_graph=True)
        with pytest.raises(RuntimeError, match="for a second derivative|no autograd"):
            grad.pow(2).sum().backward()


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, ragged: bool) -> None:
    sizes = (3, 2) if ragged else (2, 2)
    eigvecs, ptr = batch_of(sizes, ragged, torch.float32)
    eigvecs.requires_grad_()
    signal = rows(sizes, ragged, 2, dtype=torch.float32).requires_grad_()
    opcheck(torch.ops.gfnode_fast.graph_fourier, signal, eigvecs, 2, ptr, backend)
    (modes, _, residual, centroid), options = inverse_case(
        sizes, ragged, "coordinates", channels=2, dtype=torch.float32
    )
    added = (residual.requires_grad_(), centroid.requires_grad_())
    total, beside = sum(sizes), randn(2, 2, 3, dtype=torch.float32)
    opcheck(
        torch.ops.gfnode_fast.inverse_graph_fourier,
        *(modes.requires_grad_(), eigvecs, *added, beside, "silu", ptr, total, backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_compiled(backend: str, ragged: bool) -> None:
    inputs, options = inverse_case((3, 2) if ragged else (3, 3), ragged, "coordinates", channels=2)
    call = call_inverse("coordinates", backend, options)
    ptr = options["ptr"]

    def there_and_back(modes: Tensor, eigvecs: Tensor, *added: Tensor) -> Tensor:
        signal = call(modes.sin(), eigvecs, *added)
        return graph_fourier(signal[1], eigvecs, 2, ptr=ptr, backend=backend)

    compiler = "aot_eager" if ragged else "inductor"
    compiled_equals_eager(there_and_back, inputs, TOLERANCE[torch.float64], compiler)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ragged", [False, True])
def test_strides(backend: str, ragged: bool) -> None:
    sizes = (3, 2) if ragged else (3, 3)
    inputs, options = inverse_case(sizes, ragged, "coordinates", channels=2)
    call = call_inverse("coordinates", backend, options)
    ptr = options["ptr"]

    def there_and_back(modes: Tensor, eigvecs: Tensor, *added: Tensor) -> Tensor:
        signal = call(modes, eigvecs, *added)
        back = graph_fourier(signal[0], eigvecs, 2, ptr=ptr, backend=backend)
        # cotangents arrive as slices of one tensor and permuted
        return torch.cat((signal.flatten().flip(0), back.permute(2, 0, 1).flatten()))[1:]

    views = [strided(x) for x in inputs]
    assert torch.equal(there_and_back(*views), there_and_back(*inputs))
    for mine, dense in zip(
        gradients(there_and_back, views), gradients(there_and_back, inputs), strict=True
    ):
        assert relative_error(mine, dense) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
def test_eigenvectors_shared_by_expansion(backend: str) -> None:
    shared = eigenvectors(4, 0).T.contiguous().T.expand(3, 4, 4)
    signal = randn(3, 4, 2)
    assert torch.equal(
        graph_fourier(signal, shared, 2, backend=backend),
        graph_fourier(signal, shared.contiguous(), 2, backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "channels", "num_modes", "times"),
    [
        ((), 2, 1, 2),  # no molecules
        ((0, 2, 0), 2, 1, 1),  # molecules without atoms
        ((1,), 1, 1, 1),
        ((3, 2, 3), 2, 2, 1),  # of one size, apart from each other
        ((3, 2), 2, 2, 0),  # no times
        ((3, 2), 0, 2, 1),  # no channels
        ((35, 17), 130, 3, 1),  # several tiles of atoms and of channels, the last ones partial
    ],
)
def test_sizes(
    backend: str, sizes: tuple[int, ...], channels: int, num_modes: int, times: int
) -> None:
    empty = (randn(0), offsets(()))
    eigvecs, ptr = batch_of(sizes, True, torch.float64) if sizes else empty
    signal = randn(sum(sizes), channels)
    modes = randn(times, len(sizes), num_modes, channels)
    inputs = (modes, eigvecs, signal)

    def mine(modes: Tensor, eigvecs: Tensor, signal: Tensor) -> Tensor:
        projected = graph_fourier(signal, eigvecs, num_modes, ptr=ptr, backend=backend)
        back = inverse_graph_fourier(
            modes, eigvecs, residual=signal, activation="silu", ptr=ptr, backend=backend
        )
        return torch.cat((projected.flatten(), back.flatten()))

    def exact(modes: Tensor, eigvecs: Tensor, signal: Tensor) -> Tensor:
        if not sizes:
            return modes.sum().expand(0) + signal.flatten() + eigvecs
        projected = forward_oracle(signal, eigvecs, num_modes, ptr)
        back = inverse_oracle(modes, eigvecs, signal, None, "silu", ptr)
        return torch.cat((projected.flatten(), back.flatten()))

    assert relative_error(mine(*inputs), exact(*inputs)) <= TOLERANCE[torch.float64]
    for got, expected in zip(gradients(mine, inputs), gradients(exact, inputs), strict=True):
        assert relative_error(got, expected) <= TOLERANCE[torch.float64]


def test_molecules_larger_than_a_tile_at_one_size() -> None:
    inputs, options = inverse_case((37, 37), False, "features", channels=2, num_modes=3, times=1)
    got = gradients(call_inverse("features", "triton", options), inputs)
    expected = gradients(call_inverse("features", "oracle", options), inputs)
    for mine, exact in zip(got, expected, strict=True):
        assert relative_error(mine, exact) <= TOLERANCE[torch.float64]


def test_programs_that_own_all_times_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, options = inverse_case(SIZES, True, "coordinates", times=3)
    call = call_inverse("coordinates", "triton", options)
    one_time_each = call(*inputs)
    monkeypatch.setattr(kernels, "MANY_PROGRAMS", 1)
    assert torch.equal(call(*inputs), one_time_each)


@pytest.mark.parametrize("backend", BACKENDS)
def test_deterministic(backend: str) -> None:
    inputs, options = inverse_case(SIZES, True, "coordinates", dtype=torch.float32)
    call = call_inverse("coordinates", backend, options)
    assert torch.equal(call(*inputs), call(*inputs))
    for once, again in zip(gradients(call, inputs), gradients(call, inputs), strict=True):
        assert torch.equal(once, again)


def test_a_molecule_does_not_depend_on_its_batch_mates() -> None:
    """Bit for bit in our own kernels."""
    eigvecs, ptr = batch_of(SIZES, True, torch.float32)
    signal = rows(SIZES, True, 3, dtype=torch.float32)
    together = graph_fourier(signal, eigvecs, 2, ptr=ptr, backend="triton")
    alone = graph_fourier(signal[6:9], eigvecs[26:], 2, ptr=offsets((3,)), backend="triton")
    assert torch.equal(together[2:], alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_may_have_any_stride(backend: str) -> None:
    eigvecs, ptr = batch_of((3, 2), True, torch.float64)
    signal, options = rows((3, 2), True, 4), {"backend": backend}
    assert ptr is not None
    modes = graph_fourier(signal, eigvecs, 2, ptr=ptr, **options)
    assert torch.equal(graph_fourier(signal, eigvecs, 2, ptr=strided(ptr), **options), modes)


def test_symmetry_under_permutation_of_atoms() -> None:
    signal, eigvecs = randn(1, 5, 3), eigenvectors(5, 0).unsqueeze(0)
    order = torch.tensor([3, 1, 4, 0, 2])
    for backend in BACKENDS:
        modes = graph_fourier(signal, eigvecs, 3, backend=backend)
        permuted = graph_fourier(signal[:, order], eigvecs[:, order], 3, backend=backend)
        assert relative_error(permuted, modes) <= TOLERANCE[torch.float64]
