"""Which backend serves each part of the model, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gfnode_fast.ops.compiled_solve import check_compilable
from gfnode_fast.ops.dispatch import choose_automatically, why_no_triton
from gfnode_fast.ops.graph_layers import PRECISIONS
from gfnode_fast.ops.graph_layers_cpp import ACTIVATIONS, why_not_compiled
from gfnode_fast.ops.propagate import CHAOTIC_TIME_MODES
from gfnode_fast.reference.checks import check_choice, refuse
from gfnode_fast.reference.propagator import ModeODE
from gfnode_fast.solvers.mode import FixedStep, SolverMode
from gfnode_fast.solvers.tableau import TABLEAUS

BACKENDS = ("auto", "torch", "cpp", "triton", "compiled", "reference")
ENVIRONMENT_VARIABLE = "GFNODE_BACKEND"

ENCODER, DECODER = "encoder layers", "decoder layers"
TRANSFORM, INVERSE = "graph Fourier transform", "inverse transform"
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
        parts: encoder and decoder layers, the graph Fourier transform and its inverse, the solves
            of features and coordinates.
    """

    requested: Part
    precision: str
    device: str
    dtype: str
    parts: Mapping[str, Part]

    def __str__(self) -> str:
        asked = f"backend {self.requested.backend} ({self.requested.reason})"
        width = max(map(len, self.parts))
        rows = (f"  {name:{width}}  {p.backend}: {p.reason}" for name, p in self.parts.items())
        return "\n".join((f"{asked}, {self.precision}, {self.dtype} on {self.device}", *rows))


@dataclass(frozen=True)
class Request:
    """What of a model decides its backends, besides device, dtype and autocast."""

    backend: Part
    precision: str
    solver_mode: SolverMode
    activation: nn.Module
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
        argument = "backend" if backend == "triton" else "precision"
        got = repr(backend if backend == "triton" else precision)
        if problem := _why_triton_nowhere():
            refuse(RuntimeError, argument, "one that is here", got, problem)


def _check_cpp(request: Request) -> None:
    if problem := why_not_compiled():
        refuse(RuntimeError, "backend", "one that is here", "'cpp'", problem)
    if type(request.activation) not in ACTIVATIONS:
        refuse(
            TypeError,
            "activation",
            "nn.SiLU or nn.Tanh with backend='cpp'",
            type(request.activation).__name__,
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
        encoder = Part("reference", "the published steps of posenc and rope follow its rounding")
    solves = {name: _solve(request, ode, device) for name, ode in request.solves.items()}
    transform = _transform(request, solves, device)
    return {
        ENCODER: encoder,
        TRANSFORM: transform,
        **solves,
        INVERSE: transform,
        DECODER: layers,
    }


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
        return Part(*choose_automatically(device))
    problem = _why_not_cpp(request.activation, device, dtype)
    if problem is None:
        return Part("cpp", "measured fastest on the CPU in float32 with SiLU or Tanh")
    return Part("torch", f"no C++ kernel: {problem}")


def _why_not_cpp(activation: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype != torch.float32:
        return f"the tensors are {dtype}"
    if type(activation) not in ACTIVATIONS:
        return f"the activation is {type(activation).__name__}"
    return why_not_compiled()


def _solve(request: Request, ode: ModeODE | None, device: torch.device) -> Part:
    backend = request.backend
    if ode is None:
        return Part("none", "not propagated")
    if backend.backend in ("triton", "compiled", "reference"):
        return backend
    if ode.no_ode:
        return Part("torch", "one application of the right-hand side")
    if ode.solver not in TABLEAUS:
        return Part("torch", f"{ode.solver} is torchdiffeq's, on the union of all times")
    if request.solver_mode == "exact":
        return Part("torch", "matrix exponentials at each molecule's times")
    if isinstance(request.solver_mode, FixedStep):
        return Part("torch", f"uniform steps of {request.solver_mode.step_size:g}")
    return Part("torch", "linear in the batch; backend='compiled' takes minutes to compile")


def _transform(request: Request, solves: Mapping[str, Part], device: torch.device) -> Part:
    if request.basis is None:
        return Part("none", "no_fourier=True")
    taken = [part for part in solves.values() if part.backend != "none"]
    if not taken:
        return Part("none", "nothing is propagated")
    return Part("torch", "goes with the solve") if taken[0].backend == "compiled" else taken[0]
