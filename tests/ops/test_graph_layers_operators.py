"""The compiled operators of the graph layers, called as they are registered."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gfnode_fast.ops.graph_layers_cpp import why_not_compiled
from gfnode_fast.ops.topology import topology
from graph_layer_cases import (
    LAYERS,
    NEEDS_CPP,
    cast,
    edges_of,
    make_inputs,
    make_layer,
    molecules,
    ours,
)
from op_checks import opcheck


@NEEDS_CPP
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivative_of_compiled_kernels_is_refused(name: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(name, 4).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=4), torch.float32)
    x = given["x"].requires_grad_()
    out = ours(layer, given, num_nodes, edges, backend="cpp")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@NEEDS_CPP
@pytest.mark.parametrize("keep", [False, True])
def test_registered_operators(keep: bool) -> None:
    assert why_not_compiled() is None
    num_nodes, edges = edges_of("unsorted")
    built = topology(*edges, num_nodes)

    def randn(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape).requires_grad_(grad)

    x, node, edge = randn(2, 5, 3), randn(2, 5, 32), randn(8, 16)
    weights = [randn(*s) for s in ((16,), (16, 16), (16,), (16, 16), (16,), (16,), (1,))]
    ops = torch.ops.gfnode_fast
    egnn = (x, node, edge, built.row, built.col, *weights)
    mlp = (randn(6, 3), randn(6, 2), randn(4, 5), randn(4), randn(1, 4), randn(1))
    if keep:
        opcheck(ops.egnn_edges, *egnn, 0, False, True)
        opcheck(ops.row_mlp, *mlp, 1, True)
        opcheck(ops.sum_edges, node, edge, built.row, built.col, 0)
        opcheck(ops.row_linear, randn(6, 3), randn(5, 3))
    detached = [tensor.detach() for tensor in egnn]
    plain = [tensor.detach() for tensor in mlp]
    sums, shift, z2, z3 = ops.egnn_edges(*detached, 0, True, keep)
    opcheck(ops.egnn_edges_backward, sums, shift, *detached, z2, z3, 0, True)
    _, z = ops.row_mlp(*plain, 0, True)
    opcheck(ops.row_mlp_backward, randn(6, 1, grad=False), *plain, z, 0)
    total = ops.sum_edges(*detached[1:5], 1)
    opcheck(ops.sum_edges_backward, total, *detached[1:5], 1)
    if keep:
        linear = [randn(*shape, grad=False) for shape in ((6, 5), (6, 3), (5, 3))]
        opcheck(ops.row_linear_backward, *linear)


@NEEDS_CPP
def test_kernels_give_the_same_bits_for_any_number_of_threads() -> None:
    assert why_not_compiled() is None
    num_nodes, edges = molecules(600)
    built = topology(*edges, num_nodes)
    ops, generator = torch.ops.gfnode_fast, torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, node, edge = randn(2, num_nodes, 3), randn(2, num_nodes, 32), randn(built.num_edges, 16)
    weights = [randn(*s) for s in ((16,), (16, 16), (16,), (16, 16), (16,), (16,), (1,))]
    egnn = (x, node, edge, built.row, built.col, *weights)
    mlp = (randn(9000, 20), randn(9000, 3), randn(16, 23), randn(16), randn(5, 16), randn(5))
    grad, linear_weight = randn(9000, 5), randn(5, 20)

    def everything() -> list[Tensor]:
        sums, shift, z2, z3 = ops.egnn_edges(*egnn, 0, False, True)
        out, z = ops.row_mlp(*mlp, 0, True)
        total = ops.sum_edges(*egnn[1:5], 1)
        return [
            *(sums, shift, z2, z3, out, total),
            *ops.egnn_edges_backward(sums, shift, *egnn, z2, z3, 0, False),
            *ops.row_mlp_backward(grad, *mlp, z, 0),
            *ops.sum_edges_backward(total, *egnn[1:5], 1),
            ops.row_linear(mlp[0], linear_weight),
            *ops.row_linear_backward(grad, mlp[0], linear_weight),
        ]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for got, expected in zip(other, runs[0], strict=True):
            assert torch.equal(got, expected)


@NEEDS_CPP
def test_operators_check_their_own_arguments() -> None:
    assert why_not_compiled() is None
    node, edge = torch.zeros(1, 3, 32), torch.zeros(2, 16)
    row, col = torch.tensor([0, 2]), torch.tensor([1, 0])
    sum_edges = torch.ops.gfnode_fast.sum_edges
    sum_edges(node, edge, row, col, 0)
    for bad, message in (
        ((node, edge, row.flip(0), col, 0), "sorted by row"),
        ((node, edge, row, col + 2, 0), "within the 3 nodes"),
        ((node, edge, row, col, 7), "`activation` must be 0 or 1"),
        ((node, edge.double(), row, col, 0), "wrong dtype"),
        ((node, torch.zeros(2, 15), row, col, 0), "multiples of 16"),
        ((torch.zeros(1, 32, 3).mT, edge, row, col, 0), "`node` must be contiguous"),
        ((node[..., :16], edge, row, col, 0), "`node`"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sum_edges(*bad)
