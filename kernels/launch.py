"""What all launchers share: the device to launch on, tile sizes, memory for results."""

from __future__ import annotations

import contextlib

import torch
import triton.language as tl
from torch import Tensor

MAX_GRID = 65_535  # programs along the second and the third dimension of a launch


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Context in which Triton launches on the tensor's device and that device's current stream."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def next_power_of_2(n: int) -> int:
    """Smallest power of 2 that is at least n; tile extents must be one."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is dense in memory, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def dot_block(width: int) -> int:
    """Extent of a tile that takes part in matrix products, which want at least 16."""
    return max(16, next_power_of_2(width))


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of products that keep the accuracy of fp32 and fp64."""
    return "ieee" if dtype == torch.float64 else "tf32x3"


def acc_type(dtype: torch.dtype) -> tl.dtype:
    """Type of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32
