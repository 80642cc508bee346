"""The folded right-hand sides as operators of `torch.ops.gfnode_fast`, served by Triton.

Rows y (R, M, C). Gradients of weights are batched products of what the kernels leave behind. Once
differentiable: the backward operators have no derivative, and asking for one raises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.dispatch import require_triton

LARGEST_C = 64
LARGEST_H = 128


def unserved_by_triton(dtype: torch.dtype, channels: int) -> str | None:
    """Why the kernels do not serve such a state, or None; an MLP's width is the published one."""
    if dtype not in (torch.float32, torch.float64):
        return f"the Triton kernels serve float32 and float64, not {dtype}"
    if channels > LARGEST_C:
        return f"the Triton kernels serve at most {LARGEST_C} channels, not {channels}"
    return None


def _check(y: Tensor, *weights: Tensor, hidden: int = 0) -> None:
    """What the kernels cannot serve."""
    require_triton("mode_rhs", y)
    if y.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"mode_rhs: `y` must be float32 or float64 with backend='triton', got {y.dtype}; "
            "convert it or use backend='torch'"
        )
    for weight in weights:
        if weight.dtype != y.dtype or weight.device != y.device:
            raise TypeError(
                f"mode_rhs: `y` must be {weight.dtype} on {weight.device} like the parameters, got "
                f"{y.dtype} on {y.device}; convert one of them"
            )
    for what, width, largest in (("channels", y.shape[2], LARGEST_C), ("units", hidden, LARGEST_H)):
        if width > largest:
            raise ValueError(
                f"mode_rhs: `y` must have at most {largest} {what} with backend='triton', got "
                f"{width}; use backend='torch'"
            )


def _over_rows(left: Tensor, right: Tensor) -> Tensor:
    """Σ_r left[r, m, i] right[r, m, o]: (M, I, O)."""
    return torch.bmm(left.permute(1, 2, 0), right.transpose(0, 1))


def _empty_rows(y: Tensor) -> Tensor:
    return y.new_empty(y.shape)


@torch.library.custom_op(
    "gfnode_fast::mode_linear",
    mutates_args=(),
    schema="(Tensor y, Tensor weight, Tensor? bias) -> Tensor",
)
def mode_linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """dy_m = y_m W_m + b_m; W (M, C, C), b (M, C)."""
    from gfnode_fast.kernels.mode_rhs_launch import launch_mode_linear

    _check(y, weight)
    return launch_mode_linear(y, weight, None if bias is None else bias.contiguous())


@mode_linear.register_fake
def _(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return y.new_empty(*y.shape[:2], weight.shape[2])


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, weight, _ = inputs
    ctx.save_for_backward(y, weight)


def _pull_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, weight = ctx.saved_tensors
    wants_y, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        mode_linear(grad, weight.transpose(1, 2), None) if wants_y else None,
        _over_rows(y, grad) if wants_weight else None,
        grad.sum(0) if wants_bias else None,
    )


mode_linear.register_autograd(_pull_linear, setup_context=_save_linear)


@torch.library.custom_op(
    "gfnode_fast::mode_mlp",
    mutates_args=(),
    schema="(Tensor y, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out) "
    "-> (Tensor, Tensor)",
)
def mode_mlp(
    y: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor]:
    """dy and h (R, H) of concat; weights (M, C, H), (H,), (M, H, C), (M, C)."""
    from gfnode_fast.kernels.mode_rhs_launch import launch_mode_mlp_fwd

    _check(y, weight_in, weight_out, hidden=weight_in.shape[2])
    return launch_mode_mlp_fwd(
        y, weight_in, bias_in.contiguous(), weight_out, bias_out.contiguous()
    )


@mode_mlp.register_fake
def _(
    y: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor]:
    return _empty_rows(y), y.new_empty(y.shape[0], weight_in.shape[2])


@torch.library.custom_op(
    "gfnode_fast::mode_mlp_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight_in, Tensor weight_out) -> (Tensor, Tensor)",
)
def mode_mlp_bwd(
    grad: Tensor, hidden: Tensor, weight_in: Tensor, weight_out: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and of relu's argument."""
    from gfnode_fast.kernels.mode_rhs_launch import launch_mode_mlp_bwd

    return launch_mode_mlp_bwd(grad, hidden, weight_in, weight_out)


@mode_mlp_bwd.register_fake
def _(grad: Tensor, hidden: Tensor, weight_in: Tensor, weight_out: Tensor) -> tuple[Tensor, Tensor]:
    return _empty_rows(grad), _empty_rows(hidden)


def _save_mlp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, weight_in, _, weight_out, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(y, weight_in, weight_out, output[1])


def _pull_mlp(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    y, weight_in, weight_out, hidden = ctx.saved_tensors
    grad_y, grad_hidden = mode_mlp_bwd(grad, hidden, weight_in, weight_out)
    expanded = grad_hidden.unsqueeze(1).expand(-1, y.shape[1], -1)
    return (
        grad_y,
        _over_rows(y, expanded),
        grad_hidden.sum(0),
        _over_rows(hidden.unsqueeze(1).expand_as(expanded), grad),
        grad.sum(0),
    )


mode_mlp.register_autograd(_pull_mlp, setup_context=_save_mlp)


@torch.library.custom_op(
    "gfnode_fast::mode_attention",
    mutates_args=(),
    schema="(Tensor y, Tensor key, Tensor query_bias, Tensor weight, Tensor bias) -> Tensor",
)
def mode_attention(
    y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """dy of attention; P (C, C), q (C,), W (M, C, C), b (M, C)."""
    from gfnode_fast.kernels.mode_rhs_launch import launch_mode_attention_fwd

    _check(y, key, weight)
    return launch_mode_attention_fwd(y, key, query_bias.contiguous(), weight, bias.contiguous())


@mode_attention.register_fake
def _(y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _empty_rows(y)


@torch.library.custom_op(
    "gfnode_fast::mode_attention_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor y, Tensor key, Tensor query_bias, Tensor weight) "
    "-> (Tensor, Tensor, Tensor)",
)
def mode_attention_bwd(
    grad: Tensor, y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of y, the mixed rows a = A y, and the gradient of u = y P + q."""
    from gfnode_fast.kernels.mode_rhs_launch import launch_mode_attention_bwd

    return launch_mode_attention_bwd(grad, y, key, query_bias.contiguous(), weight)


@mode_attention_bwd.register_fake
def _(
    grad: Tensor, y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_rows(y), _empty_rows(y), _empty_rows(y)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def attention_gradients(
    grad: Tensor, y: Tensor, key: Tensor, query_bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of y, P, q, W and b."""
    grad_y, mixed, grad_u = mode_attention_bwd(grad, y, key, query_bias, weight)
    return (
        grad_y,
        y.flatten(0, 1).T @ grad_u.flatten(0, 1),
        grad_u.sum((0, 1)),
        _over_rows(mixed, grad),
        grad.sum(0),
    )


def _pull_attention(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return attention_gradients(grad, *ctx.saved_tensors)


mode_attention.register_autograd(_pull_attention, setup_context=_save_attention)
