"""Launchers of the graph Fourier kernels: tiles, strides, memory for results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from gfnode_fast.kernels.graph_fourier import (
    _graph_fourier_eigvecs_bwd_kernel,
    _graph_fourier_fwd_kernel,
    _inverse_graph_fourier_bwd_kernel,
    _inverse_graph_fourier_fwd_kernel,
)
from gfnode_fast.kernels.launch import (
    MAX_GRID,
    acc_type,
    ceil_div,
    next_power_of_2,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.registry import AotCase

MAX_MODES = 128  # a forward tile holds all modes
TILE = 2048  # elements of a tile
MAX_REGISTERS = 200  # without it ptxas spills a few cold values to fit more warps
MAX_BLOCK_C = 128
MANY_PROGRAMS = 2048  # with as many tiles, a program takes all times of its molecule


def launch_graph_fourier_fwd(
    signal: Tensor, eigvecs: Tensor, num_modes: int, ptr: Tensor | None
) -> Tensor:
    """signal (ΣN, C) or (B, N, C) → modes (B, M, C); ragged if `ptr` (B+1,) is given."""
    eigvecs, batch, num_atoms = _molecules(eigvecs, ptr)
    rows = unit_stride(_rows(signal, ptr))
    channels = rows.shape[-1]
    modes = signal.new_empty(batch, num_modes, channels)
    if modes.numel() == 0:
        return modes
    block_m, block_c = _fwd_tile(num_modes, channels)
    with on_device_of(signal):
        _graph_fourier_fwd_kernel[(batch, ceil_div(channels, block_c))](
            rows, eigvecs, modes, ptr, _eig_ptr(ptr), rows.stride(0), *_eig_strides(eigvecs),
            channels, NUM_MODES=num_modes, NUM_ATOMS=num_atoms,
            BLOCK_M=block_m, BLOCK_C=block_c, ACC=acc_type(signal.dtype),
            num_warps=_warps(block_m * block_c, signal.dtype), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return modes


def launch_inverse_graph_fourier_fwd(
    modes: Tensor,
    eigvecs: Tensor,
    residual: Tensor | None,
    activation: str | None,
    centroid: Tensor | None,
    beside: Tensor | None,
    ptr: Tensor | None,
    total_atoms: int,
) -> Tensor:
    """modes (T, B, M, C) → (T, ΣN, C), the atoms of all molecules in one axis; C + W channels with
    `beside` (T, B, W).
    """
    eigvecs, batch, num_atoms = _molecules(eigvecs, ptr)
    modes = unit_stride(modes)
    times, _, num_modes, channels = modes.shape
    width = 0 if beside is None else beside.shape[2]
    out = modes.new_empty(times, total_atoms, channels + width)
    if out.numel() == 0:
        return out
    added = None if residual is None else unit_stride(_rows(residual, ptr))
    block_n, block_c = _tile(num_atoms, channels)
    tiles = ceil_div(channels, block_c)
    times_per_program = times if batch * tiles >= MANY_PROGRAMS else ceil_div(times, MAX_GRID)
    with on_device_of(modes):
        _inverse_graph_fourier_fwd_kernel[(batch, tiles, ceil_div(times, times_per_program))](
            modes, eigvecs, added, None if centroid is None else _rows(centroid, ptr).contiguous(),
            None if beside is None else beside.contiguous(), out, ptr, _eig_ptr(ptr),
            *modes.stride()[:3], *_eig_strides(eigvecs),
            0 if added is None else added.stride(0), out.stride(1), out.stride(0),
            channels, width, times, times_per_program,
            NUM_MODES=num_modes, NUM_ATOMS=num_atoms, SILU=activation == "silu",
            HAS_RESIDUAL=residual is not None, HAS_CENTROID=centroid is not None,
            BLOCK_W=next_power_of_2(width) if width else 0,
            BLOCK_N=block_n, BLOCK_C=block_c, ACC=acc_type(modes.dtype),
            num_warps=_warps(block_n * block_c, modes.dtype), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return out


def launch_inverse_graph_fourier_bwd(
    grad: Tensor,
    modes: Tensor,
    eigvecs: Tensor,
    activation: str | None,
    ptr: Tensor | None,
    wants_added: bool,
) -> tuple[Tensor, Tensor]:
    """grad (T, ΣN, C) → gradients of modes (T, B, M, C) and of what was added (ΣN, C) or (0,)."""
    eigvecs, batch, num_atoms = _molecules(eigvecs, ptr)
    grad, modes = unit_stride(grad), unit_stride(modes)
    times, _, num_modes, channels = modes.shape
    # partial sums over a molecule's atoms go through memory, so in the precision of sums
    dtype = torch.promote_types(modes.dtype, torch.float32)
    grad_modes = modes.new_empty(modes.shape, dtype=dtype)
    grad_added = grad.new_empty(grad.shape[1:] if wants_added else (0,))
    if grad_modes.numel() == 0:
        return grad_modes.to(modes.dtype), grad_added.zero_()
    block_n, block_c = _tile(num_atoms, channels)
    with on_device_of(modes):
        _inverse_graph_fourier_bwd_kernel[(batch, ceil_div(channels, block_c))](
            grad, modes, eigvecs, grad_modes, grad_added, ptr, _eig_ptr(ptr),
            *grad.stride()[:2], *modes.stride()[:3], *_eig_strides(eigvecs),
            grad_modes.stride(0), channels, times,
            NUM_MODES=num_modes, NUM_ATOMS=num_atoms, SILU=activation == "silu",
            HAS_ADDED=wants_added, BLOCK_N=block_n, BLOCK_C=block_c, ACC=acc_type(modes.dtype),
            num_warps=_warps(block_n * block_c, modes.dtype), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return grad_modes.to(modes.dtype), grad_added


def launch_graph_fourier_eigvecs_bwd(
    grad: Tensor, modes: Tensor, eigvecs: Tensor, activation: str | None, ptr: Tensor | None
) -> Tensor:
    """grad (T, ΣN, C), modes (T, B, M, C) → the gradient of eigvecs, shaped like it, dense."""
    eigvecs, batch, num_atoms = _molecules(eigvecs, ptr)
    grad, modes = unit_stride(grad), unit_stride(modes)
    times, _, num_modes, channels = modes.shape
    grad_eigvecs = eigvecs.new_zeros(eigvecs.shape)
    if grad.numel() == 0 or batch == 0:
        return grad_eigvecs
    block_n, block_c = _tile(num_atoms, channels)
    with on_device_of(modes):
        _graph_fourier_eigvecs_bwd_kernel[(batch,)](
            grad, modes, eigvecs, grad_eigvecs, ptr, _eig_ptr(ptr),
            *grad.stride()[:2], *modes.stride()[:3], *_eig_strides(eigvecs), channels, times,
            NUM_MODES=num_modes, NUM_ATOMS=num_atoms, SILU=activation == "silu",
            BLOCK_N=block_n, BLOCK_M=next_power_of_2(num_modes), BLOCK_C=block_c,
            ACC=acc_type(modes.dtype),
            num_warps=_warps(block_n * block_c, modes.dtype), maxnreg=MAX_REGISTERS,
        )  # fmt: skip
    return grad_eigvecs


def _molecules(eigvecs: Tensor, ptr: Tensor | None) -> tuple[Tensor, int, int]:
    """Eigenvectors as kernels read them, number of molecules, their common number of atoms or 0."""
    if ptr is None:
        return eigvecs, eigvecs.shape[0], eigvecs.shape[1]
    return eigvecs.contiguous(), ptr.shape[0] - 1, 0


def _rows(tensor: Tensor, ptr: Tensor | None) -> Tensor:
    """(B, N, C) or (ΣN, C) → (ΣN, C)."""
    return tensor.flatten(0, 1) if ptr is None else tensor


def _eig_ptr(ptr: Tensor | None) -> Tensor | None:
    """Offsets (B,) of the molecules' eigenvectors in the flat buffer."""
    if ptr is None:
        return None
    squares = ptr.diff().square()
    return squares.cumsum(0) - squares


def _eig_strides(eigvecs: Tensor) -> tuple[int, int, int]:
    if eigvecs.dim() == 1:
        return 0, 0, 0
    return eigvecs.stride(0), eigvecs.stride(1), eigvecs.stride(2)


def _fwd_tile(num_modes: int, channels: int) -> tuple[int, int]:
    """Modes and channels of a forward tile."""
    block_m = next_power_of_2(num_modes)
    return block_m, min(next_power_of_2(channels), MAX_BLOCK_C, max(16, TILE // block_m))


def _tile(num_atoms: int, channels: int) -> tuple[int, int]:
    """Atoms and channels of an inverse tile; 16 atoms at a time if molecules differ."""
    block_n = min(next_power_of_2(num_atoms), 32) if num_atoms else 16
    return block_n, min(next_power_of_2(channels), MAX_BLOCK_C, TILE // block_n)


def _warps(elements: int, dtype: torch.dtype) -> int:
    """A warp for 8 registers a thread of tile, so that backward's several tiles do not spill."""
    registers = elements * (2 if dtype == torch.float64 else 1)
    return min(max(registers // 256, 1), 8)


def aot_cases() -> list[AotCase]:
    """The kernels at the shapes of aspirin, of all its modes, of coordinates, and of mixtures."""
    shapes = (
        (13, 64, 2, "fp32"),
        (13, 64, 13, "fp32"),
        (13, 6, 2, "fp32"),
        (0, 64, 2, "fp32"),
        (0, 96, 16, "fp64"),
        (13, 64, 2, "bf16"),
    )
    return [case for shape in shapes for case in _aot_cases(*shape)]


def _aot_cases(num_atoms: int, channels: int, num_modes: int, dtype: str) -> list[AotCase]:
    block_n, block_c = _tile(num_atoms, channels)
    block_m, fwd_block_c = _fwd_tile(num_modes, channels)
    acc = tl.float64 if dtype == "fp64" else tl.float32
    offsets = ("ptr_ptr", "eig_ptr_ptr")
    of_modes = ("stride_mt", "stride_mb", "stride_mm")
    of_eigvecs = ("stride_ub", "stride_un", "stride_uk")

    def case(
        kernel: Any, name: str, tensors: Sequence[str], integers: Sequence[str], **constexprs: Any
    ) -> AotCase:
        elements = constexprs["BLOCK_C"] * constexprs.get("BLOCK_N", block_m)
        constexprs |= {"NUM_MODES": num_modes, "NUM_ATOMS": num_atoms, "ACC": acc}
        signature = dict.fromkeys((f"{t}_ptr" for t in tensors), f"*{dtype}")
        if num_atoms:
            constexprs |= dict.fromkeys(offsets, None)
        else:
            signature |= dict.fromkeys(offsets, "*i64")
        rows = [i for i in integers if i not in (*of_eigvecs, "num_times", "times_per_program")]
        return AotCase(
            kernel=kernel,
            name=f"{name} {dtype} N={num_atoms or 'ragged'} C={channels} M={num_modes}",
            signature=signature | dict.fromkeys(integers, "i32"),
            constexprs=constexprs,
            num_warps=_warps(elements, torch.float64 if dtype == "fp64" else torch.float32),
            divisible_by_16=tuple(rows) if channels % 16 == 0 else (),
            options={"maxnreg": MAX_REGISTERS},
        )

    tile = {"BLOCK_N": block_n, "BLOCK_C": block_c, "SILU": True}
    grad = ("stride_gt", "stride_gn")
    return [
        case(
            _graph_fourier_fwd_kernel,
            "graph_fourier_fwd",
            ("signal", "eigvecs", "modes"),
            ("stride_sn", *of_eigvecs, "num_channels"),
            BLOCK_M=block_m,
            BLOCK_C=fwd_block_c,
        ),
        case(
            _inverse_graph_fourier_fwd_kernel,
            "inverse_graph_fourier_fwd",
            ("modes", "eigvecs", "residual", "centroid", "beside", "out"),
            (
                *of_modes, *of_eigvecs, "stride_rn", "stride_on", "stride_ot",
                "num_channels", "num_beside", "num_times", "times_per_program",
            ),
            HAS_RESIDUAL=True,
            HAS_CENTROID=channels == 6,
            BLOCK_W=0 if channels == 6 else 32,
            **tile,
        ),
        case(
            _inverse_graph_fourier_bwd_kernel,
            "inverse_graph_fourier_bwd",
            ("grad", "modes", "eigvecs", "grad_modes", "grad_added"),
            (*grad, *of_modes, *of_eigvecs, "stride_ot", "num_channels", "num_times"),
            HAS_ADDED=True,
            **tile,
        ),
        case(
            _graph_fourier_eigvecs_bwd_kernel,
            "graph_fourier_eigvecs_bwd",
            ("grad", "modes", "eigvecs", "grad_eigvecs"),
            (*grad, *of_modes, *of_eigvecs, "num_channels", "num_times"),
            BLOCK_M=block_m,
            **tile,
        ),
    ]  # fmt: skip
