"""What the launchers of the solves share: a tile's compile-time options, and the cases of their
kernels that are compiled ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from gfnode_fast.kernels.launch import acc_type, dot_block, dot_precision
from gfnode_fast.kernels.registry import AotCase, of_ones

BLOCK_R = 16
NUM_WARPS = 8


def tile(channels: int, dtype: torch.dtype, has_slope: bool) -> dict[str, Any]:
    """Options of every kernel that owns BLOCK_R rows and all channels."""
    return {
        "HAS_SLOPE": has_slope, "BLOCK_R": BLOCK_R, "BLOCK_C": dot_block(channels),
        "PRECISION": dot_precision(dtype), "ACC": acc_type(dtype),
    }  # fmt: skip


def solve_cases(cases: Callable[[int, str, bool], list[AotCase]], has_slope: bool) -> list[AotCase]:
    """Cases of (channels, dtype, with a slope): features of width 64, with and without a slope;
    coordinates (C = 2), `has_slope` or not, also with one mode, component and time; fp64.
    """
    narrow = cases(2, "fp32", has_slope)
    wide = [*cases(64, "fp32", False), *cases(64, "fp32", True), *cases(64, "fp64", True)]
    return [*wide, *narrow, *of_ones(narrow, "num_modes", "num_components", "num_times")]


def solve_case(
    kernel: Any,
    name: str,
    tensors: str,
    integers: str,
    *,
    channels: int,
    dtype: str,
    has_slope: bool,
    types: Mapping[str, str],
    absent: str | None = None,
    aligned: tuple[str, ...] = ("stride",),
    spills: str | None = None,
    options: Mapping[str, object] | None = None,
    **constexprs: object,
) -> AotCase:
    """One kernel of a solve.

    Args:
        tensors, integers: names of the arguments, pointers without _ptr.
        types: of pointers whose type is not the state's.
        absent: a tensor that is None.
        aligned: how the integers begin that are multiples of 16 where the channels are.
        spills: why it may spill at full width.
        constexprs: beyond `tile`.
    """
    if dtype == "fp64":
        spills = "for checking only: no fp64 tensor products on sm_100"
    elif channels < 64:
        spills = None
    # features have one component, which Triton makes a constant; coordinates have three
    ones = {"num_components": 1} if channels == 64 and "num_components" in integers else {}
    named = [name for name in integers.split() if name not in ones]
    return AotCase(
        kernel=kernel,
        name=f"{name} {dtype} C={channels}" + (" affine" if has_slope else ""),
        signature={f"{t}_ptr": types.get(t, f"*{dtype}") for t in tensors.split() if t != absent}
        | dict.fromkeys(named, "i32"),
        constexprs=tile(channels, getattr(torch, f"float{dtype[2:]}"), has_slope)
        | constexprs
        | ones
        | ({f"{absent}_ptr": None} if absent else {}),
        num_warps=NUM_WARPS,
        divisible_by_16=tuple(i for i in named if i.startswith(aligned) and channels % 16 == 0),
        allowed_spills_reason=spills,
        options=options or {},
    )
