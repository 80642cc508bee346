"""Graph Fourier transform onto the first M Laplacian eigenvectors, and back.

    modes[b, m] = Σ_n U[b, n, m] signal[b, n]          m < M
    signal[t, b, n] = act(Σ_m U[b, n, m] modes[t, b, m]) + residual[b, n] + centroid[b, n]

Discarded modes are never formed and U is never expanded to T copies. Molecules of different size
share a batch by offsets: `ptr` (B+1,) holds each molecule's first atom and the total, signals are
(ΣN, C), and the eigenvectors of all molecules follow each other, row-major, in one buffer (ΣN²,).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast._once import refuse_tangents
from gfnode_fast.ops.dispatch import choose_backend
from gfnode_fast.ops.graph_fourier_registered import too_many_modes
from gfnode_fast.ops.graph_fourier_torch import project, side_by_side, synthesise

ACTIVATIONS = (None, "silu")


def graph_fourier(
    signal: Tensor,
    eigvecs: Tensor,
    num_modes: int,
    *,
    ptr: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Project a signal onto the first `num_modes` eigenvectors.

    modes[b, m] = Σ_n U[b, n, m] signal[b, n]

    Args:
        signal: (B, N, C), floating point; (ΣN, C) with `ptr`.
        eigvecs: (B, N, N), eigenvectors in columns, ascending eigenvalue, dtype and device of the
            signal; (ΣN²,) with `ptr`.
        num_modes: M; at most N. With `ptr`, modes that a molecule does not have (m >= N_b) are 0.
        ptr: (B+1,) int64, ascending from 0 to ΣN: molecule b owns the atoms ptr[b] ... ptr[b+1]-1.
            On the signal's device or the host. Its values are checked on the host only: reading
            them from a GPU would wait for it.
        backend: "torch", "triton", or "auto", which is "triton" on GPUs on whose family the kernels
            have passed (`dispatch.verified_gpus`), else "torch".

    Returns:
        (B, M, C), contiguous.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values that do not match.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        Deterministic. Sums in the signal's dtype, in fp32 for 16-bit Triton. Torch without `ptr` is
        differentiable any number of times; otherwise twice with respect to the signal, once with
        respect to the eigenvectors. The torch path reads `ptr`, which waits for a GPU if it is
        there, and takes slices where molecules of one size stand beside each other.
    """
    _check_eigvecs("graph_fourier", eigvecs, num_modes, ptr)
    unserved = too_many_modes(num_modes)
    backend, _ = choose_backend("graph_fourier", backend, eigvecs.device, unserved=unserved)
    if ptr is None:
        matches = signal.dim() == 3 and signal.shape[:2] == eigvecs.shape[:2]
        _check_like("graph_fourier", "signal", signal, "(B, N, C)", matches, eigvecs)
    else:
        _check_like("graph_fourier", "signal", signal, "(ΣN, C)", signal.dim() == 2, eigvecs)
    if backend == "torch" and ptr is None:
        return project(signal, eigvecs, num_modes)
    refuse_tangents("graph_fourier", signal, eigvecs)
    result: Tensor = torch.ops.gfnode_fast.graph_fourier(signal, eigvecs, num_modes, ptr, backend)
    return result


def inverse_graph_fourier(
    modes: Tensor,
    eigvecs: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    centroid: Tensor | None = None,
    beside: Tensor | None = None,
    ptr: Tensor | None = None,
    total_atoms: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Synthesise a signal at T times from its first M modes.

    out[t, b, n] = act(Σ_m U[b, n, m] modes[t, b, m]) + residual[b, n] + centroid[b, n]

    and, with `beside`, [out[t, b, n], beside[t, b]]: the first input of a decoder whose atoms carry
    an embedding of the time.

    Args:
        modes: (T, B, M, C), floating point.
        eigvecs: (B, N, N), eigenvectors in columns, ascending eigenvalue; (ΣN²,) with `ptr`.
        residual: (B, N, C), added after the activation; (ΣN, C) with `ptr`.
        activation: None or "silu".
        centroid: (B, N, C/2), or (ΣN, C/2) with `ptr`, added to the even channels: for coordinates,
            whose channels are (x, v_x, y, v_y, z, v_z), the centroid of an atom's molecule.
        beside: (T, B, W), put after the channels of each of a molecule's atoms; gets no gradient.
        ptr: (B+1,) int64 offsets of molecules of different size, as in `graph_fourier`; modes that
            a molecule does not have are ignored.
        total_atoms: ΣN, needed with `ptr` where neither residual nor centroid tells it (the last
            entry of `ptr` is not read from the device).
        backend: as in `graph_fourier`.

    Returns:
        (T, B, N, C), or (T, ΣN, C) with `ptr`; C + W channels with `beside`; contiguous.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or values that do not match; a `beside` that
            requires a gradient.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        Deterministic. Once differentiable. Backward forms the argument of the activation again.
    """
    op = "inverse_graph_fourier"
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{op}: `activation` must be None or 'silu', got {activation!r}; apply others to the "
            "result"
        )
    if modes.dim() != 4:
        raise ValueError(
            f"{op}: `modes` must be (T, B, M, C), got {tuple(modes.shape)}; reshape it"
        )
    _check_eigvecs(op, eigvecs, modes.shape[2], ptr)
    unserved = too_many_modes(modes.shape[2])
    backend, _ = choose_backend(op, backend, eigvecs.device, unserved=unserved)
    batch = eigvecs.shape[0] if ptr is None else ptr.shape[0] - 1
    _check_like(op, "modes", modes, f"(T, {batch}, M, C)", modes.shape[1] == batch, eigvecs)
    channels = modes.shape[3]
    if centroid is not None and channels % 2:
        raise ValueError(
            f"{op}: `modes` must have an even number of channels beside a centroid, got {channels};"
            " channels are pairs of position and velocity"
        )
    total = _total_atoms(op, eigvecs, residual, centroid, ptr, total_atoms)
    leading = eigvecs.shape[:2] if ptr is None else (total,)
    for name, value, width in (
        ("residual", residual, channels),
        ("centroid", centroid, channels // 2),
    ):
        if value is not None:
            shape = (*leading, width)
            _check_like(op, name, value, str(tuple(shape)), value.shape == shape, eigvecs)
    if beside is not None:
        shape = (modes.shape[0], batch)
        matches = beside.dim() == 3 and beside.shape[:2] == shape
        _check_like(op, "beside", beside, f"({shape[0]}, {batch}, W)", matches, eigvecs)
        if beside.requires_grad:
            raise ValueError(
                f"{op}: `beside` must not require a gradient, got one that does; join it to the "
                "result instead"
            )
    if backend == "torch" and ptr is None:
        out = synthesise(modes, eigvecs, residual, centroid, activation)
        return side_by_side(out, beside)
    refuse_tangents(op, modes, eigvecs, residual, centroid, beside)
    result: Tensor = torch.ops.gfnode_fast.inverse_graph_fourier(
        modes, eigvecs, residual, centroid, beside, activation, ptr, total, backend
    )
    return result if ptr is not None else result.unflatten(1, eigvecs.shape[:2])


def _check_eigvecs(op: str, eigvecs: Tensor, num_modes: int, ptr: Tensor | None) -> None:
    if not eigvecs.is_floating_point():
        raise TypeError(f"{op}: `eigvecs` must be floating point, got {eigvecs.dtype}; convert it")
    if ptr is None:
        if eigvecs.dim() != 3 or eigvecs.shape[1] != eigvecs.shape[2]:
            raise ValueError(
                f"{op}: `eigvecs` must be (B, N, N), got {tuple(eigvecs.shape)}; pass one square "
                "matrix of eigenvectors in columns per molecule, or `ptr`"
            )
        if not 1 <= num_modes <= eigvecs.shape[1]:
            raise ValueError(
                f"{op}: `num_modes` must be between 1 and {eigvecs.shape[1]}, the number of atoms, "
                f"got {num_modes}; lower it"
            )
        return
    if eigvecs.dim() != 1:
        raise ValueError(
            f"{op}: `eigvecs` must be (ΣN²,) beside `ptr`, got {tuple(eigvecs.shape)}; put the "
            "molecules' matrices, flattened row by row, one after the other"
        )
    if num_modes < 1:
        raise ValueError(f"{op}: `num_modes` must be at least 1, got {num_modes}; raise it")
    if ptr.dtype != torch.int64:
        raise TypeError(f"{op}: `ptr` must be torch.int64, got {ptr.dtype}; convert it")
    if ptr.dim() != 1 or ptr.shape[0] < 1:
        raise ValueError(
            f"{op}: `ptr` must be (B+1,), got {tuple(ptr.shape)}; pass each molecule's first atom "
            "and the total"
        )
    if ptr.device != eigvecs.device and ptr.device.type != "cpu":
        raise ValueError(
            f"{op}: `ptr` must be on {eigvecs.device} like eigvecs, or on the host, got "
            f"{ptr.device}; move it"
        )


def _check_like(op: str, name: str, value: Tensor, shape: str, matches: bool, of: Tensor) -> None:
    if not matches:
        raise ValueError(
            f"{op}: `{name}` must be {shape} for eigvecs {tuple(of.shape)}, got "
            f"{tuple(value.shape)}; reshape it"
        )
    if value.dtype != of.dtype:
        raise TypeError(
            f"{op}: `{name}` must be {of.dtype} like eigvecs, got {value.dtype}; convert "
            "one of them"
        )
    if value.device != of.device:
        raise ValueError(
            f"{op}: `{name}` must be on {of.device} like eigvecs, got {value.device}; move it"
        )


def _total_atoms(
    op: str,
    eigvecs: Tensor,
    residual: Tensor | None,
    centroid: Tensor | None,
    ptr: Tensor | None,
    given: int | None,
) -> int:
    if ptr is None:
        if given is not None:
            raise ValueError(
                f"{op}: `total_atoms` must be absent without `ptr`, got {given}; leave it out"
            )
        return eigvecs.shape[0] * eigvecs.shape[1]
    if given is not None:
        return given
    for rows in (residual, centroid):
        if rows is not None:
            return rows.shape[0]
    raise ValueError(
        f"{op}: `total_atoms` must be given with `ptr` and neither residual nor centroid, got "
        "None; pass the sum of the molecules' atoms"
    )
