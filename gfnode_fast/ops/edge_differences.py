"""x_row - x_col in graphs of torch.compile on the CPU, as one operator.

The compiler's CPU code (torch 2.13) fuses the two sums over edges in the gradient of x with the
sum that feeds them, and loses a part of it without a word. An operator it cannot look into keeps
them apart; `torch._inductor.config.score_fusion_memory_threshold = 1 << 40` would too, for the
whole process.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def edge_differences(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """x (..., n, 3), row and col (E,) → x_row - x_col (..., E, 3)."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        difference: Tensor = torch.ops.gfnode_fast.edge_differences(x, row, col)
        return difference
    return x.index_select(-2, row) - x.index_select(-2, col)


@torch.library.custom_op("gfnode_fast::edge_differences", mutates_args=())
def _edge_differences(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return x.index_select(-2, row) - x.index_select(-2, col)


@_edge_differences.register_fake
def _(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-2], row.shape[0], x.shape[-1])


@torch.library.custom_op("gfnode_fast::edge_differences_bwd", mutates_args=())
def _edge_differences_bwd(grad: Tensor, row: Tensor, col: Tensor, num_nodes: int) -> Tensor:
    summed = grad.new_zeros(*grad.shape[:-2], num_nodes, grad.shape[-1])
    return summed.index_add_(-2, row, grad).index_add_(-2, col, grad, alpha=-1)


@_edge_differences_bwd.register_fake
def _(grad: Tensor, row: Tensor, col: Tensor, num_nodes: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-2], num_nodes, grad.shape[-1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, row, col = inputs
    ctx.save_for_backward(row, col)
    ctx.num_nodes = x.shape[-2]


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _edge_differences_bwd(grad, *ctx.saved_tensors, ctx.num_nodes), None, None


_edge_differences.register_autograd(_pull, setup_context=_save)
