"""Hooks on modules that are not called: right numbers, or an error that names the hook."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize, prune

import gfnode_fast
from gfnode_fast.reference.layers import EGNNLayer
from model_inputs import constructor, inputs

WHERE = (
    "encode_layers.0.node_net.mlp.0",
    "decode_layers.0.edge_message_net",
    "freq_conv.t_conv.ode_func",
    "freq_conv_x",
)
KINDS = {
    "register_forward_pre_hook": "a forward pre-hook",
    "register_forward_hook": "a forward hook",
    "register_full_backward_pre_hook": "a backward pre-hook",
    "register_full_backward_hook": "a backward hook",
}


def nothing(*_: Any) -> None:
    """A hook."""


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("register", KINDS)
def test_a_hook_that_would_not_run_is_refused(where: str, register: str) -> None:
    message = rf"`{where}` must have no hooks .*, got {KINDS[register]}, nothing; remove"
    model = gfnode_fast.FourierMD(**constructor())
    handle = getattr(model.get_submodule(where), register)(nothing)
    with pytest.raises(RuntimeError, match=message):
        model(**inputs())
    handle.remove()
    model(**inputs())
    slow = gfnode_fast.reference.FourierMD(**constructor())
    gfnode_fast.accelerate(slow)
    getattr(slow.get_submodule(where), register)(nothing)
    with pytest.raises(RuntimeError, match=message.replace("`", "`model.", 1)):
        slow(**inputs())
    gfnode_fast.restore(slow)(**inputs())


def test_pruned_weights_are_never_stale() -> None:
    """After an update, what `prune` keeps as a plain tensor is the old one."""
    model = gfnode_fast.FourierMD(**constructor())
    prune.l1_unstructured(model.decode_layers[0].node_net.mlp[0], "weight", amount=0.5)
    with pytest.raises(RuntimeError, match="got a forward pre-hook, L1Unstructured"):
        model(**inputs())
    model.backend = "reference"
    model(**inputs())
    model.backend = "auto"
    prune.remove(model.decode_layers[0].node_net.mlp[0], "weight")
    model(**inputs())


def test_hooks_that_run() -> None:
    model = gfnode_fast.FourierMD(**constructor(use_vae=True))
    seen: list[int] = []
    for module in (model, model.embedding, model.fc_mu_h):
        module.register_forward_hook(lambda *_: seen.append(1))
    model(**inputs())
    assert len(seen) == 3


def test_counting_evaluations_puts_no_hook_on_the_model() -> None:
    """Which another thread's forward would refuse."""
    model = gfnode_fast.FourierMD(**constructor(solver="explicit_adams"))
    function, hooked = model.freq_conv.t_conv.ode_func, []
    forward = function.forward

    def watched(s: Tensor | None, y: Tensor) -> Tensor:
        hooked.append(len(function._forward_pre_hooks))
        return forward(s, y)

    function.forward = watched  # type: ignore[method-assign]
    model(**inputs())
    assert model.last_solve["freq_conv"].evaluations == len(hooked) > 0
    assert not any(hooked)


def test_a_mixture_refuses_them_too() -> None:
    settings = {k: v for k, v in constructor().items() if k != "num_atoms"}
    model, given = gfnode_fast.GFNODE(**settings), inputs()
    del given["loc_mean"]
    given |= {"ptr": torch.tensor([0, 5, 10]), "eigvecs": given.pop("U_batch").flatten()}
    model(**given)
    model.freq_conv.register_forward_hook(nothing)
    with pytest.raises(RuntimeError, match="GFNODE: `freq_conv` must have no hooks"):
        model(**given)


class Adapted(torch.nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_a_linear_that_does_more_is_refused() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    mlp = model.decode_layers[0].node_net.mlp
    mlp[0] = Adapted(mlp[0].in_features, mlp[0].out_features)
    with pytest.raises(TypeError, match="`linear` must be an nn.Linear, .*, got Adapted"):
        model(**inputs())
    model.backend = "reference"
    model(**inputs())
    slow = gfnode_fast.reference.FourierMD(**constructor())
    slow.embedding = Adapted(2, 8)
    with pytest.raises(TypeError, match="`model.embedding` must be an nn.Linear, .*, got Adapted"):
        gfnode_fast.accelerate(slow)


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parameters_put_elsewhere_are_noticed() -> None:
    model = gfnode_fast.accelerate(gfnode_fast.reference.FourierMD(**constructor()))
    linear = model.decode_layers[0].node_net.mlp[0]
    parametrize.register_parametrization(linear, "weight", Doubled())
    with pytest.raises(RuntimeError, match=r"`model.decode_layers.0.node_net.mlp.0` must hold"):
        model(**inputs())


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_what_takes_no_part_has_no_gradient(backend: str) -> None:
    """As in the reference: None, not zeros, for the last layer's coordinates in a loss on h."""
    torch.manual_seed(0)
    models = (
        gfnode_fast.reference.FourierMD(**constructor()),
        gfnode_fast.FourierMD(**constructor(), backend=backend),
    )
    without: list[set[str]] = []
    for model in models:
        assert isinstance(model.decode_layers[0], EGNNLayer)
        model(**inputs())[2].sum().backward()
        without.append({name for name, p in model.named_parameters() if p.grad is None})
    assert without[0] == without[1]
    assert "decode_layers.0.coord_net.mlp.2.bias" in without[0]
