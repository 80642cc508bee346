"""An existing model made fast in place, sharing its parameters, and made slow again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gfnode_fast.nn.arguments import arguments_of
from gfnode_fast.nn.backends import BackendReport
from gfnode_fast.nn.fourier_md import FourierMD
from gfnode_fast.nn.unchanged import Unchanged
from gfnode_fast.reference.model import FourierMD as PublishedFourierMD
from gfnode_fast.solvers.mode import SolverMode
from gfnode_fast.solvers.stats import SolveStats

# What shapes do not tell, hence must be attributes of the model, or given.
UNTOLD = (
    "activation",
    "delta_frame",
    "fourier_basis",
    "no_ode",
    "norm",
    "num_atoms",
    "num_timesteps",
    "propagate_h",
    "propagate_x",
    "rtol",
    "atol",
    "solver",
)
CHANGEABLE = ("num_atoms", "num_timesteps", "delta_frame")  # which training code sets later


class _Lent(FourierMD):
    """With the parameters of a model whose own modules `AcceleratedForward` looks at."""

    def _refuse_changes(self, *parts: str) -> None:
        pass


class AcceleratedForward:
    """`forward` of an accelerated model: our arithmetic on its parameters.

    Attributes:
        fast: the `FourierMD` that computes; its parameters are the model's own.
    """

    def __init__(self, model: nn.Module, fast: FourierMD) -> None:
        self.model = model
        self.fast = fast
        self.fixed = {
            name: getattr(model, name)
            for name in UNTOLD
            if name not in CHANGEABLE and hasattr(model, name)
        }
        self.tables = [
            (path, module, type(module), dict(module._modules), list(module._parameters))
            for path, module in model.named_modules()
        ]
        self._unchanged = Unchanged()

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._check_tables()
        self.refuse_changes()
        for name, fixed in self.fixed.items():
            value = getattr(self.model, name, None)
            if value is not fixed and value != fixed:
                raise RuntimeError(
                    f"accelerate: `model.{name}` must be {fixed}, as when it was accelerated, got "
                    f"{value}; call restore(model), then accelerate(model) again"
                )
        for name in CHANGEABLE:
            if name == "num_timesteps" and torch.compiler.is_compiling():
                continue  # a graph takes any
            value = getattr(self.model, name, None)
            if value is not None:
                setattr(self.fast, name, value)
        if self.fast.training != self.model.training:
            self.fast.train(self.model.training)
        outputs: tuple[Tensor, Tensor, Tensor, Tensor] = self.fast(*args, **kwargs)
        return outputs

    def refuse_changes(self) -> None:
        """Raise for what the model's own forward would run and ours would not."""
        of_layers = self.fast.layer_activation
        for part, child in self.model._modules.items():
            if child is not None:
                activation = self.fast.activation if part == "activation" else of_layers
                self._unchanged.refuse_changes(
                    "accelerate",
                    self.model,
                    part,
                    activation,
                    "call restore(model)",
                    prefix="model.",
                    foreign=True,
                )

    def _check_tables(self) -> None:
        again = "as when it was accelerated"
        remedy = "call restore(model), then accelerate(model) again"
        is_traced = torch.compiler.is_compiling()  # a graph guards all it looks at, hence children
        for path, module, kind, children, parameters in self.tables:
            if not is_traced and (
                type(module) is kind
                and module._modules == children
                and [*module._parameters] == parameters
            ):
                continue
            where = f"model.{path}" if path else "model"
            for name, child in children.items():
                if module._modules.get(name) is not child:
                    raise RuntimeError(
                        f"accelerate: `{where}.{name}` must be the module that was accelerated, "
                        f"got another; {remedy}"
                    )
            if is_traced:
                continue
            if type(module) is not kind:
                raise RuntimeError(
                    f"accelerate: `{where}` must be of class {kind.__name__}, {again}, got "
                    f"{type(module).__name__}; {remedy}"
                )
            found = sorted({*module._modules, *module._parameters})
            raise RuntimeError(
                f"accelerate: `{where}` must hold {sorted({*children, *parameters})}, {again}, got "
                f"{found}; {remedy}"
            )

    def backend_report(self) -> BackendReport:
        """What runs in each part, and why."""
        return self.fast.backend_report()

    @property
    def last_solve(self) -> dict[str, SolveStats]:
        """Evaluations and steps of the last forward pass, per propagator."""
        return self.fast.last_solve


def accelerate(
    model: nn.Module,
    *,
    backend: str | None = "auto",
    precision: str = "fp32",
    solver_mode: SolverMode = "joint",
    recompute: bool | None = None,
    max_attempts: int | None = None,
    **arguments: Any,
) -> nn.Module:
    """Give an existing model of the published kind the forward of `gfnode_fast.FourierMD`.

    Args:
        model: `gfnode_fast.reference.FourierMD`, or any module with the published state_dict,
            such as an instance of the authors' class. Not a wrapper around one (DDP,
            torch.compile): accelerate first, then wrap.
        backend, precision, solver_mode, recompute, max_attempts: as `gfnode_fast.FourierMD` takes
            them.
        arguments: published constructor arguments that neither shapes nor attributes of the model
            tell. Read from attributes of the same name, unless given: activation, delta_frame,
            fourier_basis (None where nothing is transformed), no_ode, norm, num_atoms,
            num_timesteps, propagate_h, propagate_x, rtol, atol, solver; time_mode where it is
            "concat", "posenc" or "rope".

    Returns:
        The model itself. It keeps its class, modules, parameters, state_dict, hooks, optimizers;
        it can be wrapped, copied, pickled, moved, and put in train or eval mode as before. Its
        `forward` is an `AcceleratedForward`, with `backend_report()` and `last_solve`.

    Raises:
        TypeError: not a module, one of ours that is fast already, or with another class or
            activation where the published model has one of torch's, or of this package's where it
            is the package's model.
        ValueError: accelerated already; names what is missing of the published attributes and
            state_dict; arguments that `FourierMD` refuses.
        RuntimeError: a backend that is not there; a hook on a submodule, such as pruning leaves
            behind, or a forward put on the model or a submodule, which would not run; in `forward`
            also a submodule or parameter replaced, added or taken away, or one of those attributes
            changed, since.

    Notes:
        Hooks on the model run. The forward that a class of somebody else's has is taken to be the
        published one. num_atoms, num_timesteps and delta_frame are read at every call and
        may change. Other attributes of the model may not, which is noticed, nor those of its
        submodules, which is not. Graphs of torch.compile look at classes and hooks when traced.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"accelerate: `model` must be an nn.Module, got {type(model).__name__}; pass the model"
        )
    if isinstance(model, FourierMD):
        raise TypeError(
            "accelerate: `model` must be a published model, got gfnode_fast.FourierMD; it is fast "
            "already, choose its backend at construction"
        )
    if isinstance(model.__dict__.get("forward"), AcceleratedForward):
        raise ValueError(
            "accelerate: `model` must not be accelerated, got one that is; call restore(model) "
            "first"
        )
    _check_forward(model)
    published = _published_arguments(model, arguments)
    with torch.random.fork_rng(devices=()), torch.device("meta"):  # no numbers drawn, no memory
        fast = _Lent(
            **published,
            device="meta",
            backend=backend,
            precision=precision,
            solver_mode=solver_mode,
            recompute=recompute,
            max_attempts=max_attempts,
        )
    _check_state(model, fast)
    for name, module in fast.named_modules():
        if module._parameters:
            # The table itself, so that whatever is later put into the model is in both.
            module._parameters = _table_of(model, name, module)
    forward = AcceleratedForward(model, fast)
    forward.refuse_changes()
    fast.backend_report()
    model.forward = forward
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate`: the model computes with its own forward again.

    Args:
        model: one that was accelerated.

    Returns:
        The model itself.

    Raises:
        ValueError: it is not accelerated.
    """
    forward = getattr(model, "__dict__", {}).get("forward")
    if not isinstance(forward, AcceleratedForward):
        raise ValueError(
            "restore: `model` must be accelerated, got one that is not; pass what accelerate "
            "returned"
        )
    del model.forward
    return model


def _check_forward(model: nn.Module) -> None:
    """Refuse one whose own forward would be lost, if that can be told."""
    if "forward" in vars(model):
        got = getattr(model.forward, "__qualname__", type(model.forward).__qualname__)
        raise RuntimeError(
            f"accelerate: `model` must have its class's forward, got {got} put on it; undo that, "
            "and wrap or compile the model after accelerate"
        )
    if isinstance(model, PublishedFourierMD):
        for name, method in vars(PublishedFourierMD).items():
            if callable(method) and name != "__init__" and getattr(type(model), name) is not method:
                raise TypeError(
                    f"accelerate: `model` must have the published {name}, got "
                    f"{type(model).__qualname__}.{name}; subclass gfnode_fast.FourierMD instead"
                )


def _published_arguments(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    right_hand_side = dict(model.named_modules()).get("freq_conv.t_conv.ode_func")
    time_mode = given.get("time_mode", getattr(model, "time_mode", None))
    if time_mode is None:
        time_mode = getattr(right_hand_side, "time_mode", None)
    try:
        arguments = arguments_of("accelerate", model.state_dict(), time_mode=time_mode)
    except LookupError as error:
        raise ValueError(
            f"accelerate: `model` must have the published state_dict, got one without a usable "
            f"{error}; pass a FourierMD, not a wrapper around one"
        ) from error
    linear = arguments["fourier_basis"] == "linear"
    known: dict[str, Any] = {"with_v": True}
    if linear:
        known["fourier_basis"] = "linear"
    if arguments["gnn_ablation_mode"] != "egnn":
        known["norm"] = False  # which concerns distances, formed by EGNN alone
    missing = []
    for name in UNTOLD:
        if name in given:
            known[name] = given[name]
        elif hasattr(model, name):
            known[name] = getattr(model, name)
        elif name not in known:
            missing.append(name)
    if missing:
        raise ValueError(
            f"accelerate: `model` must have the attributes {', '.join(missing)}, got "
            f"{type(model).__name__} without; pass them by keyword"
        )
    unknown = sorted(set(given) - {*UNTOLD, "time_mode"})
    if unknown:
        raise ValueError(
            f"accelerate: `{unknown[0]}` must be one of {', '.join(UNTOLD)} or time_mode, got an "
            "unknown argument or one that the shapes tell; leave it out"
        )
    known["no_fourier"] = known["fourier_basis"] is None
    return arguments | known


def _check_state(model: nn.Module, fast: FourierMD) -> None:
    """The same names and shapes, as load_state_dict(strict=True) asks for, and layers."""
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ours = {name: tuple(value.shape) for name, value in fast.state_dict().items()}
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise ValueError(
                f"accelerate: `model` must have {name} of shape {ours.get(name, 'none')}, got "
                f"{theirs.get(name, 'none')}; pass a module with the published state_dict"
            )
    for part in ("encode_layers", "decode_layers"):  # in which one may have no parameters
        found, expected = (list(getattr(m, part)._modules) for m in (model, fast))
        if found != expected:
            raise ValueError(
                f"accelerate: `model.{part}` must hold the layers {expected} alone, got {found}; "
                "take the others away"
            )


def _table_of(model: nn.Module, name: str, like: nn.Module) -> dict[str, nn.Parameter | None]:
    module = model.get_submodule(name)
    table = module._parameters
    if missing := sorted(set(like._parameters) - set(table)):
        raise ValueError(
            f"accelerate: `model.{name}` must hold {missing[0]}, got "
            f"{type(module).__name__} without; remove parametrizations first"
        )
    return table
