"""What is put on or in the place of modules that are not called: right numbers, or an error that
names it.
"""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import gfnode_fast
from foreign_model import ForeignMD
from gfnode_fast.reference.layers import EGNNLayer
from gfnode_fast.reference.propagator import ModeRHS
from golden_files import relative_error
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
    message = rf"`{where}` must have no hooks .*, got {KINDS[register]}, nothing; undo that"
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


def test_counting_evaluations_puts_no_hook_on_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which another thread's forward would refuse."""
    model = gfnode_fast.FourierMD(**constructor(solver="explicit_adams"))
    function, hooked = model.freq_conv.t_conv.ode_func, []
    forward = ModeRHS.forward

    def watched(self: ModeRHS, s: Tensor | None, y: Tensor) -> Tensor:
        if self is function:
            hooked.append(len(self._forward_pre_hooks))
        return forward(self, s, y)

    monkeypatch.setattr(ModeRHS, "forward", watched)
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


def twice(module: nn.Module) -> None:
    """Put a forward on a module that gives twice its own."""
    forward = module.forward

    def doubled(*given: Any) -> Any:
        out = forward(*given)
        return tuple(2 * part for part in out) if isinstance(out, tuple) else 2 * out

    module.forward = doubled  # type: ignore[method-assign]


def derived(module: nn.Module) -> None:
    """Give a module a class of its own, whose forward gives twice as much."""
    known = type(module)

    class Adapted(known):  # type: ignore[misc, valid-type]
        def forward(self, *given: Any) -> Any:
            out = super().forward(*given)
            return tuple(2 * part for part in out) if isinstance(out, tuple) else 2 * out

    module.__class__ = Adapted


def put(replacement: nn.Module) -> Callable[[nn.Module], object]:
    return lambda sequential: sequential.__setitem__(1, replacement)  # type: ignore[operator]


def minimum(x: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """Differences of periodic images, for instance."""
    return (x[row] - x[col]).remainder(1)


class Doubling(nn.SiLU):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


CHANGES: list[tuple[str, Callable[[nn.Module], object], str]] = [
    *((where, twice, "its class's forward .*, got twice.*doubled") for where in (
        "decode_layers.0", "decode_layers.0.coord_net", "encode_layers.0.node_net.mlp.2",
        "encode_layers.0.edge_message_net.scalar_net.mlp.1", "freq_conv", "freq_conv_x.t_conv",
        "freq_conv.t_conv.ode_func",
    )),
    *((where, derived, "be of class .*, got .*Adapted") for where in (
        "decode_layers.0", "decode_layers.0.coord_net", "decode_layers.0.node_net.mlp.0",
        "encode_layers.0.node_v_net.mlp", "freq_conv", "freq_conv.t_conv.ode_func",
    )),
    *((f"decode_layers.0.{where}.mlp", put(act), rf"be SiLU\(\), the model's .*, got {act!s:.4}")
      for act in (nn.Tanh(), Doubling())
      for where in ("edge_message_net.scalar_net", "coord_net", "node_net")),
    ("decode_layers.0.coord_net.mlp", lambda m: m.append(nn.Tanh()), "hold 0, 1, 2 and nothing"),
    ("decode_layers", lambda m: m.append(nn.Identity()), "be of class EGNNLayer .*, got Identity"),
    ("decode_layers.0", lambda m: setattr(m, "difference", minimum), "the published difference"),
]  # fmt: skip


@pytest.mark.parametrize(("where", "change", "message"), CHANGES)
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_what_would_not_run_is_refused(
    where: str, change: Callable[[nn.Module], object], message: str, late: bool
) -> None:
    errors = (RuntimeError, TypeError, ValueError)
    model = gfnode_fast.FourierMD(**constructor())
    if late:
        model(**inputs())
    change(model.get_submodule(where))
    with pytest.raises(errors, match=rf"^FourierMD: `{where}.*` must .*{message}.*; undo that"):
        model(**inputs())
    if not late:
        model.backend = "reference"
        if "Identity" not in message:  # with which the published model cannot run either
            model(**inputs())
    slow = gfnode_fast.reference.FourierMD(**constructor())
    if late:
        gfnode_fast.accelerate(slow)
    change(slow.get_submodule(where))
    with pytest.raises(errors, match=rf"^accelerate: `model.{where}") as caught:
        slow(**inputs()) if late else gfnode_fast.accelerate(slow)
    if not late and "Identity" not in message:
        assert re.search(message, str(caught.value))


def replace_hooks(module: nn.Module) -> None:
    module._forward_hooks = OrderedDict({0: nothing})  # which no handle has counted


def reorder(module: nn.Module) -> None:
    module._modules["0"] = module._modules.pop("0")


def exchange_for_a_forward(module: nn.Module) -> None:
    """As many attributes as before."""
    del module.in_features
    twice(module)


def exchange_for_a_solve(module: nn.Module) -> None:
    del module.no_ode
    module.solve = nothing  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("decode_layers.0.node_net.mlp.0", replace_hooks, "have no hooks"),
        ("decode_layers.0.node_net.mlp", reorder, "hold 0, 1, 2"),
        ("decode_layers.0.node_net.mlp.0", exchange_for_a_forward, "its class's forward"),
        ("freq_conv.t_conv", exchange_for_a_solve, "its class's solve"),
        ("decode_layers.0.node_net.mlp.1", lambda m: setattr(m, "alpha", 2.0), "be ELU"),
        ("decode_layers.0.node_net.mlp.0", lambda m: twice(type(m)), "be of class Linear"),
    ],
)
def test_small_changes_between_calls_are_noticed(
    where: str, change: Callable[[nn.Module], object], message: str
) -> None:
    """Also where activations are instances of their own, and in copies."""

    class Plain(nn.Linear):
        """Of which a change of nn.Linear's forward would be one too."""

    model = gfnode_fast.FourierMD(**constructor(activation=nn.ELU()))
    for layer in (*model.encode_layers, *model.decode_layers):
        layer.node_net.mlp[1] = nn.ELU()
        layer.node_net.mlp[0].__class__ = Plain
    expected = model(**inputs())[0]
    other = copy.deepcopy(model)
    assert torch.equal(other(**inputs())[0], expected)
    change(model.get_submodule(where))
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        model(**inputs())
    if "class Linear" not in message:
        assert torch.equal(other(**inputs())[0], expected)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("decode_layers.0.coord_net", twice, "its class's forward"),
        ("freq_conv.t_conv.ode_func", twice, "its class's forward"),
        ("embedding", twice, "its class's forward"),
        ("embedding", derived, "of class Linear"),
        ("decode_layers.0.coord_net.mlp", put(nn.Tanh()), "the model's activation"),
        ("encode_layers.0.coord_net.mlp", lambda m: m.append(nn.Tanh()), "nothing else"),
        ("", twice, "its class's forward"),
    ],
)
def test_of_somebody_elses_model_classes_alone_are_trusted(
    where: str, change: Callable[[nn.Module], object], message: str
) -> None:
    model = ForeignMD(**constructor())
    change(model.get_submodule(where))
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        gfnode_fast.accelerate(model)
    model = gfnode_fast.accelerate(ForeignMD(**constructor()))
    if where:
        change(model.get_submodule(where))
        with pytest.raises((RuntimeError, TypeError, ValueError), match=f"`model.{where}"):
            model(**inputs())


def test_a_published_model_with_more_to_its_forward_is_refused() -> None:
    class Mine(gfnode_fast.reference.FourierMD):
        def _sample(self, h: Tensor, x: Tensor) -> Any:
            return super()._sample(2 * h, x)

    with pytest.raises(TypeError, match=r"the published _sample, got .*Mine\._sample"):
        gfnode_fast.accelerate(Mine(**constructor()))


def test_graphs_look_when_they_are_traced() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    derived(model.decode_layers[0].node_net.mlp[0])
    torch._dynamo.reset()
    with pytest.raises(Exception, match="`decode_layers.0.node_net.mlp.0` must be of class Linear"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs())
    torch._dynamo.reset()


def test_what_changes_nothing_is_served() -> None:
    """A linear without bias, layers taken away and doubled, a class that adds nothing."""
    torch.manual_seed(0)
    slow = gfnode_fast.reference.FourierMD(**constructor(n_layers=2, mode_interaction="concat"))
    fast = gfnode_fast.FourierMD(**constructor(n_layers=2, mode_interaction="concat"))
    fast.load_state_dict(slow.state_dict())
    for model in (slow, fast):
        model.decode_layers.append(model.decode_layers[0])
        del model.encode_layers[0]
        model.decode_layers[0].coord_net.mlp[0].bias = None
        model.decode_layers[1].node_net.mlp[2].bias = None
        model.freq_conv.t_conv.ode_func.mlp[0].bias = None
        parametrize.register_parametrization(model.freq_conv.t_conv.ode_func, "weights1", Doubled())
    for actual, expected in zip(fast(**inputs())[:3], slow(**inputs())[:3], strict=True):
        assert relative_error(actual, expected) < 1e-5  # measured: 2e-7


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_parameters_put_elsewhere_are_noticed() -> None:
    model = gfnode_fast.accelerate(gfnode_fast.reference.FourierMD(**constructor()))
    linear = model.decode_layers[0].node_net.mlp[0]
    parametrize.register_parametrization(linear, "weight", Doubled())
    with pytest.raises(
        RuntimeError, match=r"`model.decode_layers.0.node_net.mlp.0` must be of class Linear"
    ):
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
