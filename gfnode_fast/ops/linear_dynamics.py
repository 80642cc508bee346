"""Linear and affine dynamics dy/ds = y W + s b as solves take them: checks, and the torch view.

States are (B, M, D, C), W (M, C, C), b (M, C).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gfnode_fast.ops.mode_rhs_registered import LARGEST_C
from gfnode_fast.solvers.rhs import LinearRHS


def linear_rhs(weight: Tensor, slope: Tensor | None) -> LinearRHS:
    """The solvers' view of dy/ds = y W + s b."""

    def derivative(s: Tensor, y: Tensor) -> Tensor:
        product = torch.bmm(y, weight.detach())
        return product if slope is None else product + s * slope.detach().unsqueeze(1)

    if slope is None:
        return LinearRHS(derivative, weight)
    return LinearRHS(derivative, weight, _times_slope, (slope,), is_proportional=True)


def _times_slope(s: Tensor, slope: Tensor) -> Tensor:
    return s.view(-1, 1, 1) * slope


def no_values(y0: Tensor, times: Tensor, *parameters: Tensor | None) -> Tensor:
    """Values (T, B, M, D, C) where there are none, with their place in the graph."""
    used = torch.stack([p.sum() for p in parameters if p is not None]).sum()
    return y0.expand(times.shape[1], *y0.shape) * used


def check_dynamics(
    op: str, y0: Tensor, times: Tensor, parameters: Mapping[str, tuple[Tensor, tuple[int, ...]]]
) -> None:
    """Shapes, dtypes and devices; `parameters` maps names to (value, expected shape).

    Raises:
        TypeError, ValueError: naming the argument that does not match.
    """
    for name, (value, shape) in parameters.items():
        if value.shape != shape:
            raise ValueError(
                f"{op}: `{name}` must be {shape} for y0 {tuple(y0.shape)}, got "
                f"{tuple(value.shape)}; reshape it"
            )
        if value.dtype != y0.dtype:
            raise TypeError(
                f"{op}: `{name}` must be {y0.dtype} like y0, got {value.dtype}; convert one of them"
            )
    if times.dim() != 2 or times.shape[0] != len(y0):
        raise ValueError(
            f"{op}: `times` must be ({len(y0)}, T), got {tuple(times.shape)}; give each molecule "
            "its own T times"
        )
    if not times.is_floating_point():
        raise TypeError(f"{op}: `times` must be floating point, got {times.dtype}; convert it")
    for name, value in {"times": times, **{n: v for n, (v, _) in parameters.items()}}.items():
        if value.device != y0.device:
            raise ValueError(
                f"{op}: `{name}` must be on {y0.device} like y0, got {value.device}; move it"
            )


def check_state_shape(op: str, y0: Tensor) -> None:
    """Refuse a state that is not (B, M, D, C)."""
    if y0.dim() != 4:
        raise ValueError(f"{op}: `y0` must be (B, M, D, C), got {tuple(y0.shape)}; reshape it")


def check_linear(op: str, y0: Tensor, weight: Tensor, times: Tensor, slope: Tensor | None) -> None:
    """Shapes, dtypes and devices of linear or affine dynamics."""
    check_state_shape(op, y0)
    _, modes, _, channels = y0.shape
    parameters: dict[str, tuple[Tensor, tuple[int, ...]]] = {
        "weight": (weight, (modes, channels, channels))
    }
    if slope is not None:
        parameters["slope"] = (slope, (modes, channels))
    check_dynamics(op, y0, times, parameters)


def check_triton(op: str, y0: Tensor) -> None:
    """What the kernels of the solves cannot serve."""
    if y0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{op}: `y0` must be float32 or float64 with backend='triton', got {y0.dtype}; convert "
            "it or use backend='torch'"
        )
    if y0.shape[3] > LARGEST_C:
        raise ValueError(
            f"{op}: `y0` must have at most {LARGEST_C} channels with backend='triton', got "
            f"{y0.shape[3]}; use backend='torch'"
        )
