"""The compiled kernels of the graph layers: float32 on the CPU, SiLU or Tanh.

Registered as `gfnode_fast::egnn_edges`, `sum_edges`, `row_mlp` and `row_linear`. Formulas,
ownership and cost: csrc/cpu/edge_layers.h, row_mlp.h. Once differentiable; a second derivative is
refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gfnode_fast._extension import REBUILD, why_no_extension
from gfnode_fast.ops.graph_layers_torch import Activation, MLPWeights, PerEdgeWeights
from gfnode_fast.ops.topology import Topology

ACTIVATIONS: dict[type[nn.Module], int] = {nn.SiLU: 0, nn.Tanh: 1}
_NUM_EGNN_TENSORS = 12  # leading tensor arguments of egnn_edges

_registered = False


def why_not_compiled() -> str | None:
    """None when the compiled kernels are there, else what is missing."""
    global _registered
    if problem := why_no_extension():
        return problem
    if not hasattr(torch.ops.gfnode_fast, "row_linear"):
        return f"the extension was built without them; {REBUILD}"
    if not _registered:
        _register()
        _registered = True
    return None


# What torch.compiler.assume_constant_result does, without importing torch's compiler, which takes a
# second: a traced graph takes the answer as it is.
why_not_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]


class CompiledKernels:
    """`LayerKernels` in C++."""

    width_multiple = 16

    def egnn(
        self,
        x: Tensor,
        node: Tensor,
        edge: Tensor,
        edges: Topology,
        weights: PerEdgeWeights,
        activation: Activation,
        norm: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (x, node, edge, edges.row, edges.col, *weights)
        keep = _needs_grad(tensors)
        messages, shift, _, _ = torch.ops.gfnode_fast.egnn_edges(
            *(tensor.contiguous() for tensor in tensors), _code(activation), norm, keep
        )
        return messages, shift

    def sum(self, node: Tensor, edge: Tensor, edges: Topology, activation: Activation) -> Tensor:
        total: Tensor = torch.ops.gfnode_fast.sum_edges(
            node.contiguous(), edge.contiguous(), edges.row, edges.col, _code(activation)
        )
        return total

    def linear(self, h: Tensor, weight: Tensor) -> Tensor:
        rows = h.reshape(-1, h.shape[-1]).contiguous()
        out = torch.ops.gfnode_fast.row_linear(rows, weight.contiguous())
        shaped: Tensor = out.view(*h.shape[:-1], weight.shape[0])
        return shaped

    def mlp(self, parts: Sequence[Tensor], weights: MLPWeights, activation: Activation) -> Tensor:
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        if len(rows) == 1:
            rows.append(rows[0].new_empty(rows[0].shape[0], 0))
        tensors = (*rows, *weights)
        keep = _needs_grad(tensors)
        result, _ = torch.ops.gfnode_fast.row_mlp(
            *(tensor.contiguous() for tensor in tensors), _code(activation), keep
        )
        shaped: Tensor = result.view(*parts[0].shape[:-1], weights.weight2.shape[0])
        return shaped


def _needs_grad(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _code(activation: Activation) -> int:
    assert isinstance(activation, nn.Module)
    return ACTIVATIONS[type(activation)]


def _register() -> None:
    for name, fake, backward_fake, setup, backward in (
        ("egnn_edges", _egnn_fake, _egnn_backward_fake, _egnn_context, _egnn_backward),
        ("sum_edges", _sum_fake, _sum_backward_fake, _sum_context, _sum_backward),
        ("row_mlp", _mlp_fake, _mlp_backward_fake, _mlp_context, _mlp_backward),
        ("row_linear", _linear_fake, _linear_backward_fake, _linear_context, _linear_backward),
    ):
        op = f"gfnode_fast::{name}"
        torch.library.register_fake(op, fake)
        torch.library.register_fake(f"{op}_backward", backward_fake)
        torch.library.register_autograd(op, backward, setup_context=setup)
        torch.library.register_autograd(f"{op}_backward", _no_second_derivative)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "graph layers: `backend` must be 'torch' for a second derivative, got 'cpp'; pass "
        "backend='torch'"
    )


def _egnn_fake(x: Tensor, node: Tensor, edge: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    w2, wc, keep = rest[3], rest[5], rest[-1]
    copies, nodes = node.shape[:2]
    kept = edge.shape[0] if keep else 0
    return (
        x.new_empty(copies, nodes, w2.shape[0]),
        x.new_empty(copies, nodes, 3),
        x.new_empty(copies, kept, w2.shape[0]),
        x.new_empty(copies, kept, wc.shape[0]),
    )


def _egnn_backward_fake(grad_sum: Tensor, grad_shift: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, node, edge, _, _, *weights = rest[:_NUM_EGNN_TENSORS]
    return tuple(x.new_empty(tensor.shape) for tensor in (x, node, edge, *weights))


def _egnn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, z2, z3 = output
    ctx.mark_non_differentiable(z2, z3)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_NUM_EGNN_TENSORS], z2, z3)
    ctx.activation, ctx.norm = inputs[_NUM_EGNN_TENSORS : _NUM_EGNN_TENSORS + 2]


def _egnn_backward(
    ctx: Any, grad_sum: Tensor | None, grad_shift: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    x, node, _, _, _, _, w2, *_ = saved = ctx.saved_tensors
    if grad_sum is None:
        grad_sum = x.new_zeros(*node.shape[:2], w2.shape[0])
    has_shift = grad_shift is not None
    if grad_shift is None:
        grad_shift = torch.zeros_like(x)
    grads = torch.ops.gfnode_fast.egnn_edges_backward(
        grad_sum.contiguous(), grad_shift.contiguous(), *saved, ctx.activation, ctx.norm
    )
    of_coordinates = grads[6:] if has_shift else (None,) * 4
    return (*grads[:3], None, None, *grads[3:6], *of_coordinates, None, None, None)


def _sum_fake(node: Tensor, edge: Tensor, row: Tensor, col: Tensor, activation: int) -> Tensor:
    return node.new_empty(*node.shape[:2], edge.shape[1])


def _sum_backward_fake(grad_sum: Tensor, node: Tensor, edge: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return node.new_empty(node.shape), node.new_empty(edge.shape)


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[4]


def _sum_backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
    node, edge = torch.ops.gfnode_fast.sum_edges_backward(
        grad_sum.contiguous(), *ctx.saved_tensors, ctx.activation
    )
    return node, edge, None, None, None


def _mlp_fake(
    a: Tensor,
    b: Tensor,
    w0: Tensor,
    b0: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    width = w0.shape[0] + -w0.shape[0] % CompiledKernels.width_multiple
    rows = a.shape[0]
    return a.new_empty(rows, w2.shape[0]), a.new_empty(rows if keep else 0, width)


def _mlp_backward_fake(grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(grad.new_empty(tensor.shape) for tensor in rest[:6])


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:6], output[1])
    ctx.activation = inputs[6]


def _mlp_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    grads = torch.ops.gfnode_fast.row_mlp_backward(
        grad.contiguous(), *ctx.saved_tensors, ctx.activation
    )
    return (*grads, None, None)


def _linear_fake(a: Tensor, w: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], w.shape[0])


def _linear_backward_fake(grad: Tensor, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), w.new_empty(w.shape)


def _linear_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    a, w = torch.ops.gfnode_fast.row_linear_backward(grad.contiguous(), *ctx.saved_tensors)
    return a, w
