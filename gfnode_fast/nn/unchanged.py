"""`refuse_changes` at every forward, for less than half the time where nothing has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gfnode_fast.nn.uncalled import METHODS, are_same, refuse_changes


class Snapshot:
    """All that `refuse_changes` looks at, of a module and all below it, and the activation."""

    def __init__(self, root: nn.Module, activation: nn.Module) -> None:
        self.root, self.activation = root, activation
        modules = list(root.modules())
        self.modules = [
            (m, type(m), len(vars(m)), dict(m._modules), list(m._modules)) for m in modules
        ]
        self.methods = {
            (kind, name): getattr(kind, name)
            for kind in map(type, modules)
            for name in METHODS
            if hasattr(kind, name)
        }
        self.others = [
            (m, name)
            for m in modules
            for name in METHODS
            if name != "forward" and (type(m), name) in self.methods
        ]
        self.differences = [(m, vars(m)["difference"]) for m in modules if "difference" in vars(m)]
        self.alike = [m for m in modules if type(m) is type(activation)]

    def is_current(self, root: nn.Module, activation: nn.Module) -> bool:
        """Whether it is the same module, with nothing put on or in the place of any since."""
        if root is not self.root or type(activation) is not type(self.activation):
            return False
        for module, kind, size, children, names in self.modules:  # every forward takes this loop
            held = module.__dict__
            if (
                held["_forward_pre_hooks"]
                or held["_forward_hooks"]
                or held["_backward_pre_hooks"]
                or held["_backward_hooks"]
                or "forward" in held
                or type(module) is not kind
                or len(held) != size
            ):
                return False
            if children and (held["_modules"] != children or [*held["_modules"]] != names):
                return False
        return (
            all(getattr(kind, name) is m for (kind, name), m in self.methods.items())
            and not any(name in vars(module) for module, name in self.others)
            and all(vars(module).get("difference") is d for module, d in self.differences)
            and are_same(self.alike, activation)
        )


class Unchanged:
    """What a model's parts were when `refuse_changes` accepted them last."""

    def __init__(self) -> None:
        self._parts: dict[str, Snapshot] = {}

    def refuse_changes(
        self,
        op: str,
        model: nn.Module,
        part: str,
        activation: nn.Module,
        remedy: str,
        **options: Any,
    ) -> None:
        """Call `refuse_changes`, unless the part is as it was when that last accepted it."""
        if torch.compiler.is_compiling():
            refuse_changes(op, model, part, activation, remedy, **options)
            return
        root = getattr(model, part)
        seen = self._parts.get(part)
        if seen is None or not seen.is_current(root, activation):
            refuse_changes(op, model, part, activation, remedy, **options)
            self._parts[part] = Snapshot(root, activation)

    def __reduce__(self) -> tuple[type[Unchanged], tuple[()]]:
        return Unchanged, ()  # a copy or a pickle is of no modules
