"""Other ways to differentiate than torch.autograd.grad: refused, never silently wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import gfnode_fast
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
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        call(forward_ad.make_dual(x, x))
    out = call(x.requires_grad_())
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(out, x, torch.stack((out, out)), is_grads_batched=True)
