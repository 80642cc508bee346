"""Graph Fourier transforms: both backends, molecules of one size and of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast.kernels import graph_fourier_launch as kernels
from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
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
# Relative to the largest value; measured: fp64 4e-16, fp32 3e-7, fp16 6e-4, bf16 5e-3.
TOLERANCE = {
    torch.float64: 2e-15,
    torch.float32: 1e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}
SIZES = (5, 1, 3)  # molecules of different size, one of one atom, which has fewer than M = 2 modes


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def offsets(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *sizes], device=DEVICE).cumsum(0)


def eigenvectors(num_atoms: int, seed: int) -> Tensor:
    noise = randn(num_atoms, num_atoms, seed=seed)
    return torch.linalg.eigh(noise + noise.T)[1]


def batch_of(sizes: tuple[int, ...], ragged: bool, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """(eigvecs, ptr): (B, N, N) and None, or (ΣN²,) and offsets."""
    each = [eigenvectors(n, seed).to(dtype) for seed, n in enumerate(sizes)]
    if not ragged:
        return torch.stack(each), None
    return torch.cat([u.flatten() for u in each]), offsets(sizes)


def rows(sizes: tuple[int, ...], ragged: bool, *width: int, **options: Any) -> Tensor:
    if ragged:
        return randn(sum(sizes), *width, **options)
    return randn(len(sizes), sizes[0], *width, **options)


def molecules(eigvecs: Tensor, ptr: Tensor | None) -> list[tuple[Any, Tensor]]:
    """(where its atoms are, U) of each molecule."""
    if ptr is None:
        return [(b, u) for b, u in enumerate(eigvecs)]
    sizes = ptr.diff().tolist()
    entries = eigvecs.split([n * n for n in sizes])
    return [(slice(ptr[b], ptr[b + 1]), entries[b].view(n, n)) for b, n in enumerate(sizes)]


def forward_oracle(signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor | None) -> Tensor:
    """The definition, a molecule at a time."""
    modes = []
    for where, u in molecules(eigvecs, ptr):
        projected = (u.T @ signal[where])[:num_modes]
        modes.append(torch.nn.functional.pad(projected, (0, 0, 0, num_modes - len(projected))))
    return torch.stack(modes)


def inverse_oracle(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    activation: str | None,
    ptr: Tensor | None,
) -> Tensor:
    out = []
    for b, (where, u) in enumerate(molecules(eigvecs, ptr)):
        kept = min(modes.shape[2], u.shape[0])
        signal = torch.einsum("nm,tmc->tnc", u[:, :kept], modes[:, b, :kept])
        signal = torch.nn.functional.silu(signal) if activation == "silu" else signal
        signal = signal if residual is None else signal + residual[where]
        if centroid is not None:
            added = torch.zeros_like(signal[0])
            added[:, ::2] = centroid[where]
            signal = signal + added
        out.append(signal)
    return torch.stack(out, dim=1) if ptr is None else torch.cat(out, dim=1)


EPILOGUES = {
    "plain": (None, False, False),
    "features": ("silu", True, False),
    "coordinates": ("silu", True, True),
    "centroid alone": (None, False, True),
}


def inverse_case(
    sizes: tuple[int, ...],
    ragged: bool,
    epilogue: str,
    channels: int = 6,
    num_modes: int = 2,
    dtype: torch.dtype = torch.float64,
    times: int = 2,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Differentiable inputs (modes, eigvecs, residual?, centroid?) and the other arguments."""
    activation, has_residual, has_centroid = EPILOGUES[epilogue]
    eigvecs, ptr = batch_of(sizes, ragged, dtype)
    inputs = [randn(times, len(sizes), num_modes, channels, dtype=dtype, seed=1), eigvecs]
    if has_residual:
        inputs.append(rows(sizes, ragged, channels, dtype=dtype, seed=2))
    if has_centroid:
        inputs.append(rows(sizes, ragged, channels // 2, dtype=dtype, seed=3))
    total = sum(sizes) if ragged else None
    return inputs, {"activation": activation, "ptr": ptr, "total_atoms": total}


def call_inverse(epilogue: str, backend: str, options: dict[str, Any]) -> Any:
    _, has_residual, _ = EPILOGUES[epilogue]

    def call(modes: Tensor, eigvecs: Tensor, *added: Tensor) -> Tensor:
        residual = added[0] if has_residual else None
        centroid = added[-1] if len(added) > has_residual else None
        if backend == "oracle":
            return inverse_oracle(
                modes, eigvecs, residual, centroid, options["activation"], options["ptr"]
            )
        return inverse_graph_fourier(
            modes, eigvecs, residual=residual, centroid=centroid, backend=backend, **options
        )

    return call


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
        with pytest.raises(RuntimeError, match="once_differentiable|no autograd|does not require"):
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


zeros = torch.zeros


def bad(**changes: Any) -> dict[str, Any]:
    fixed = {"signal": zeros(2, 3, 4), "eigvecs": zeros(2, 3, 3), "num_modes": 2}
    return fixed | changes


RAGGED = {"signal": zeros(5, 4), "eigvecs": zeros(13), "ptr": torch.tensor([0, 3, 5])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(eigvecs=zeros(2, 3, 4)), ValueError, "`eigvecs` must be (B, N, N), got (2, 3, 4)"),
        (bad(eigvecs=zeros(2, 3, 3).int()), TypeError, "must be floating point, got torch.int32"),
        (
            bad(num_modes=4),
            ValueError,
            "`num_modes` must be between 1 and 3, the number of atoms, got 4",
        ),
        (bad(num_modes=0), ValueError, "between 1 and 3"),
        (
            bad(signal=zeros(2, 4, 4)),
            ValueError,
            "`signal` must be (B, N, C) for eigvecs (2, 3, 3)",
        ),
        (bad(signal=zeros(2, 3, 4).double()), TypeError, "`signal` must be torch.float32 like"),
        (bad(signal=zeros(2, 3, 4, device="meta")), ValueError, "`signal` must be on cpu like"),
        (
            bad(backend="cuda"),
            ValueError,
            "`backend` must be one of auto, torch, triton, got 'cuda'",
        ),
        (bad(**RAGGED, num_modes=0), ValueError, "`num_modes` must be at least 1, got 0"),
        (
            bad(**RAGGED | {"eigvecs": zeros(2, 3, 3)}),
            ValueError,
            "`eigvecs` must be (ΣN²,) beside",
        ),
        (bad(**RAGGED | {"eigvecs": zeros(12)}), ValueError, "must have 13 entries"),
        (bad(**RAGGED | {"signal": zeros(2, 3, 4)}), ValueError, "`signal` must be (ΣN, C)"),
        (
            bad(**RAGGED | {"ptr": torch.tensor([0, 3, 5]).int()}),
            TypeError,
            "`ptr` must be torch.int64",
        ),
        (
            bad(**RAGGED | {"ptr": torch.tensor([[0, 3, 5]])}),
            ValueError,
            "`ptr` must be (B+1,), got (1, 3)",
        ),
        (
            bad(**RAGGED | {"ptr": zeros(3, device="meta").long()}),
            ValueError,
            "`ptr` must be on cpu",
        ),
        (bad(**RAGGED | {"ptr": torch.tensor([0, 6, 5])}), ValueError, "must ascend from 0 to 5"),
        (bad(**RAGGED | {"ptr": torch.tensor([0, 3, 4])}), ValueError, "got [0, 3, 4]"),
        (
            {
                "signal": zeros(1, 129, 1, device=DEVICE),
                "eigvecs": zeros(1, 129, 129, device=DEVICE),
                "num_modes": 129,
                "backend": "triton",
            },
            ValueError,
            "`num_modes` must be at most 128 with backend='triton', got 129",
        ),
    ],
)
def test_what_the_forward_transform_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        graph_fourier(**arguments)
    assert str(caught.value).startswith("graph_fourier: ")
    assert message in str(caught.value)


def bad_inverse(**changes: Any) -> dict[str, Any]:
    return {"modes": zeros(2, 2, 2, 4), "eigvecs": zeros(2, 3, 3)} | changes


RAGGED_INVERSE = {"eigvecs": zeros(13), "ptr": torch.tensor([0, 3, 5])}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            bad_inverse(modes=zeros(2, 2, 4)),
            ValueError,
            "`modes` must be (T, B, M, C), got (2, 2, 4)",
        ),
        (bad_inverse(modes=zeros(2, 1, 2, 4)), ValueError, "`modes` must be (T, 2, M, C)"),
        (bad_inverse(modes=zeros(2, 2, 4, 4)), ValueError, "`num_modes` must be between 1 and 3"),
        (bad_inverse(modes=zeros(2, 2, 2, 4).double()), TypeError, "`modes` must be torch.float32"),
        (
            bad_inverse(activation="relu"),
            ValueError,
            "`activation` must be None or 'silu', got 'relu'",
        ),
        (bad_inverse(residual=zeros(2, 3, 5)), ValueError, "`residual` must be (2, 3, 4)"),
        (bad_inverse(centroid=zeros(2, 3, 4)), ValueError, "`centroid` must be (2, 3, 2)"),
        (
            bad_inverse(modes=zeros(2, 2, 2, 3), centroid=zeros(2, 3, 1)),
            ValueError,
            "must have an even number of channels beside a centroid, got 3",
        ),
        (
            bad_inverse(total_atoms=6),
            ValueError,
            "`total_atoms` must be absent without `ptr`, got 6",
        ),
        (bad_inverse(**RAGGED_INVERSE), ValueError, "`total_atoms` must be given with `ptr`"),
        (bad_inverse(**RAGGED_INVERSE, total_atoms=6), ValueError, "`ptr` must ascend from 0 to 6"),
        (
            bad_inverse(backend="cpp"),
            ValueError,
            "`backend` must be one of auto, torch, triton, got 'cpp'",
        ),
    ],
)
def test_what_the_inverse_refuses(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        inverse_graph_fourier(**arguments)
    assert str(caught.value).startswith("inverse_graph_fourier: ")
    assert message in str(caught.value)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = bad(backend="triton")
    with pytest.raises(RuntimeError, match="on cpu, where Triton has only its interpreter"):
        graph_fourier(**arguments)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        graph_fourier(**arguments)


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


def test_symmetry_under_permutation_of_atoms() -> None:
    signal, eigvecs = randn(1, 5, 3), eigenvectors(5, 0).unsqueeze(0)
    order = torch.tensor([3, 1, 4, 0, 2])
    for backend in BACKENDS:
        modes = graph_fourier(signal, eigvecs, 3, backend=backend)
        permuted = graph_fourier(signal[:, order], eigvecs[:, order], 3, backend=backend)
        assert relative_error(permuted, modes) <= TOLERANCE[torch.float64]
