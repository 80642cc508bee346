"""Launchers of the right-hand side's kernels: rows y (R, M, C), the last dimension dense."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.kernels.launch import (
    ceil_div,
    dot_block,
    dot_precision,
    on_device_of,
    unit_stride,
)
from gfnode_fast.kernels.mode_rhs import (
    _mode_attention_bwd_kernel,
    _mode_attention_fwd_kernel,
    _mode_linear_kernel,
    _mode_mlp_kernel,
)
from gfnode_fast.kernels.registry import AotCase

BLOCK_R = 16
NUM_WARPS = 8  # with half as many, the split weights of a three-product tf32 spill
MAX_CHANNELS = 64
MAX_HIDDEN = 128


def launch_mode_linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y (R, M, I), weight (M, I, O) with any strides, bias (M, O) → (R, M, O)."""
    y = unit_stride(y)
    rows, modes, num_in = y.shape
    num_out = weight.shape[2]
    out = y.new_empty(rows, modes, num_out)
    if out.numel():
        with on_device_of(y):
            _mode_linear_kernel[(ceil_div(rows, BLOCK_R), modes)](
                y, weight, bias, out, *y.stride()[:2], *weight.stride(),
                rows, modes, num_in, num_out, HAS_BIAS=bias is not None, BLOCK_R=BLOCK_R,
                BLOCK_I=dot_block(num_in), BLOCK_O=dot_block(num_out),
                PRECISION=dot_precision(y.dtype), num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def launch_mode_mlp_fwd(
    y: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor]:
    """y (R, M, C), weights (M, C, H), (H,), (M, H, C), (M, C) → dy (R, M, C) and h (R, H)."""
    y = unit_stride(y)
    rows, modes, channels = y.shape
    hidden_width = weight_in.shape[2]
    hidden, out = y.new_empty(rows, hidden_width), y.new_empty(y.shape)
    if out.numel():
        with on_device_of(y):
            _mode_mlp_kernel[(ceil_div(rows, BLOCK_R),)](
                y, weight_in, bias_in, hidden, weight_out, bias_out, None, out,
                *y.stride()[:2], *weight_in.stride(), *weight_out.stride(),
                rows, modes, channels, hidden_width, BACKWARD=False, BLOCK_R=BLOCK_R,
                BLOCK_C=dot_block(channels), BLOCK_H=dot_block(hidden_width),
                PRECISION=dot_precision(y.dtype), num_warps=NUM_WARPS,
            )  # fmt: skip
    return out, hidden


def launch_mode_mlp_bwd(
    grad: Tensor, hidden: Tensor, weight_in: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    """grad (R, M, C), h (R, H) → gradients of y (R, M, C) and of relu's argument (R, H)."""
    grad = unit_stride(grad)
    rows, modes, channels = grad.shape
    grad_hidden, grad_y = torch.empty_like(hidden), grad.new_empty(grad.shape)
    if grad_y.numel():
        into, out_of = weight_out.transpose(1, 2), weight_in.transpose(1, 2)
        with on_device_of(grad):
            _mode_mlp_kernel[(ceil_div(rows, BLOCK_R),)](
                grad, into, None, hidden, out_of, None, grad_hidden, grad_y,
                *grad.stride()[:2], *into.stride(), *out_of.stride(),
                rows, modes, channels, hidden.shape[1], BACKWARD=True, BLOCK_R=BLOCK_R,
                BLOCK_C=dot_block(channels), BLOCK_H=dot_block(hidden.shape[1]),
                PRECISION=dot_precision(grad.dtype), num_warps=NUM_WARPS,
            )  # fmt: skip
    return grad_y, grad_hidden


def launch_mode_attention_fwd(
    y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """y (R, M, C), P (C, C), q (C,), W (M, C, C), b (M, C) → dy (R, M, C)."""
    y = unit_stride(y)
    rows, modes, channels = y.shape
    out = y.new_empty(y.shape)
    if out.numel():
        with on_device_of(y):
            _mode_attention_fwd_kernel[(ceil_div(rows, BLOCK_R),)](
                y, key, query_bias, weight, bias, out,
                *y.stride()[:2], *key.stride(), *weight.stride(), rows, modes, channels,
                BLOCK_R=BLOCK_R, BLOCK_C=dot_block(channels), PRECISION=dot_precision(y.dtype),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return out


def launch_mode_attention_bwd(
    grad: Tensor, y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad (R, M, C) → gradient of y, the mixed rows a, and the gradient of u, (R, M, C) each."""
    grad, y = unit_stride(grad), unit_stride(y)
    rows, modes, channels = y.shape
    grad_y, mixed, grad_u = (y.new_empty(y.shape) for _ in range(3))
    if grad_y.numel():
        with on_device_of(y):
            _mode_attention_bwd_kernel[(ceil_div(rows, BLOCK_R),)](
                grad, y, key, query_bias, weight, mixed, grad_u, grad_y,
                *grad.stride()[:2], *y.stride()[:2], *key.stride(), *weight.stride(),
                rows, modes, channels,
                BLOCK_R=BLOCK_R, BLOCK_C=dot_block(channels), PRECISION=dot_precision(y.dtype),
                num_warps=NUM_WARPS,
            )  # fmt: skip
    return grad_y, mixed, grad_u


def aot_cases() -> list[AotCase]:
    """Feature width 64, coordinates (C = 2), and fp64; 128 hidden units in the MLP."""
    return [
        case
        for channels, dtype in ((64, "fp32"), (2, "fp32"), (64, "fp64"))
        for case in _aot_cases(channels, dtype)
    ]


def _aot_cases(channels: int, dtype: str) -> list[AotCase]:
    block, precision = dot_block(channels), "ieee" if dtype == "fp64" else "tf32x3"

    def case(kernel: Any, name: str, tensors: str, strides: str, **constexprs: Any) -> AotCase:
        sizes = ("num_rows", "num_modes") + (
            ("num_in", "num_out") if kernel is _mode_linear_kernel else ("num_channels",)
        )
        sizes += ("num_hidden",) if kernel is _mode_mlp_kernel else ()
        integers = [f"stride_{s}" for s in strides.split()] + list(sizes)
        absent = {f"{t}_ptr": None for t in constexprs.pop("absent", ())}
        # the inner stride of each weight is 1, or in backward the outer one
        ones = {f"stride_{s}": 1 for s in constexprs.pop("ones")}
        rows = [i for i in integers if i not in ("num_rows", "num_modes") and i not in ones]
        return AotCase(
            kernel=kernel,
            name=f"{name} {dtype} C={channels}",
            signature={f"{t}_ptr": f"*{dtype}" for t in tensors.split() if f"{t}_ptr" not in absent}
            | {i: "i32" for i in integers if i not in ones},
            constexprs={**constexprs, **absent, **ones, "BLOCK_R": BLOCK_R, "PRECISION": precision},
            num_warps=NUM_WARPS,
            divisible_by_16=tuple(rows) if channels % 16 == 0 else (),
            allowed_spills_reason="for checking only: no fp64 tensor products on sm_100"
            if dtype == "fp64"
            else None,
        )

    mlp = "y weight_in bias_in hidden weight_out bias_out grad_hidden out"
    mlp_strides = "yr ym im ii io om oi oo"
    attention = "yr ym ki ko wm wi wo"
    return [
        case(
            _mode_linear_kernel, "mode_linear", "y weight bias out", "yr ym wm wi wo",
            ones=("wo",), HAS_BIAS=True, BLOCK_I=block, BLOCK_O=block,
        ),
        case(
            _mode_mlp_kernel, "mode_mlp_fwd", mlp, mlp_strides, ones=("oo",),
            absent=("grad_hidden",), BACKWARD=False, BLOCK_C=block, BLOCK_H=128,
        ),
        case(
            _mode_mlp_kernel, "mode_mlp_bwd", mlp, mlp_strides, ones=("oi",),
            absent=("bias_in", "bias_out"), BACKWARD=True, BLOCK_C=block, BLOCK_H=128,
        ),
        case(
            _mode_attention_fwd_kernel, "mode_attention_fwd",
            "y key query_bias weight bias out", attention, ones=("ko", "wo"), BLOCK_C=block,
        ),
        case(
            _mode_attention_bwd_kernel, "mode_attention_bwd",
            "grad y key query_bias weight mixed grad_u grad_y", f"gr gm {attention}",
            ones=("ko", "wo"), BLOCK_C=block,
        ),
    ]  # fmt: skip
