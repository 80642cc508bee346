"""FourierMD, the drop-in: the reference's constructor, parameters and numbers, with a choice of
backend.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import Tensor

from gfnode_fast import reference
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.checks import check_choice
from gfnode_fast.solvers.stats import SolveStats

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "reference")
PUBLISHED_SIGNATURE = inspect.signature(reference.FourierMD)


class FourierMD(reference.FourierMD):
    """Drop-in for the published `FourierMD`: the same arguments, state_dict, outputs and gradients.

    Args:
        backend: "torch" solves at every molecule's own times, linear in the batch; "reference" is
            the published algorithm with its costs; "auto" chooses once and says why
            (`backend_reason`, and in the log). A request that cannot be served raises. Keyword
            only, like every argument beyond the published ones, which are documented at
            `gfnode_fast.reference.FourierMD` and may be given by position.

    Attributes:
        last_solve: evaluations and steps of the last forward pass, per propagator; zeros with
            backend="reference".

    Raises:
        TypeError, ValueError: an argument with which the published model crashes; the message
            names it.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_choice("backend", backend, BACKENDS)
        super().__init__(*args, **kwargs)
        self.requested_backend = backend
        self.backend, self.backend_reason = choose_backend(backend)
        self.last_solve = {"freq_conv": SolveStats(), "freq_conv_x": SolveStats()}
        if backend == "auto":
            logger.info("FourierMD: backend %s: %s", self.backend, self.backend_reason)

    def _propagated(
        self, propagator: reference.Propagator, signal: Tensor, s: Tensor, eigvecs: Tensor | None
    ) -> Tensor:
        if self.backend == "reference":
            return super()._propagated(propagator, signal, s, eigvecs)
        stats = self.last_solve["freq_conv" if propagator is self.freq_conv else "freq_conv_x"]
        stats.reset()
        return propagate(propagator, signal, s, eigvecs, stats)


def choose_backend(requested: str) -> tuple[str, str]:
    """The backend that will run and the reason."""
    if requested == "auto":
        return "torch", "linear in the batch, with the published solver's steps, on any device"
    return requested, "requested"


def _published_signature_with_backend() -> inspect.Signature:
    backend = inspect.signature(FourierMD.__init__).parameters["backend"]
    return PUBLISHED_SIGNATURE.replace(
        parameters=[*PUBLISHED_SIGNATURE.parameters.values(), backend]
    )


FourierMD.__signature__ = _published_signature_with_backend()  # type: ignore[attr-defined]
