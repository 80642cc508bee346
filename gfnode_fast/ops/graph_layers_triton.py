"""The graph layers in Triton, each one operator: EGNN, and GraphSAGE and GCN as `mean_layer`.

Registered as `gfnode_fast::triton_egnn_layer` and `triton_mean_layer`, each with its `_bwd`.
Formulas, ownership and cost: kernels/egnn_layer.py, mean_layer.py. Once differentiable; a second
derivative is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gfnode_fast.ops.graph_layers_torch import Activation, EGNNWeights, MeanWeights, State
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
    recompute: bool,
) -> State:
    """An EGNN layer on state (T*n, ...), edge features in the caller's order; `recompute`: sums
    over neighbours are taken again in backward, not kept."""
    given = _given(state, edge_fea, edges, weights)
    form = _is_silu(activation), edges.max_nodes, precision, recompute
    x, h, _, _ = torch.ops.gfnode_fast.triton_egnn_layer(*given, norm, *form)
    return x, given[1], h  # dense, for the next layer to keep as it is


def mean(
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    weights: MeanWeights,
    activation: Activation,
    concatenate_self: bool,
    precision: str,
    recompute: bool,
) -> State:
    """A GraphSAGE (`concatenate_self`) or GCN layer, as `egnn`."""
    given = _given(state, edge_fea, edges, weights)
    form = _is_silu(activation), edges.max_nodes, precision, recompute
    x, v, h, _, _ = torch.ops.gfnode_fast.triton_mean_layer(*given, concatenate_self, *form)
    return x, v, h


def _given(
    state: State, edge_fea: Tensor, edges: Topology, weights: EGNNWeights | MeanWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
    flat = [weight.contiguous() for mlp in weights for weight in mlp]
    x, v, h, fea = (part.contiguous() for part in (*state, edge_fea))
    return x, v, h, fea, list(edges.neighbours), flat


def _is_silu(activation: Activation) -> bool:
    assert isinstance(activation, nn.Module)
    return ACTIVATIONS[type(activation)]


_LAYER = (
    "(Tensor x, Tensor v, Tensor h, Tensor edge_fea, Tensor[] neighbours, Tensor[] weights, "
    "bool {}, bool silu, SymInt? max_nodes, str precision, bool recompute) -> ({})"
)
_BACKWARD = (
    "({}, Tensor[] neighbours, Tensor[] weights, bool {}, bool silu, str precision, "
    "bool wants_edge_fea) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_EGNN_BACKWARD = _BACKWARD.format(
    "Tensor grad_x, Tensor grad_h, Tensor x, Tensor v, Tensor h, Tensor edge_fea, "
    "Tensor messages, Tensor shift",
    "norm",
)
_MEAN_BACKWARD = _BACKWARD.format(
    "Tensor grad_x, Tensor grad_v, Tensor grad_h, Tensor edge_fea, Tensor state, Tensor means",
    "concat",
)


@torch.library.custom_op(
    "gfnode_fast::triton_egnn_layer",
    mutates_args=(),
    schema=_LAYER.format("norm", "Tensor, Tensor, Tensor, Tensor"),
)
def triton_egnn_layer(*given: Any) -> tuple[Tensor, ...]:
    """x', h', and for backward Σ m, (0,) with `recompute`, and Σ r f."""
    from gfnode_fast.kernels.egnn_layer_launch import launch_egnn_layer_fwd

    return launch_egnn_layer_fwd(*given)


@triton_egnn_layer.register_fake
def _(x: Tensor, v: Tensor, h: Tensor, *options: Any) -> tuple[Tensor, ...]:
    x_out, h_out, messages, shift = (part.new_empty(part.shape) for part in (x, h, h, x))
    return x_out, h_out, messages.new_empty(0) if options[-1] else messages, shift


@torch.library.custom_op(
    "gfnode_fast::triton_egnn_layer_bwd", mutates_args=(), schema=_EGNN_BACKWARD
)
def triton_egnn_layer_bwd(*given: Any) -> tuple[Tensor, ...]:
    """Gradients of x, v, h, edge_fea ((0,) unless wanted), and of the weights end to end."""
    from gfnode_fast.kernels.egnn_layer_launch import launch_egnn_layer_bwd

    return launch_egnn_layer_bwd(*given)


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
    *options: Any,
) -> tuple[Tensor, ...]:
    return _empty_gradients((x, v, h), edge_fea, weights, options[-1])


@torch.library.custom_op(
    "gfnode_fast::triton_mean_layer",
    mutates_args=(),
    schema=_LAYER.format("concat", "Tensor, Tensor, Tensor, Tensor, Tensor"),
)
def triton_mean_layer(*given: Any) -> tuple[Tensor, ...]:
    """x', v', h', and for backward c and the means of act(u), (0,) with `recompute`."""
    from gfnode_fast.kernels.mean_layer_launch import launch_mean_layer_fwd

    return launch_mean_layer_fwd(*given)


@triton_mean_layer.register_fake
def _(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edge_fea: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    outputs = (part.new_empty(part.shape) for part in (x, v, h))
    state, means = (h.new_empty(h.shape[0], width) for width in weights[2].shape)
    return *outputs, state, means.new_empty(0) if options[-1] else means


@torch.library.custom_op(
    "gfnode_fast::triton_mean_layer_bwd", mutates_args=(), schema=_MEAN_BACKWARD
)
def triton_mean_layer_bwd(*given: Any) -> tuple[Tensor, ...]:
    """As `triton_egnn_layer_bwd`."""
    from gfnode_fast.kernels.mean_layer_launch import launch_mean_layer_bwd

    return launch_mean_layer_bwd(*given)


@triton_mean_layer_bwd.register_fake
def _(
    grad_x: Tensor,
    grad_v: Tensor,
    grad_h: Tensor,
    edge_fea: Tensor,
    state: Tensor,
    means: Tensor,
    neighbours: Sequence[Tensor],
    weights: Sequence[Tensor],
    *options: Any,
) -> tuple[Tensor, ...]:
    return _empty_gradients((grad_x, grad_v, grad_h), edge_fea, weights, options[-1])


def _empty_gradients(
    state: State, edge_fea: Tensor, weights: Sequence[Tensor], wants_edge_fea: bool
) -> tuple[Tensor, ...]:
    fea = edge_fea.new_empty(edge_fea.shape if wants_edge_fea else 0)
    flat = edge_fea.new_empty(sum(weight.numel() for weight in weights))
    return *(part.new_empty(part.shape) for part in state), fea, flat


def _save(ctx: Any, inputs: tuple[Any, ...], saved: tuple[Tensor, ...]) -> None:
    """What both layers keep; `saved`: the node states of this one."""
    *_, edge_fea, neighbours, weights, ctx.flag, ctx.silu, _, ctx.precision, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*saved, *neighbours, *weights)
    ctx.num_saved, ctx.num_neighbours = len(saved), len(neighbours)
    ctx.wants_edge_fea = edge_fea.requires_grad


def _save_egnn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[2:])
    _save(ctx, inputs, (*inputs[:4], *output[2:]))


def _save_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[3:])
    _save(ctx, inputs, (inputs[3], *output[3:]))


def _pull(backward: Any, ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    lists = ctx.saved_tensors[ctx.num_saved :]
    neighbours, weights = lists[: ctx.num_neighbours], lists[ctx.num_neighbours :]
    *of_state, fea, flat = backward(
        *grads, *ctx.saved_tensors[: ctx.num_saved], neighbours, weights, ctx.flag, ctx.silu,
        ctx.precision, ctx.wants_edge_fea,
    )  # fmt: skip
    parts = flat.split([weight.numel() for weight in weights])
    of_weights = [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
    of_fea = fea if ctx.wants_edge_fea else None
    return (*of_state, of_fea, [None] * len(neighbours), of_weights, *[None] * 5)


def _dense(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape) if grad is None else grad.contiguous()


def _pull_egnn(ctx: Any, grad_x: Tensor | None, grad_h: Tensor | None, *_: Any) -> tuple[Any, ...]:
    x, _v, h = ctx.saved_tensors[:3]
    # The decoder's last features take no part in training on positions: a row of zeros for all.
    of_h = h.new_zeros(1, h.shape[1]).expand_as(h) if grad_h is None else grad_h.contiguous()
    grads = list(_pull(triton_egnn_layer_bwd, ctx, [_dense(grad_x, x), of_h]))
    of_weights = grads[5]  # four each of the message, coordinate, velocity and node MLP
    # None rather than zeros for what takes no part, which an optimizer with decay tells apart.
    if grad_x is None:
        grads[1], of_weights[4:12] = None, [None] * 8
    if grad_h is None:
        of_weights[12:] = [None] * 4
    return tuple(grads)


def _pull_mean(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    state = ctx.saved_tensors[1]
    like = state[:, :3], state[:, :3], state[:, 6:]
    dense = [_dense(grad, part) for grad, part in zip(grads[:3], like, strict=True)]
    return _pull(triton_mean_layer_bwd, ctx, dense)


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise RuntimeError(
        "graph layers: `backend` must be 'torch' for a second derivative, got 'triton'; pass "
        "backend='torch'"
    )


triton_egnn_layer.register_autograd(_pull_egnn, setup_context=_save_egnn)
triton_mean_layer.register_autograd(_pull_mean, setup_context=_save_mean)
for _backward in (triton_egnn_layer_bwd, triton_mean_layer_bwd):
    _backward.register_autograd(_no_second_derivative)
