"""What the fast model uses without calling it must be as published: the rest is refused by name.

Of layers and propagators it takes the parameters alone. So hooks on them would not run (pruning
leaves one behind, as do the old weight and spectral norm), nor would a forward put on a module, nor
the one of a class put in the place of the published one, such as an adapter's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, NoReturn

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from gfnode_fast.ops.edge_differences import edge_differences
from gfnode_fast.reference.layers import (
    MLP,
    EdgeMessage,
    EGNNLayer,
    GCNLayer,
    SAGELayer,
    difference,
)
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE, ModeRHS, Propagator

Below = dict[str, "Form | None"]
Form = dict[type[nn.Module], Below]
"""The classes that a module may have, and the forms of each one's children; None is the model's
activation, `EACH` any child. A Sequential has no others, because it would run them.
"""
EACH = "*"

_LINEAR: Form = {nn.Linear: {}}
_MLP: Form = {MLP: {"mlp": {nn.Sequential: {"0": _LINEAR, "1": None, "2": _LINEAR}}}}
_ACTIVE_MLP: Form = {
    MLP: {"mlp": {nn.Sequential: {"0": _LINEAR, "1": None, "2": _LINEAR, "3": None}}}
}
_RELU_MLP: Form = {nn.Sequential: {"0": _LINEAR, "1": {nn.ReLU: {}}, "2": _LINEAR}}
_EGNN: Below = {
    "edge_message_net": {EdgeMessage: {"scalar_net": _ACTIVE_MLP}},
    "coord_net": _MLP,
    "node_v_net": _MLP,
    "node_net": _MLP,
}
_MEAN: Below = {"edge_mlp": _MLP, "node_mlp": _MLP}
_LAYERS: Form = {nn.ModuleList: {EACH: {EGNNLayer: _EGNN, SAGELayer: _MEAN, GCNLayer: _MEAN}}}
_MODES: Below = {
    "attn": {nn.MultiheadAttention: {"out_proj": {NonDynamicallyQuantizableLinear: {}}}},
    "post_attn_linear": _LINEAR,
    "mlp": _RELU_MLP,
    "time_mlp": _RELU_MLP,
}
_PROPAGATOR: Form = {
    Propagator: {"t_conv": {ModeODE: {"ode_func": {ModeRHS: _MODES, LinearBasisRHS: {}}}}}
}
_PARTS: dict[str, Form | None] = {
    "encode_layers": _LAYERS,
    "decode_layers": _LAYERS,
    "freq_conv": _PROPAGATOR,
    "freq_conv_x": _PROPAGATOR,
    "embedding": _LINEAR,
    "fc_mu_h": _LINEAR,
    "fc_logvar_h": _LINEAR,
    "fc_mu_x": _LINEAR,
    "fc_logvar_x": _LINEAR,
    "activation": None,
}
METHODS = frozenset(("forward", "transform", "transform_back", "solve"))
_DIFFERENCES = (difference, edge_differences)
HOOKS = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


class _Problem(NamedTuple):
    error: type[Exception]
    expected: str
    got: str
    path: tuple[str, ...] = ()  # from the innermost module outwards


def refuse_changes(
    op: str,
    model: nn.Module,
    part: str,
    activation: nn.Module,
    remedy: str,
    *,
    prefix: str = "",
    foreign: bool = False,
) -> None:
    """Raise for the first module of `model.part` that is not as published.

    Args:
        op: what the message begins with.
        part: a child of the model. Of one that the published model does not have nothing is
            expected but that nothing was put on it.
        activation: the one of the layers, or of the signals for part "activation".
        remedy: what to do besides undoing it.
        prefix: of the module's name in messages.
        foreign: take any class in place of the package's own, such as the published authors',
            whose forward is trusted.

    Raises:
        RuntimeError: a hook; a method put on a module.
        TypeError: another class, another activation.
        ValueError: a module more or less in a Sequential.

    Notes:
        In graphs of torch.compile this runs when they are traced.
    """
    module = getattr(model, part)
    if part in _PARTS:
        found = _problem(module, _PARTS[part], activation, foreign)
    else:
        below = ((name, _put_on(child)) for name, child in module.named_modules())
        found = next((p._replace(path=(name,) if name else ()) for name, p in below if p), None)
    if found is not None:
        _refuse(op, ".".join((prefix + part, *reversed(found.path))), found, remedy)


# As torch.compiler.assume_constant_result: see ops/graph_layers_cpp.py.
refuse_changes._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse(op: str, where: str, problem: _Problem, remedy: str) -> NoReturn:
    raise problem.error(
        f"{op}: `{where}` must {problem.expected} where it is not called, got {problem.got}; undo "
        f"that, or {remedy}"
    )


def _problem(
    module: nn.Module | None, form: Form | None, activation: nn.Module, foreign: bool
) -> _Problem | None:
    """Of a module or what is below it. A plain recursion, because every forward takes it."""
    below: Below | None = {}
    if form is None:
        if type(module) is not type(activation) or not are_same((module,), activation):
            return _Problem(TypeError, f"be {activation}, the model's activation,", str(module))
    else:
        below = form.get(type(module))  # type: ignore[arg-type]  # None has no form either
        if below is None:
            below = _below_of_another(type(module), form, foreign)
        if below is None:
            expected = " or ".join(kind.__name__ for kind in form)
            return _Problem(TypeError, f"be of class {expected}", type(module).__name__)
    assert module is not None
    if problem := _put_on(module):
        return problem
    if not below:
        return None
    children = module.__dict__["_modules"]
    if EACH in below:
        below = dict.fromkeys(children, below[EACH])
    elif isinstance(module, nn.Sequential) and list(children) != list(below):
        expected, got = ", ".join(below), ", ".join(children)
        return _Problem(ValueError, f"hold {expected} and nothing else", got)
    for name, child_form in below.items():
        if name not in children:  # its class's forward misses it, or does without
            continue
        if problem := _problem(children[name], child_form, activation, foreign):
            return problem._replace(path=(*problem.path, name))
    return None


def _below_of_another(kind: type, form: Form, foreign: bool) -> Below | None:
    """The children of a class that the form does not name, or None where it is not accepted."""
    for known, below in form.items():
        if issubclass(kind, known):  # one that changes nothing, as a parametrisation makes
            same = all(getattr(kind, m, None) is getattr(known, m, None) for m in METHODS)
            return below if same else None
    ours = all(known.__module__.startswith("gfnode_fast.") for known in form)
    if foreign and ours and issubclass(kind, nn.Module):
        return {name: found for below in form.values() for name, found in below.items()}
    return None


def _put_on(module: nn.Module) -> _Problem | None:
    held = module.__dict__
    if (
        held["_forward_pre_hooks"]
        or held["_forward_hooks"]
        or held["_backward_pre_hooks"]
        or held["_backward_hooks"]
    ):
        table, kind = next((table, kind) for table, kind in HOOKS.items() if held[table])
        hook = next(iter(held[table].values()))
        return _Problem(RuntimeError, "have no hooks", f"{kind}, {_name_of(hook)}")
    if not held.keys().isdisjoint(METHODS):
        name = next(name for name in sorted(METHODS) if name in held)
        got = f"{_name_of(held[name])} put on the module"
        return _Problem(RuntimeError, f"have its class's {name}", got)
    if "difference" in held and held["difference"] not in _DIFFERENCES:
        got = _name_of(held["difference"])
        return _Problem(RuntimeError, "have the published difference", got)
    return None


def _name_of(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__qualname__))


def are_same(modules: Iterable[nn.Module], activation: nn.Module) -> bool:
    """Whether each of these of its class stands for the activation, now and after training."""
    others = [module for module in modules if module is not activation]
    return not others or (
        not any(activation.state_dict(keep_vars=True))
        and all(_has_attributes_of(activation, other) for other in others)
    )


def _has_attributes_of(activation: nn.Module, other: nn.Module) -> bool:
    mine, its = vars(activation), vars(other)
    return mine.keys() == its.keys() and all(
        name == "training" or value is its[name] or _is_equal(value, its[name])
        for name, value in mine.items()
    )


def _is_equal(a: object, b: object) -> bool:
    return not isinstance(a, Tensor) and bool(a == b)
