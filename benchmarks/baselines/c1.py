"""C1: the best torch.compile of U1 found.

Encoder, decoder (or their layers), transforms, first step, Runge-Kutta step and evaluation are full
graphs; the host loop over steps and its accept decision stay in Python, because an adaptive loop on
the host cannot be one graph. A bounded masked loop or `while_loop` would be, but the first
multiplies the work by the bound, and the second drops the gradient of the differentiated first
step. torch.compile(U1) as it stands does not compile: inductor cannot lower the `unique` inside
torchdiffeq. On a GPU, CUDA graphs are replayed (what mode "reduce-overhead" turns on); on the CPU
layers are compiled one by one, which compiles in a fifth of the time of whole stacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics
from torchdiffeq._impl.interp import _interp_fit
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from benchmarks.baselines import u1
from gfnode_fast.reference.propagator import ModeODE, Propagator

SAFETY, GROWTH, SHRINK = 0.9, 10.0, 0.2  # torchdiffeq's controller
SMALL_NORM, SMALL_STEP = 1e-5, 1e-6  # torchdiffeq's first step


_COMPILER, _CUDA_GRAPHS = "inductor", True


@contextmanager
def compiler(name: str, *, cuda_graphs: bool = True) -> Iterator[None]:
    """Another way to compile for a while: "eager" only traces; "none" leaves C1's functions as they
    stand, for dry runs.
    """
    global _COMPILER, _CUDA_GRAPHS
    before, (_COMPILER, _CUDA_GRAPHS) = (_COMPILER, _CUDA_GRAPHS), (name, cuda_graphs)
    try:
        yield
    finally:
        _COMPILER, _CUDA_GRAPHS = before


def _options() -> dict[str, Any]:
    return {
        # Without this, inductor (2.13, CPU) fuses the sum over edge gradients with what precedes
        # it: EGNN's gradient in x silently loses the part through distances.
        "score_fusion_memory_threshold": 1 << 40,
        "triton.cudagraphs": _CUDA_GRAPHS and torch.cuda.is_available(),
    }


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """One full graph: of any size on the CPU, of one size and replayed by CUDA graphs on a GPU."""
    if _COMPILER == "none":
        return function
    # One code object serves both propagators and all layers, with and without gradients.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    dynamic = (
        not torch.cuda.is_available()
    )  # C++ takes long to compile and gains nothing from sizes
    options = _options() if _COMPILER == "inductor" else None
    return torch.compile(
        function, fullgraph=True, dynamic=dynamic, backend=_COMPILER, options=options
    )


class CompiledSolverODE(ModeODE):
    """`u1.OwnTimesODE` for Runge-Kutta pairs with FSAL, its arithmetic in three compiled graphs."""

    def __init__(self, ode_func: nn.Module, *, solver: str, rtol: float, atol: float) -> None:
        super().__init__(ode_func, solver=solver, rtol=rtol, atol=atol, no_ode=False)
        pair = SOLVERS[solver]
        if not issubclass(pair, RKAdaptiveStepsizeODESolver):
            raise NotImplementedError(f"C1 has adaptive Runge-Kutta solvers only, got {solver!r}")
        tableau = pair.tableau
        self.order = pair.order
        self.nodes = tableau.alpha.tolist()
        self.weights = [row.tolist() for row in tableau.beta]
        self.error_weights = tableau.c_error.tolist()
        self.mid_weights = pair.mid.tolist()
        if tableau.c_sol[:-1].tolist() != self.weights[-1]:
            raise NotImplementedError(f"C1 has first-same-as-last pairs only, got {solver!r}")
        self._first_step = compile_function(self._first_step_eager)
        self._step = compile_function(self._step_eager)
        self._evaluate = compile_function(_evaluate_eager)

    def forward(self, y0: Tensor, s: Tensor) -> Tensor:
        num_modes, batch, components, channels = y0.shape
        y = y0.reshape(num_modes, batch * components, channels)
        final = s.max().item()
        f, dt = self._first_step(y)
        t = 0 * dt  # zero, with the gradient flag that later times have: one graph for all steps
        starts, ends, coefficients = [], [], []
        now = 0.0
        while now < final:
            t1, y1, f1, error, dt_next, polynomial = self._step(t, dt, y, f)
            if error <= 1:
                starts.append(t)
                ends.append(t1)
                coefficients.append(polynomial)
                t, y, f, now = t1, y1, f1, t1.detach().item()
            dt = dt_next
        return self._evaluate(
            torch.stack(starts), torch.stack(ends), torch.stack(coefficients), y0.shape, s
        )

    def _first_step_eager(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """torchdiffeq's `_select_initial_step` without branches; differentiable as there."""
        zero = torch.zeros((), dtype=torch.float64, device=y.device)
        f = self.ode_func(zero, y)
        scale = self.atol + y.abs() * self.rtol
        d0, d1 = _rms(y / scale), _rms(f / scale)
        small = (d0 < SMALL_NORM) | (d1 < SMALL_NORM)
        h0 = torch.where(small, SMALL_STEP, 0.01 * d0 / torch.where(small, 1.0, d1))
        d2 = _rms((self.ode_func(zero + h0, y + h0 * f) - f) / scale) / h0
        flat = (d1 <= 1e-15) & (d2 <= 1e-15)
        slope = torch.where(flat, 1.0, torch.maximum(d1, d2))
        h1 = torch.where(
            flat, (h0 * 1e-3).clamp(min=SMALL_STEP), (0.01 / slope) ** (1 / self.order)
        )
        return f, torch.minimum(100 * h0, h1).double()

    def _step_eager(self, t: Tensor, dt: Tensor, y: Tensor, f: Tensor) -> tuple[Tensor, ...]:
        t1 = t + dt
        h, start = dt.to(y.real.dtype), t.to(y.real.dtype)
        stages = [f]
        for node, row in zip(self.nodes, self.weights, strict=True):
            s = t1.to(h.dtype) if node == 1 else start + node * h
            z = y + _combine(stages, row, h)
            stages.append(self.ode_func(s, z))
        tolerance = self.atol + self.rtol * torch.maximum(y.abs(), z.abs())
        error = _rms(_combine(stages, self.error_weights, h) / tolerance)
        middle = y + _combine(stages, self.mid_weights, h)
        polynomial = torch.stack(_interp_fit(y, z, middle, f, stages[-1], h))
        ratio = error.detach().double()
        least = torch.where(ratio < 1, 1.0, SHRINK)
        factor = (SAFETY / ratio ** (1 / self.order)).clamp(max=GROWTH).maximum(least)
        factor = torch.where(ratio == 0, GROWTH, factor)
        dt_next = (
            dt.detach() * factor + 0 * dt
        )  # later steps are detached; the flag stays, as above
        return t1, z, stages[-1], error.detach(), dt_next, polynomial


def _rms(x: Tensor) -> Tensor:
    return x.abs().square().mean().sqrt()


def _combine(stages: list[Tensor], weights: list[float], h: Tensor) -> Tensor:
    terms = [stage * (weight * h) for stage, weight in zip(stages, weights, strict=False) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _evaluate_eager(
    start: Tensor, end: Tensor, polynomials: Tensor, shape: torch.Size, s: Tensor
) -> Tensor:
    """Interpolants (S, 5, M, B*D, C) on steps `start`, `end` (S,) at own times s (B, T)."""
    polynomials = polynomials.view(*polynomials.shape[:2], *shape)
    times = s.double()
    step = torch.searchsorted(end.detach(), times)
    molecule = torch.arange(s.shape[0], device=s.device)
    solution = []
    for t in range(s.shape[1]):
        k = step[:, t]
        x = ((times[:, t] - start[k]) / (end[k] - start[k])).to(polynomials.real.dtype)
        solution.append(u1.evaluate(polynomials[k, :, :, molecule], x))
    return torch.stack(solution)


class CompiledPropagator(Propagator):
    """`Propagator` of the graph basis with both transforms compiled."""

    def __init__(self, basis: str | None, num_modes: int, t_conv: ModeODE) -> None:
        if basis != "graph":
            raise NotImplementedError(f"C1 has the graph basis only, got {basis!r}")
        super().__init__(basis, num_modes, t_conv)
        self._project = compile_function(_project_eager)
        self._restore = compile_function(_restore_eager)

    def transform(self, signal: Tensor, eigvecs: Tensor | None) -> Tensor:
        return self._project(eigvecs[:, :, : self.num_modes], signal)

    def transform_back(self, modes: Tensor, num_atoms: int, eigvecs: Tensor | None) -> Tensor:
        return self._restore(eigvecs[:, :, : self.num_modes], modes)


def _project_eager(eigvecs: Tensor, signal: Tensor) -> Tensor:
    return torch.einsum("bnm,bndc->mbdc", eigvecs, signal)


def _restore_eager(eigvecs: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("bnm,tbmdc->tbndc", eigvecs, y)


class FourierMD(u1.FourierMD):
    """U1 in pieces, each a full graph."""

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        if torch.cuda.is_available():
            self._encode = compile_function(self._encode)  # type: ignore[method-assign]
            self._decode = compile_function(self._decode)  # type: ignore[method-assign]
            return
        for layer in (*self.encode_layers, *self.decode_layers):
            layer.forward = compile_function(layer.forward)  # type: ignore[method-assign]

    def _propagator(self, channels: int) -> Propagator:
        propagator = super()._propagator(channels)
        ode = propagator.t_conv
        compiled = CompiledSolverODE(ode.ode_func, solver=ode.solver, rtol=ode.rtol, atol=ode.atol)
        return CompiledPropagator(propagator.basis, propagator.num_modes, compiled)


class CompileLog:
    """Counts what torch.compile did inside a `with` block: seconds, graphs, breaks, recompiles.

    On the CPU graphs are kept from row to row, so that a later row finds most of its graphs
    compiled; on a GPU every row starts afresh.
    """

    def __enter__(self) -> CompileLog:
        if torch.cuda.is_available():
            torch._dynamo.reset()
        counters.clear()
        self._seen = len(get_compilation_metrics())
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        metrics = get_compilation_metrics()[self._seen :]
        self.graphs = int(counters["stats"]["unique_graphs"])
        self.breaks = dict(counters["graph_break"])
        self.recompile_reasons = [m.recompile_reason for m in metrics if m.recompile_reason]

    def info(self) -> dict[str, Any]:
        return {
            "compile_s": round(self.seconds, 2),
            "graphs": self.graphs,
            "graph_breaks": sum(self.breaks.values()),
            "recompiles": len(self.recompile_reasons),
        }
