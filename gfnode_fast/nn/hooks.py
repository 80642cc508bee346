"""Hooks on modules whose parameters are used without calling them, so that the hooks do not run.

Pruning (`torch.nn.utils.prune`) and the old weight and spectral norm are such hooks: without them
the weights are stale.
"""

from __future__ import annotations

from torch import nn

_TABLES = {
    "_forward_pre_hooks": "a forward pre-hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward pre-hook",
    "_backward_hooks": "a backward hook",
}


def refuse_hooks(op: str, root: nn.Module, path: str, remedy: str) -> None:
    """Raise for the first hook on `root`, which messages call `path`, or on a module below it.

    Raises:
        RuntimeError: names module and hook.
    """
    modules = [root]
    for module in modules:  # which grows; a plain loop, because every forward takes it
        held = module.__dict__
        if (
            held["_forward_pre_hooks"]
            or held["_forward_hooks"]
            or held["_backward_pre_hooks"]
            or held["_backward_hooks"]
        ):
            raise RuntimeError(_message(op, root, module, path, remedy))
        if children := held["_modules"]:
            modules.extend(child for child in children.values() if child is not None)


def _message(op: str, root: nn.Module, hooked: nn.Module, path: str, remedy: str) -> str:
    name = next(name for name, module in root.named_modules() if module is hooked)
    where = ".".join(part for part in (path, name) if part)
    table, kind = next((t, kind) for t, kind in _TABLES.items() if getattr(hooked, t))
    hook = next(iter(getattr(hooked, table).values()))
    called = getattr(hook, "__qualname__", type(hook).__qualname__)
    return (
        f"{op}: `{where}` must have no hooks where it is not called, got {kind}, {called}; {remedy}"
    )
