"""FourierMD, the drop-in: the reference's constructor, parameters and numbers, with a choice of
backend.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from gfnode_fast import reference
from gfnode_fast.reference.checks import check_choice

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference")
PUBLISHED_SIGNATURE = inspect.signature(reference.FourierMD)


class FourierMD(reference.FourierMD):
    """Drop-in for the published `FourierMD`: the same arguments, state_dict, outputs and gradients.

    Args:
        backend: "auto" chooses once and says why (`backend_reason`, and in the log); "reference"
            is plain PyTorch with torchdiffeq, the published algorithm and its costs. A request
            that cannot be served raises. Keyword only, like every argument beyond the published
            ones, which are documented at `gfnode_fast.reference.FourierMD` and may be given by
            position.

    Raises:
        TypeError, ValueError: an argument with which the published model crashes; the message
            names it.
    """

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        check_choice("backend", backend, BACKENDS)
        super().__init__(*args, **kwargs)
        self.requested_backend = backend
        self.backend, self.backend_reason = choose_backend(backend)
        if backend == "auto":
            logger.info("FourierMD: backend %s: %s", self.backend, self.backend_reason)


def choose_backend(requested: str) -> tuple[str, str]:
    """The backend that will run and the reason."""
    if requested == "auto":
        return "reference", "the only backend of this version"
    return requested, "requested"


def _published_signature_with_backend() -> inspect.Signature:
    backend = inspect.signature(FourierMD.__init__).parameters["backend"]
    return PUBLISHED_SIGNATURE.replace(
        parameters=[*PUBLISHED_SIGNATURE.parameters.values(), backend]
    )


FourierMD.__signature__ = _published_signature_with_backend()  # type: ignore[attr-defined]
