"""Which backend serves each part of the model, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gfnode_fast.ops import graph_layers_triton, synthesis
from gfnode_fast.ops.compiled_solve import check_compilable
from gfnode_fast.ops.cpp_solve import why_no_cpp_solve
from gfnode_fast.ops.dispatch import choose_backend, why_no_triton
from gfnode_fast.ops.graph_fourier_registered import too_many_modes
from gfnode_fast.ops.graph_layers import PRECISIONS
from gfnode_fast.ops.graph_layers_cpp import ACTIVATIONS, why_not_compiled
from gfnode_fast.ops.mode_rhs_registered import unserved_by_triton
from gfnode_fast.ops.propagate import CHAOTIC_TIME_MODES
from gfnode_fast.ops.triton_solve import check_triton_solve, why_no_triton_solve
from gfnode_fast.reference.checks import check_choice, refuse
from gfnode_fast.reference.propagator import ModeODE
from gfnode_fast.solvers.mode import FixedStep, SolverMode
from gfnode_fast.solvers.tableau import TABLEAUS

BACKENDS = ("auto", "torch", "cpp", "triton", "compiled", "reference")
ENVIRONMENT_VARIABLE = "GFNODE_BACKEND"

ENCODER, DECODER = "encoder layers", "decoder layers"
TRANSFORM, INVERSE = "graph Fourier transform", "inverse transform"
CHAOTIC = "the published steps of posenc and rope follow its rounding"
FEATURES, COORDINATES = "solve of features", "solve of coordinates"


@dataclass(frozen=True)
class Part:
    """What runs in one part of the model: a backend, or "none" where nothing does, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class BackendReport:
    """What runs in each part of a model.

    Attributes:
        requested: the backend asked for, and how it was.
        precision: of the graph layers' matrix products.
        device, dtype: of the parameters, which the choice depends on.
        recompute: whether backward computes edge intermediates again; None where they exceed a
            budget (see `FourierMD`).
        parts: encoder and decoder layers, the graph Fourier transform and its inverse, the solves
            of features and coordinates.
    """

    requested: Part
    precision: str
    device: str
    dtype: str
    recompute: bool | None
    parts: Mapping[str, Part]

    def __str__(self) -> str:
        asked = f"backend {self.requested.backend} ({self.requested.reason})"
        width = max(map(len, self.parts))
        rows = (f"  {name:{width}}  {p.backend}: {p.reason}" for name, p in self.parts.items())
        again = {None: "beyond a budget", True: "always", False: "never"}[self.recompute]
        where = f"{self.precision}, {self.dtype} on {self.device}"
        return "\n".join((f"{asked}, {where}, edges computed again in backward: {again}", *rows))


@dataclass(frozen=True)
class Request:
    """What of a model decides its backends, besides device, dtype and autocast."""

    backend: Part
    precision: str
    solver_mode: SolverMode
    layer_activation: nn.Module
    signal_activation: nn.Module
    basis: str | None
    solves: Mapping[str, ModeODE | None]

    @property
    def follows_chaotic_steps(self) -> bool:
        """Whether a rounding difference in the encoded state would change the steps taken, and with
        them the output beyond any tolerance (solvers/published.py).
        """
        adaptive = self.solver_mode in ("joint", "per_molecule")
        odes = [ode for ode in self.solves.values() if ode is not None]
        return (
            adaptive
            and self.basis != "linear"
            and any(ode.ode_func.time_mode in CHAOTIC_TIME_MODES for ode in odes)
        )


def requested_backend(backend: object) -> Part:
    """The backend that an argument asks for; None and "auto" leave it to GFNODE_BACKEND.

    Raises:
        TypeError, ValueError: not one of `BACKENDS`, in the argument or in the environment.
    """
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
        assert isinstance(backend, str)
        if backend != "auto":
            return Part(backend, "requested")
    from_environment = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if not from_environment:
        return Part("auto", "per part what measured best")
    if from_environment not in BACKENDS:
        refuse(
            ValueError,
            ENVIRONMENT_VARIABLE,
            f"one of {list(BACKENDS)}",
            repr(from_environment),
            "correct or unset the environment variable",
        )
    return Part(from_environment, f"{ENVIRONMENT_VARIABLE} in the environment")


def check_request(request: Request) -> None:
    """Refuse what no device could serve; what depends on the device is refused at the first use.

    Raises:
        TypeError, ValueError: an activation, solver or precision without a kernel.
        RuntimeError: a backend that is not there.
    """
    backend, precision = request.backend.backend, request.precision
    check_choice("precision", precision, PRECISIONS)
    if precision != "fp32" and backend not in ("auto", "triton"):
        refuse(
            ValueError,
            "precision",
            f"'fp32' with backend={backend!r}",
            repr(precision),
            "only the Triton kernels have others: use backend='triton'",
        )
    if backend == "cpp":
        _check_cpp(request)
    elif backend == "compiled":
        for ode in request.solves.values():
            if ode is not None:
                check_compilable(ode)
    elif backend == "triton" or precision != "fp32":
        for ode in request.solves.values():
            if ode is not None and backend == "triton":
                check_triton_solve(ode, request.solver_mode)
        argument = "backend" if backend == "triton" else "precision"
        got = repr(backend if backend == "triton" else precision)
        if type(request.layer_activation) not in graph_layers_triton.ACTIVATIONS:
            refuse(
                TypeError,
                "activation",
                "nn.SiLU or nn.Tanh with the Triton graph layers",
                type(request.layer_activation).__name__,
                "use backend='torch' or 'auto' and precision='fp32'",
            )
        if problem := _why_triton_nowhere():
            refuse(RuntimeError, argument, "one that is here", got, problem)


def _check_cpp(request: Request) -> None:
    if problem := why_not_compiled():
        refuse(RuntimeError, "backend", "one that is here", "'cpp'", problem)
    if type(request.layer_activation) not in ACTIVATIONS:
        refuse(
            TypeError,
            "activation",
            "nn.SiLU or nn.Tanh with backend='cpp'",
            type(request.layer_activation).__name__,
            "use backend='torch' or 'auto'",
        )
    if request.follows_chaotic_steps:
        refuse(
            ValueError,
            "backend",
            "'auto', 'torch' or 'reference' with time_mode='posenc' or 'rope'",
            "'cpp'",
            "their steps follow the published numbers only behind the reference's encoder",
        )


def _why_triton_nowhere() -> str | None:
    """Why Triton can serve on no device of this machine, or None."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if importlib.util.find_spec("triton") is None:
        return "install triton"
    return None if why_no_triton(device) is None else "it needs a GPU, and torch sees none"


def choose_parts(
    request: Request, device: torch.device, dtype: torch.dtype, autocast: bool
) -> dict[str, Part]:
    """What runs in each part on this device."""
    layers = _layers(request, device, dtype, autocast)
    encoder = layers
    if request.follows_chaotic_steps and layers.backend != "reference":
        encoder = Part("reference", CHAOTIC)
    solves = {name: _solve(request, ode, device, dtype) for name, ode in request.solves.items()}
    transform, inverse = _transforms(request, device, dtype)
    return {ENCODER: encoder, TRANSFORM: transform, **solves, INVERSE: inverse, DECODER: layers}


def _layers(request: Request, device: torch.device, dtype: torch.dtype, autocast: bool) -> Part:
    backend = request.backend
    if backend.backend in ("cpp", "triton", "reference"):
        return backend
    if request.precision != "fp32":
        return Part("triton", f"the only one with precision={request.precision!r}")
    if autocast:
        return Part("reference", "torch.autocast casts its linears")
    if backend.backend == "torch":
        return backend
    if device.type == "cuda":
        unserved = _why_not_triton(request.layer_activation, dtype)
        return Part(*choose_backend("GF-NODE", "auto", device, unserved=unserved))
    problem = _why_not_cpp(request.layer_activation, device, dtype)
    if problem is None:
        return Part("cpp", "measured fastest on the CPU in float32 with SiLU or Tanh")
    return Part("torch", f"no C++ kernel: {problem}")


def _why_not_triton(activation: nn.Module, dtype: torch.dtype) -> str | None:
    """What of a model's layers the Triton kernels do not serve, or None."""
    if type(activation) not in graph_layers_triton.ACTIVATIONS:
        return f"no Triton kernel: the activation is {type(activation).__name__}"
    if dtype not in (torch.float32, torch.float64):
        return f"no Triton kernel: the parameters are {dtype}"
    return None


def _why_not_cpp(activation: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype != torch.float32:
        return f"the tensors are {dtype}"
    if type(activation) not in ACTIVATIONS:
        return f"the activation is {type(activation).__name__}"
    return why_not_compiled()


def _solve(request: Request, ode: ModeODE | None, device: torch.device, dtype: torch.dtype) -> Part:
    backend = request.backend
    if ode is None:
        return Part("none", "not propagated")
    if backend.backend in ("triton", "compiled", "reference"):
        return backend
    why = ""
    if backend.backend in ("auto", "cpp") and device.type == "cpu":
        problem = why_no_cpp_solve(ode, request.solver_mode, device, dtype)
        if problem is None:
            return Part("cpp", _solver_of(request, ode))
        why = f"; no C++ kernel: {problem}"
    if backend.backend == "auto" and device.type == "cuda":
        unserved = why_no_triton_solve(ode, request.solver_mode)
        unserved = unserved or unserved_by_triton(dtype, ode.ode_func.weights1.shape[2])
        if request.basis == "graph":  # whose transforms the solve takes along
            unserved = unserved or too_many_modes(ode.ode_func.weights1.shape[0])
        chosen, reason = choose_backend("GF-NODE", "auto", device, unserved=unserved)
        if chosen == "triton":
            return Part(chosen, reason)
        why = f"; no Triton: {reason}"
    return Part("torch", f"{_solver_of(request, ode)}{why}")


def _solver_of(request: Request, ode: ModeODE) -> str:
    if ode.no_ode:
        return "one application of the right-hand side"
    if ode.solver not in TABLEAUS:
        return f"{ode.solver} is torchdiffeq's, on the union of all times"
    if request.solver_mode == "exact":
        return "matrix exponentials at each molecule's times"
    if isinstance(request.solver_mode, FixedStep):
        return f"uniform steps of {request.solver_mode.step_size:g}"
    return "linear in the batch; backend='compiled' takes minutes to compile"


def _transforms(request: Request, device: torch.device, dtype: torch.dtype) -> tuple[Part, Part]:
    """The graph Fourier transform and its inverse."""
    backend = request.backend
    if request.basis is None:
        return (Part("none", "no_fourier=True"),) * 2
    if all(ode is None for ode in request.solves.values()):
        return (Part("none", "nothing is propagated"),) * 2
    if backend.backend == "reference":
        return backend, backend
    if request.basis == "linear":
        return (Part("torch", "torch.fft"),) * 2
    if backend.backend in ("torch", "triton"):
        return backend, backend
    ode = next(ode for ode in request.solves.values() if ode is not None)
    unserved = too_many_modes(ode.ode_func.weights1.shape[0])
    forward = inverse = Part(*choose_backend("GF-NODE", "auto", device, unserved=unserved))
    if request.follows_chaotic_steps:
        forward = Part("reference", CHAOTIC)
    if device.type == "cpu":
        problem = _why_not_cpp(request.signal_activation, device, dtype)
        problem = problem or synthesis.why_not_compiled()
        inverse = Part("torch", f"no C++ kernel: {problem}")
        if problem is None:
            inverse = Part("cpp", "one pass with activation and signal; without a gradient of U")
    return forward, inverse
