"""Propagation as one operator that torch's compiler does not look into.

The solves decide on the host: how many steps, which are accepted. Traced, each decision would split
the graph of a model around it; as an operator the whole propagation is one node, and the graph
stays whole. Its gradient is that of the eager propagation, formed by running it again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from gfnode_fast.ops.mode_rhs import parameter_names, parameter_values
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE, ModeRHS, Propagator
from gfnode_fast.solvers.mode import FixedStep, SolverMode

NO_BASIS = "none"
PUBLISHED = "reference"

_ARGUMENTS = (
    "Tensor signal, Tensor times, Tensor? eigvecs, Tensor[] parameters, str basis, "
    "str mode_interaction, str time_mode, int time_width, str solver, float rtol, float atol, "
    "bool no_ode, str solver_mode, float step_size, str backend, str transforms"
)


def propagate_opaque(
    propagator: Propagator,
    signal: Tensor,
    times: Tensor,
    eigvecs: Tensor | None,
    *,
    solver_mode: SolverMode,
    backend: str,
    transforms: str,
) -> Tensor:
    """`propagate` as one node of a compiled graph.

    Args:
        propagator, signal, times, eigvecs: as `propagate` takes them.
        solver_mode: as there.
        backend: "torch", "cpp", or "reference" for the published algorithm.
        transforms: as there; without effect on the published algorithm.

    Returns:
        (T, B, N, D, C), contiguous.

    Raises:
        As `propagate`, when the graph runs; ValueError for times that are not positive and finite.

    Notes:
        Evaluations and steps are not counted. Backward solves again before it pulls back. Once
        differentiable, in signal, eigvecs and parameters.
    """
    ode = propagator.t_conv
    function = ode.ode_func
    interaction, time_mode, time_width = "no_interaction", "none", 0
    if isinstance(function, ModeRHS):
        interaction, time_mode = function.mode_interaction, function.time_mode
        if function.time_embedding is not None:
            time_width = function.time_embedding.width
    fixed = isinstance(solver_mode, FixedStep)
    result: Tensor = torch.ops.gfnode_fast.propagate(
        signal,
        times,
        eigvecs,
        parameter_values(function),
        propagator.basis or NO_BASIS,
        interaction,
        time_mode,
        time_width,
        ode.solver,
        ode.rtol,
        ode.atol,
        ode.no_ode,
        "fixed" if fixed else solver_mode,
        solver_mode.step_size if isinstance(solver_mode, FixedStep) else 0.0,
        backend,
        transforms,
    )
    return result


class _Dynamics(nn.Module):
    """A propagator without values of its own; callers lend it their parameters."""

    def __init__(
        self, propagator: Propagator, solver_mode: SolverMode, backend: str, transforms: str
    ) -> None:
        super().__init__()
        self.propagator = propagator
        self.solver_mode = solver_mode
        self.backend = backend
        self.transforms = transforms
        names = parameter_names(propagator.t_conv.ode_func)
        self.names = [f"propagator.t_conv.ode_func.{name}" for name in names]
        self.lent = threading.Lock()

    def forward(self, signal: Tensor, times: Tensor, eigvecs: Tensor | None) -> Tensor:
        if self.backend == PUBLISHED:
            out: Tensor = self.propagator(signal, times, eigvecs)
            return out
        return propagate(
            self.propagator,
            signal,
            times,
            eigvecs,
            backend=self.backend,
            transforms=self.transforms,
            solver_mode=self.solver_mode,
        )


class _Pullback(nn.Module):
    """Gradients of `_Dynamics` while its parameters are lent."""

    def __init__(self, dynamics: _Dynamics) -> None:
        super().__init__()
        self.dynamics = dynamics

    def forward(
        self,
        grad: Tensor,
        wanted: list[Tensor],
        signal: Tensor,
        times: Tensor,
        eigvecs: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            values = self.dynamics(signal, times, eigvecs)
        return torch.autograd.grad(values, wanted, grad, allow_unused=True)


@lru_cache(maxsize=32)
def _dynamics(
    shape: torch.Size,
    basis: str,
    mode_interaction: str,
    time_mode: str,
    time_width: int,
    solver: str,
    rtol: float,
    atol: float,
    no_ode: bool,
    solver_mode: str,
    step_size: float,
    backend: str,
    transforms: str,
) -> _Dynamics:
    """The propagator that these arguments of the operator describe; `shape` is that of weights1."""
    with torch.device("meta"):
        function: ModeRHS | LinearBasisRHS
        if basis == "linear":
            num_modes = shape[2]
            function = LinearBasisRHS(shape[1], num_modes)
        else:
            num_modes = shape[0]
            function = ModeRHS(shape[2], num_modes, mode_interaction, time_mode, time_width)
        ode = ModeODE(function, solver=solver, rtol=rtol, atol=atol, no_ode=no_ode)
        propagator = Propagator(None if basis == NO_BASIS else basis, num_modes, ode)
    mode: SolverMode = FixedStep(step_size) if solver_mode == "fixed" else solver_mode
    return _Dynamics(propagator, mode, backend, transforms)


def _check_times(times: Tensor) -> None:
    if not ((times > 0) & (times < float("inf"))).all():
        raise ValueError(
            "propagate: `times` must be positive and finite, got a minimum of "
            f"{times.min().item():g}; time 0 is the given state"
        )


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, which the dispatcher runs without it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        yield


@torch.library.custom_op(
    "gfnode_fast::propagate", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
def _propagate(
    signal: Tensor, times: Tensor, eigvecs: Tensor | None, parameters: list[Tensor], *options: Any
) -> Tensor:
    _check_times(times)
    dynamics = _dynamics(parameters[0].shape, *options)
    lent = dict(zip(dynamics.names, parameters, strict=True))
    with dynamics.lent:
        out: Tensor = torch.func.functional_call(dynamics, lent, (signal, times, eigvecs))
    return out.contiguous()


@_propagate.register_fake
def _(
    signal: Tensor, times: Tensor, eigvecs: Tensor | None, parameters: list[Tensor], *options: Any
) -> Tensor:
    return signal.new_empty(times.shape[1], *signal.shape)


@torch.library.custom_op(
    "gfnode_fast::propagate_bwd",
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}, bool wants_eigvecs) -> (Tensor, Tensor, Tensor[])",
)
def _propagate_bwd(
    grad: Tensor,
    signal: Tensor,
    times: Tensor,
    eigvecs: Tensor | None,
    parameters: list[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of signal, eigvecs ((0,) unless wanted) and parameters."""
    *options, wants_eigvecs = options  # type: ignore[assignment]
    dynamics = _dynamics(parameters[0].shape, *options)
    signal = signal.detach().requires_grad_()
    leaves = [p.detach().requires_grad_() for p in parameters]
    wanted = [signal, *leaves]
    if wants_eigvecs:
        assert eigvecs is not None
        eigvecs = eigvecs.detach().requires_grad_()
        wanted.append(eigvecs)
    lent = {f"dynamics.{name}": p for name, p in zip(dynamics.names, leaves, strict=True)}
    with dynamics.lent, _recording():
        grads = torch.func.functional_call(
            _Pullback(dynamics), lent, (grad, wanted, signal, times, eigvecs)
        )
    filled = [
        torch.zeros_like(of) if g is None else g.contiguous()
        for g, of in zip(grads, wanted, strict=True)
    ]
    grad_eigvecs = filled.pop() if wants_eigvecs else signal.new_zeros(0)
    return filled[0], grad_eigvecs, filled[1:]


@_propagate_bwd.register_fake
def _(
    grad: Tensor,
    signal: Tensor,
    times: Tensor,
    eigvecs: Tensor | None,
    parameters: list[Tensor],
    *options: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    wants_eigvecs = options[-1]
    grad_eigvecs = signal.new_empty(
        eigvecs.shape if wants_eigvecs and eigvecs is not None else (0,)
    )
    return (
        signal.new_empty(signal.shape),
        grad_eigvecs,
        [p.new_empty(p.shape) for p in parameters],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    signal, times, eigvecs, parameters, *ctx.options = inputs
    ctx.save_for_backward(signal, times, eigvecs, *parameters)


def _pull(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    signal, times, eigvecs, *parameters = ctx.saved_tensors
    wants_eigvecs = ctx.needs_input_grad[2]
    grad_signal, grad_eigvecs, grads = torch.ops.gfnode_fast.propagate_bwd(
        grad.contiguous(), signal, times, eigvecs, parameters, *ctx.options, wants_eigvecs
    )
    rest = (None,) * len(ctx.options)
    return grad_signal, None, grad_eigvecs if wants_eigvecs else None, grads, *rest


_propagate.register_autograd(_pull, setup_context=_save)
