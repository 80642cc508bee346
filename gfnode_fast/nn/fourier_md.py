"""FourierMD, the drop-in: the reference's constructor, parameters and numbers, with a choice of
backend.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from gfnode_fast import reference
from gfnode_fast.nn.graph_layers import apply_layer
from gfnode_fast.ops.compiled_solve import check_compilable
from gfnode_fast.ops.propagate import CHAOTIC_TIME_MODES, check_mode_of, propagate
from gfnode_fast.ops.topology import topology
from gfnode_fast.reference.checks import check_choice, describe, refuse
from gfnode_fast.solvers.mode import SolverMode
from gfnode_fast.solvers.stats import SolveStats

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "compiled", "reference")
PUBLISHED_SIGNATURE = inspect.signature(reference.FourierMD)


class FourierMD(reference.FourierMD):
    """Drop-in for the published `FourierMD`: the same arguments, state_dict, outputs and gradients.

    Args:
        backend: "torch" solves at every molecule's own times, linear in the batch; "compiled" does
            the same in graphs of torch.compile, made at the first use (which can take minutes;
            see `solvers.compiled`); "reference" is the published algorithm with its costs; "auto"
            chooses once, never "compiled", and says why (`backend_reason`, and in the log). A
            request that cannot be served raises. Keyword only, like every argument beyond the
            published ones, which are documented at `gfnode_fast.reference.FourierMD` and may be
            given by position.
        recompute: keep only node states of the graph layers for backward and compute their edge
            quantities again there: slower, with less memory. No effect with backend="reference".
        solver_mode: how steps are chosen (`gfnode_fast.solvers`). "joint", the published solver's
            steps for the whole batch; "per_molecule", adaptive steps of each molecule's own, so
            that an answer does not depend on batch mates; "exact", no solver at all, where modes do
            not interact; `fixed(step_size)`, uniform steps with a fixed-step `solver`. All but
            "joint" need backend "auto" or "torch".

    Attributes:
        last_solve: evaluations and steps of the last forward pass, per propagator; zeros with
            backend="reference".

    Notes:
        But for backend="reference", graph layers take the C++ kernels where these serve (CPU,
        float32, SiLU or Tanh) and PyTorch elsewhere; `gfnode_fast.info()["auto"]` says which.
        Under torch.autocast the graph layers are the reference's, whose linears autocast casts;
        transforms and the solve keep the model's precision.

    Raises:
        TypeError, ValueError: an argument with which the published model crashes, or a
            `solver_mode` that conflicts with the others; the message names it.
    """

    def __init__(
        self,
        *args: Any,
        backend: str = "auto",
        solver_mode: SolverMode = "joint",
        recompute: bool = False,
        **kwargs: Any,
    ) -> None:
        check_choice("backend", backend, BACKENDS)
        super().__init__(*args, **kwargs)
        if not isinstance(recompute, bool):
            refuse(TypeError, "recompute", "a bool", describe(recompute), "pass True or False")
        self.requested_backend = backend
        self.recompute = recompute
        self.backend, self.backend_reason = choose_backend(backend)
        check_mode_of("FourierMD", solver_mode, self.freq_conv.t_conv, self.backend)
        self.solver_mode = solver_mode
        if self.backend == "compiled":
            check_compilable(self.freq_conv.t_conv)
        self.last_solve = {"freq_conv": SolveStats(), "freq_conv_x": SolveStats()}
        if backend == "auto":
            logger.info("FourierMD: backend %s: %s", self.backend, self.backend_reason)

    def _encode(
        self, x: Tensor, v: Tensor, h: Tensor, row: Tensor, col: Tensor, edge_fea: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        # With a rapidly oscillating time embedding the published step control is chaotic
        # (solvers/published.py): a rounding difference in the encoded state changes the steps, and
        # with them the output beyond any tolerance. There the encoder is the reference's, bit for
        # bit; nothing after the solve is amplified.
        chaotic = self.fourier_basis != "linear" and self.time_mode in CHAOTIC_TIME_MODES
        if self._takes_reference_layers(x) or chaotic:
            return super()._encode(x, v, h, row, col, edge_fea)
        return self._run_layers(self.encode_layers, x, v, self.embedding(h), row, col, edge_fea, 1)

    def _decode(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        edge_fea: Tensor,
        num_copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._takes_reference_layers(x):
            return super()._decode(x, v, h, row, col, edge_fea, num_copies)
        return self._run_layers(self.decode_layers, x, v, h, row, col, edge_fea, num_copies)

    def _takes_reference_layers(self, x: Tensor) -> bool:
        return self.backend == "reference" or torch.is_autocast_enabled(x.device.type)

    def _run_layers(
        self,
        layers: nn.ModuleList,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        edge_fea: Tensor,
        num_copies: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        edges = topology(row, col, x.shape[0] // num_copies)
        state = (x, v, h)
        for layer in layers:
            state = apply_layer(layer, state, edges, edge_fea, recompute=self.recompute)
        return state

    def _propagated(
        self, propagator: reference.Propagator, signal: Tensor, s: Tensor, eigvecs: Tensor | None
    ) -> Tensor:
        if self.backend == "reference":
            return super()._propagated(propagator, signal, s, eigvecs)
        stats = self.last_solve["freq_conv" if propagator is self.freq_conv else "freq_conv_x"]
        stats.reset()
        with torch.autocast(signal.device.type, enabled=False):
            return propagate(
                propagator,
                signal.to(self.embedding.weight.dtype),
                s,
                eigvecs,
                stats,
                backend=self.backend,
                solver_mode=self.solver_mode,
            )


def choose_backend(requested: str) -> tuple[str, str]:
    """The backend that will run and the reason."""
    if requested == "auto":
        return "torch", "linear in the batch, with the published solver's steps"
    return requested, "requested"


def _signature_with_extras() -> inspect.Signature:
    extras = [
        parameter
        for parameter in inspect.signature(FourierMD.__init__).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return PUBLISHED_SIGNATURE.replace(
        parameters=[*PUBLISHED_SIGNATURE.parameters.values(), *extras]
    )


FourierMD.__signature__ = _signature_with_extras()  # type: ignore[attr-defined]
