"""The graph layers in Triton: EGNN as one operator, GraphSAGE and GCN through `MeanKernels`.

Registered as `gfnode_fast::triton_egnn_layer`, `triton_edge_sum` and `triton_row_linear`, each with
its `_bwd`. Formulas, ownership and cost: kernels/egnn_layer.py, edge_sum.py, row_products.py. Once
differentiable; a second derivative is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gfnode_fast.ops.graph_layers_torch import Activation, EGNNWeights, MLPWeights, State
from gfnode_fast.ops.topology import Topology

ACTIVATIONS: dict[type[nn.Module], bool] = {nn.SiLU: True, nn.Tanh: False}
"""Whether it is SiLU."""


def egnn(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: EGNNWeights,
    activation: Activation,
    norm: bool,
    precision: str,
) -> State:
    """An EGNN layer on state (T*n, ...), edge features sorted like the edges."""
    x, v, h = (part.contiguous() for part in state)
    flat = [weight.contiguous() for mlp in weights for weight in mlp]
    neighbours = list(edges.neighbours)
    x, h, _, _ = torch.ops.gfnode_fast.triton_egnn_layer(
        x, v, h, edge_fea.contiguous(), neighbours, flat, norm, _is_silu(activation), precision
    )
    return x, state[1], h


class TritonKernels:
    """`MeanKernels` in Triton; EGNN is an operator of its own."""

    width_multiple = 1

    def __init__(self, precision: str) -> None:
        self.precision = precision

    def sum(self, node: Tensor, edge: Tensor, edges: Topology, activation: Activation) -> Tensor:
        total: Tensor = torch.ops.gfnode_fast.triton_edge_sum(
            node.flatten(0, 1).contiguous(),
            edge.contiguous(),
            list(edges.neighbours),
            _is_silu(activation),
            self.precision,
        )
        return total.view(*node.shape[:2], edge.shape[1])

    def linear(self, h: Tensor, weight: Tensor) -> Tensor:
        return self._linear(h, weight, None)

    def mlp(self, parts: Sequence[Tensor], weights: MLPWeights, activation: Activation) -> Tensor:
        z = self._linear(torch.cat(tuple(parts), dim=-1), weights.weight0, weights.bias0)
        return self._linear(activation(z), weights.weight2, weights.bias2)

    def _linear(self, h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.ops.gfnode_fast.triton_row_linear(
            h.flatten(0, -2).contiguous(), weight.contiguous(), self.precision
        )
        shaped: Tensor = out.view(*h.shape[:-1], weight.shape[0])
        return shaped if bias is None else shaped + bias


def _is_silu(activation: Activation) -> bool:
    assert isinstance(activation, nn.Module)
    return ACTIVATIONS[type(activation)]


@torch.library.custom_op(
    "gfnode_fast::triton_egnn_layer",
    mutates_args=(),
    schema="(Tensor x, Tensor v, Tensor h, Tensor edge_fea, Tensor[] neighbours, Tensor[] weights, "
    "bool norm, bool silu, str precision) -> (Tensor, Tensor, Tensor, Tensor)",
)
def triton_egnn_layer(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', h', and for backward Σ m and Σ r f."""
    from gfnode_fast.kernels.egnn_layer_launch import launch_egnn_layer_fwd

    return launch_egnn_layer_fwd(x, v, h, edge_fea, neighbours, weights, norm, silu, precision)


@triton_egnn_layer.register_fake
def _(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(h.shape), x.new_empty(x.shape)


@torch.library.custom_op(
    "gfnode_fast::triton_egnn_layer_bwd",
    mutates_args=(),
    schema="(Tensor grad_x, Tensor grad_h, Tensor x, Tensor v, Tensor h, Tensor edge_fea, "
    "Tensor messages, Tensor shift, Tensor[] neighbours, Tensor[] weights, bool norm, bool silu, "
    "str precision, bool wants_edge_fea) -> Tensor[]",
)
def triton_egnn_layer_bwd(
    grad_x: Tensor,
    grad_h: Tensor,
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    messages: Tensor,
    shift: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    precision: str,
    wants_edge_fea: bool,
) -> list[Tensor]:
    """Gradients of x, v, h, edge_fea ((0,) unless wanted) and the 16 weights."""
    from gfnode_fast.kernels.egnn_layer_launch import launch_egnn_layer_bwd

    return list(
        launch_egnn_layer_bwd(
            grad_x, grad_h, x, v, h, edge_fea, messages, shift, neighbours, weights, norm, silu,
            precision, wants_edge_fea,
        )
    )  # fmt: skip


@triton_egnn_layer_bwd.register_fake
def _(
    grad_x: Tensor,
    grad_h: Tensor,
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    messages: Tensor,
    shift: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    norm: bool,
    silu: bool,
    precision: str,
    wants_edge_fea: bool,
) -> list[Tensor]:
    fea = edge_fea if wants_edge_fea else edge_fea.new_empty(0)
    return [tensor.new_empty(tensor.shape) for tensor in (x, v, h, fea, *weights)]


def _save_egnn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, v, h, edge_fea, neighbours, weights, ctx.norm, ctx.silu, ctx.precision = inputs
    _, _, messages, shift = output
    ctx.mark_non_differentiable(messages, shift)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, v, h, edge_fea, messages, shift, *neighbours, *weights)
    ctx.num_neighbours, ctx.wants_edge_fea = len(neighbours), edge_fea.requires_grad


def _pull_egnn(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, v, h, edge_fea, messages, shift, *lists = ctx.saved_tensors
    neighbours, weights = lists[: ctx.num_neighbours], lists[ctx.num_neighbours :]
    grad_x = torch.zeros_like(x) if grad_x is None else grad_x.contiguous()
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h.contiguous()
    found = triton_egnn_layer_bwd(
        grad_x, grad_h, x, v, h, edge_fea, messages, shift, neighbours, weights, ctx.norm, ctx.silu,
        ctx.precision, ctx.wants_edge_fea,
    )  # fmt: skip
    fea = found[3] if ctx.wants_edge_fea else None
    return (*found[:3], fea, [None] * len(neighbours), list(found[4:]), None, None, None)


triton_egnn_layer.register_autograd(_pull_egnn, setup_context=_save_egnn)


@torch.library.custom_op(
    "gfnode_fast::triton_edge_sum",
    mutates_args=(),
    schema="(Tensor node, Tensor edge, Tensor[] neighbours, bool silu, str precision) -> Tensor",
)
def triton_edge_sum(
    node: Tensor, edge: Tensor, neighbours: Sequence[Tensor], silu: bool, precision: str
) -> Tensor:
    """node (T*n, 2H), edge (E, H) → (T*n, H)."""
    from gfnode_fast.kernels.edge_sum_launch import launch_edge_sum_fwd

    return launch_edge_sum_fwd(node, edge, neighbours, silu, precision)


@triton_edge_sum.register_fake
def _(
    node: Tensor, edge: Tensor, neighbours: Sequence[Tensor], silu: bool, precision: str
) -> Tensor:
    return node.new_empty(node.shape[0], edge.shape[1])


@torch.library.custom_op(
    "gfnode_fast::triton_edge_sum_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor node, Tensor edge, Tensor[] neighbours, bool silu, "
    "str precision) -> (Tensor, Tensor)",
)
def triton_edge_sum_bwd(
    grad: Tensor,
    node: Tensor,
    edge: Tensor,
    neighbours: Sequence[Tensor],
    silu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """Gradients of node and edge."""
    from gfnode_fast.kernels.edge_sum_launch import launch_edge_sum_bwd

    return launch_edge_sum_bwd(grad, node, edge, neighbours, silu, precision)


@triton_edge_sum_bwd.register_fake
def _(
    grad: Tensor,
    node: Tensor,
    edge: Tensor,
    neighbours: Sequence[Tensor],
    silu: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    return node.new_empty(node.shape), edge.new_empty(edge.shape)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    node, edge, neighbours, ctx.silu, ctx.precision = inputs
    ctx.save_for_backward(node, edge, *neighbours)


def _pull_sum(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    node, edge, *neighbours = ctx.saved_tensors
    grads = triton_edge_sum_bwd(grad.contiguous(), node, edge, neighbours, ctx.silu, ctx.precision)
    return (*grads, [None] * len(neighbours), None, None)


triton_edge_sum.register_autograd(_pull_sum, setup_context=_save_sum)


@torch.library.custom_op(
    "gfnode_fast::triton_row_linear",
    mutates_args=(),
    schema="(Tensor a, Tensor weight, str precision) -> Tensor",
)
def triton_row_linear(a: Tensor, weight: Tensor, precision: str) -> Tensor:
    """a (R, K), weight (N, K) → (R, N)."""
    from gfnode_fast.kernels.row_products_launch import launch_row_linear

    return launch_row_linear(a, weight, None, 1, weight.shape[0], precision)


@triton_row_linear.register_fake
def _(a: Tensor, weight: Tensor, precision: str) -> Tensor:
    return a.new_empty(a.shape[0], weight.shape[0])


@torch.library.custom_op(
    "gfnode_fast::triton_row_linear_bwd",
    mutates_args=(),
    schema="(Tensor grad, Tensor a, Tensor weight, str precision) -> (Tensor, Tensor)",
)
def triton_row_linear_bwd(
    grad: Tensor, a: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor]:
    """Gradients of a and weight."""
    from gfnode_fast.kernels.row_products_launch import launch_row_linear, launch_row_outer

    return (
        launch_row_linear(grad, weight.t(), None, 1, weight.shape[1], precision),
        launch_row_outer(grad, a, precision),
    )


@triton_row_linear_bwd.register_fake
def _(grad: Tensor, a: Tensor, weight: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    return a.new_empty(a.shape), weight.new_empty(weight.shape)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, weight, ctx.precision = inputs
    ctx.save_for_backward(a, weight)


def _pull_linear(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*triton_row_linear_bwd(grad.contiguous(), *ctx.saved_tensors, ctx.precision), None)


triton_row_linear.register_autograd(_pull_linear, setup_context=_save_linear)


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        "graph layers: `backend` must be 'torch' for a second derivative, got 'triton'; pass "
        "backend='torch'"
    )


for _backward in (triton_egnn_layer_bwd, triton_edge_sum_bwd, triton_row_linear_bwd):
    _backward.register_autograd(_no_second_derivative)
