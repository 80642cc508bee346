"""Eigendecompositions of batches of symmetric matrices of any sizes, with gradients."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from gfnode_fast._extension import REBUILD, binary_info, why_no_extension
from gfnode_fast._once import refuse_tangents
from gfnode_fast.ops.dispatch import family, verified_gpus

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cpp")
LARGEST_COMPILED = 128  # rows; above, LAPACK and cuSOLVER lose less to their overheads
SAME_EIGENVALUE = 8.0  # gaps up to this times n ε max|w| count as none in the gradient
LARGEST_CHUNK = 1 << 26  # entries handed to torch.linalg.eigh at once on a GPU

_registered = False


def eigh_batched(
    A: Tensor, sizes: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of symmetric matrices, A V = V diag(w).

    Args:
        A: (..., n, n) float32 or float64; the lower triangles are read.
        sizes: (...) int64 or int32, 0 ... n, on the device of A: the matrices are the leading
            sizes × sizes blocks, and nothing outside them is read. None: all n.
        backend: "cpp", the compiled solver, n up to 128, SIMD across the batch on the CPU and a
            warp or block per matrix on a GPU; "torch", `torch.linalg.eigh`; "auto" takes "cpp"
            where `choose_backend` says so.

    Returns:
        w (..., n) ascending, and V (..., n, n), orthonormal columns in that order. Beyond `sizes`
        both are zero. A matrix with an entry that is not finite has NaN in its w and V, and the
        others are not affected.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
        RuntimeError: backend="cpp" without the compiled extension; a matrix that does not
            converge; a second derivative.

    Notes:
        Signs, and bases of repeated eigenvalues, are the solver's; `spectra.canonical_basis`
        makes them the same everywhere.

        Deterministic. With "cpp" a matrix's bits depend on itself alone, not on the rest of the
        batch, so "auto" does not look at its size either. The time of a batch goes in steps of 8
        to 16 matrices of one size, on the CPU; for less than half a step, one large matrix above
        all, backend="torch" is faster.

        ∂L/∂A = V (diag(∂L/∂w) + F ∘ Vᵀ ∂L/∂V) Vᵀ, symmetrised, F_ij = 1/(w_j - w_i), and 0 where
        the two are equal, |w_j - w_i| <= 8 n ε max|w|. So it is finite for repeated eigenvalues,
        and right for functions that neither depend on the choice of basis inside an eigenspace
        nor tell its eigenvalues apart: sums of eigenvalues, projectors. The gradient of V g(w) Vᵀ
        with g' ≠ 0 at a repeated eigenvalue cannot be had from ∂L/∂w and ∂L/∂V, which do not
        know g': take `matrix_function`, which is right there and near there.
        Once differentiable.

        Source: csrc/cpu/eigh.h and csrc/cuda/eigh.cu; gradient: Giles, "Collected matrix
        derivative results", 2008, 3.1.
    """
    _check(A, sizes, backend)
    refuse_tangents("eigh_batched", A)
    if sizes is not None:
        sizes = sizes.long()
    chosen, reason = choose_backend(A.device, A.shape[-1], backend)
    if chosen == "torch":
        if A.device.type == "cpu" and why_not_compiled() and not torch.compiler.is_compiling():
            _say_once(reason)
        w, V = _TorchEigh.apply(A, sizes)  # type: ignore[no-untyped-call]
    else:
        w, V = torch.ops.gfnode_fast.eigh_batched(A, sizes)
    return w, V


def choose_backend(device: torch.device, n: int, requested: str = "auto") -> tuple[str, str]:
    """The backend that serves n × n matrices on a device, and the reason.

    Raises:
        ValueError: "cpp" for more than 128 rows or another kind of device.
        RuntimeError: "cpp" without the compiled extension, or its CUDA part.
    """
    if requested == "torch":
        return "torch", "requested"
    error: type[Exception] = ValueError
    problem = None
    if n > LARGEST_COMPILED:
        problem = f"the compiled solver is for up to {LARGEST_COMPILED} rows, A has {n}"
    elif device.type not in ("cpu", "cuda"):
        problem = f"the compiled solver is for the CPU and CUDA, A is on {device}"
    elif problem := why_not_compiled(device.type):
        error = RuntimeError
    if requested == "cpp" and problem:
        raise error(f"eigh_batched: `backend` must be 'torch' or 'auto' here, got 'cpp'; {problem}")
    if problem is None and requested == "auto" and device.type == "cuda":
        problem = _why_not_proven(device)
    if problem:
        return "torch", problem
    return "cpp", f"up to {LARGEST_COMPILED} rows, else torch"


def why_not_compiled(device_type: str = "cpu") -> str | None:
    """None when the compiled solver for the CPU or "cuda" is there, else what is missing."""
    global _registered
    if problem := why_no_extension():
        return problem
    if not hasattr(torch.ops.gfnode_fast, "eigh_batched"):
        return f"the extension was built without it; {REBUILD}"
    if device_type == "cuda" and binary_info()["cuda"] is None:
        return f"the extension was built without its CUDA part; {REBUILD}"
    if not _registered:
        torch.library.register_fake("gfnode_fast::eigh_batched", _fake)
        torch.library.register_autograd("gfnode_fast::eigh_batched", _backward, setup_context=_save)
        _registered = True
    return None


def _why_not_proven(device: torch.device) -> str | None:
    name = family(device)
    if name in verified_gpus():
        return None
    return f"the CUDA kernels have not yet run on hardware of this family ({name})"


# Constants to torch's compiler, which cannot trace a look at files or devices.
why_not_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_proven._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=8)
def _say_once(problem: str) -> None:
    logger.info("eigh_batched: backend torch: %s", problem)


def _check(A: Tensor, sizes: Tensor | None, backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(
            f"eigh_batched: `backend` must be one of {', '.join(BACKENDS)}, got {backend!r}; "
            "choose one of these"
        )
    if not isinstance(A, Tensor) or A.dtype not in (torch.float32, torch.float64):
        got = A.dtype if isinstance(A, Tensor) else type(A).__name__
        raise TypeError(
            f"eigh_batched: `A` must be a float32 or float64 tensor, got {got}; convert it"
        )
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(
            f"eigh_batched: `A` must be (..., n, n), got {tuple(A.shape)}; pass square matrices"
        )
    if sizes is None:
        return
    if not isinstance(sizes, Tensor) or sizes.dtype not in (torch.int64, torch.int32):
        got = sizes.dtype if isinstance(sizes, Tensor) else type(sizes).__name__
        raise TypeError(
            f"eigh_batched: `sizes` must be an int64 or int32 tensor, got {got}; convert it"
        )
    if sizes.shape != A.shape[:-2] or sizes.device != A.device:
        raise ValueError(
            f"eigh_batched: `sizes` must be {tuple(A.shape[:-2])} on {A.device} like the batch of "
            f"`A`, got {tuple(sizes.shape)} on {sizes.device}; pass one size per matrix"
        )
    readable = sizes.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and sizes.numel() and (sizes.min() < 0 or sizes.max() > A.shape[-1]):
        raise ValueError(
            f"eigh_batched: `sizes` must lie in 0 ... {A.shape[-1]}, got {int(sizes.min())} ... "
            f"{int(sizes.max())}; pass the number of rows of each matrix"
        )


def _fake(A: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return A.new_empty(A.shape[:-1]), A.new_empty(A.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output)


def _backward(ctx: Any, grad_w: Tensor | None, grad_V: Tensor | None) -> tuple[Any, None]:
    if grad_w is None and grad_V is None:
        return None, None
    grad = _Gradient.apply(*ctx.saved_tensors, grad_w, grad_V)  # type: ignore[no-untyped-call]
    return grad, None


class _TorchEigh(torch.autograd.Function):
    """`torch.linalg.eigh` with sizes, NaN confined to its matrix, and our gradient."""

    @staticmethod
    def forward(A: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        if A.numel() == 0:
            return A.new_zeros(A.shape[:-1]), torch.zeros_like(A)
        lower, inside = A.tril(), None
        if sizes is not None:
            inside = torch.arange(A.shape[-1], device=A.device) < sizes.unsqueeze(-1)
            lower = torch.where(inside.unsqueeze(-1), lower, 0.0)
        finite = lower.isfinite().flatten(-2).all(-1)
        lower = torch.where(finite[..., None, None], lower, 0.0)
        if inside is None:
            w, V = _in_chunks(lower)
        else:
            # What is beyond a size becomes eigenvalues above all others, which are then cut off.
            largest = lower.abs().amax((-2, -1))
            largest = torch.where(largest > 0, largest, 1.0)[..., None]
            lower = lower / largest.unsqueeze(-1)
            bound = 1.0 + (lower.abs().sum(-1) + lower.abs().sum(-2)).amax(-1, keepdim=True)
            w, V = _in_chunks(lower + torch.diag_embed(torch.where(inside, 0.0, bound)))
            w = torch.where(inside, w * largest, 0.0)
            V = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), V, 0.0)
        nan = torch.nan if inside is None else torch.where(inside, torch.nan, 0.0)
        w = torch.where(finite[..., None], w, nan)
        if inside is not None:
            nan = torch.where(inside.unsqueeze(-1) & inside.unsqueeze(-2), torch.nan, 0.0)
        return w, torch.where(finite[..., None, None], V, nan)

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


def _in_chunks(A: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, on a GPU so many at once that its workspaces stay bounded."""
    if A.device.type != "cuda" or A.numel() <= LARGEST_CHUNK:
        w, V = torch.linalg.eigh(A)
        return w, V
    n = A.shape[-1]
    chunks = A.reshape(-1, n, n).split(max(1, LARGEST_CHUNK // (n * n)))
    values, vectors = zip(*(torch.linalg.eigh(chunk) for chunk in chunks), strict=True)
    return torch.cat(values).view(A.shape[:-1]), torch.cat(vectors).view(A.shape)


def _symmetric(A: Tensor) -> Tensor:
    return 0.5 * (A + A.mT)


class _Gradient(torch.autograd.Function):
    """The gradient of A; it has none of its own, which inside an eigenspace would be wrong."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, V: Tensor, grad_w: Tensor | None, grad_V: Tensor | None
    ) -> Tensor:
        if grad_V is None:
            assert grad_w is not None  # for mypy; _backward returns early without both
            return _symmetric((V * grad_w.unsqueeze(-2)) @ V.mT)
        gap = w.unsqueeze(-2) - w.unsqueeze(-1)
        tolerance = SAME_EIGENVALUE * w.shape[-1] * torch.finfo(w.dtype).eps
        same = gap.abs() <= tolerance * w.abs().amax(-1)[..., None, None]
        inner = torch.where(same, 0.0, V.mT @ grad_V / torch.where(same, 1.0, gap))
        if grad_w is not None:
            inner = inner + torch.diag_embed(grad_w)
        return _symmetric(V @ inner @ V.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "eigh_batched: has no second derivative; differentiate the function once, or use "
            "torch.linalg.eigh where no eigenvalue is repeated"
        )
