"""Other ways to differentiate than torch.autograd.grad: refused, never silently wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import gfnode_fast
from gfnode_fast.ops import eigh_batched, graph_fourier, matrix_function
from gfnode_fast.ops.synthesis import synthesise_solved
from graph_layer_cases import NEEDS_CPP
from model_inputs import constructor, inputs


@pytest.mark.parametrize(
    "changes", [{}, {"backend": "torch"}, {"backend": "torch", "solver_mode": "exact"}], ids=str
)
def test_transforms_are_refused(changes: dict[str, Any]) -> None:
    model = gfnode_fast.FourierMD(**constructor(), **changes)
    given = inputs()
    x = given["x"]

    def call(x: Tensor) -> Tensor:
        return model(**(given | {"x": x}))[0]

    for transformed in (
        lambda: torch.func.grad(lambda x: call(x).sum())(x),
        lambda: torch.func.vjp(call, x),
        lambda: torch.func.jvp(call, (x,), (x,)),
        lambda: torch.func.vmap(call)(torch.stack((x, x))),
    ):
        with pytest.raises(RuntimeError, match=r": `.* must be .*torch\.func"):
            transformed()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD|with a tan"):
        call(forward_ad.make_dual(x, x))
    out = call(x.requires_grad_())
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(out, x, torch.stack((out, out)), is_grads_batched=True)


def first_output(name: str, value: Tensor) -> Callable[[Tensor], Tensor]:
    """Of an operation whose operator is registered with a backward alone, of one input."""
    if name == "matrix_function":
        return lambda A: matrix_function(A, torch.exp)
    if name == "graph_fourier":
        eye, ptr = torch.eye(3, dtype=value.dtype).flatten(), torch.tensor([0, 3])
        return lambda x: graph_fourier(x, eye, 2, ptr=ptr)
    if name == "eigh_batched":
        return lambda A: eigh_batched(A)[0]
    no_solve = {"fourier_basis": "graph", "no_ode": name == "synthesis"}
    if name != "synthesis":
        no_solve |= {"propagate_x": False, "propagate_h": False, "gnn_ablation_mode": name}
    model, given = gfnode_fast.FourierMD(**constructor(**no_solve)), inputs()
    if name == "synthesis":
        return lambda v: synthesise_solved(v, given["U_batch"], torch.ones(2, 5, 1, 8), nn.SiLU())
    return lambda x: model(**(given | {"x": x}))[0]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("matrix_function", (3, 3)), ("graph_fourier", (3, 2)), ("eigh_batched", (3, 3)),
        ("synthesis", (2, 4, 1, 3, 8)), ("egnn", (10, 3)), ("sage", (10, 3)), ("gcn", (10, 3)),
    ],
)  # fmt: skip
@NEEDS_CPP
def test_tangents_are_not_lost_unseen(name: str, shape: tuple[int, ...]) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    function = first_output(name, value)
    with pytest.raises(RuntimeError, match="with a tangent|torch.func transforms"):
        torch.func.jvp(function, (value,), (value,))
    with forward_ad.dual_level():
        function(value)  # nothing to lose
        with pytest.raises(RuntimeError, match="with a tangent"):
            function(forward_ad.make_dual(value, value))
