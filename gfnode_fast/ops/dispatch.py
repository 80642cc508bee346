"""Which backend serves an operation, and why."""

from __future__ import annotations

import importlib.util
import os

from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


def choose_backend(op: str, requested: str) -> tuple[str, str]:
    """The backend that serves a request, and the reason.

    Args:
        op: name of the operation, for the message.
        requested: "auto", "torch" or "triton".

    Returns:
        ("torch" or "triton", reason).

    Raises:
        ValueError: an unknown backend.
    """
    if requested not in BACKENDS:
        raise ValueError(
            f"{op}: `backend` must be one of {', '.join(BACKENDS)}, got {requested!r}; choose one "
            "of these"
        )
    if requested == "auto":
        return "torch", "the Triton kernels have not yet run on hardware"
    return requested, "requested"


def require_triton(op: str, tensor: Tensor) -> None:
    """Raise unless Triton can launch kernels on the tensor: on a GPU, or interpreted.

    Raises:
        RuntimeError: naming what is missing.
    """
    if importlib.util.find_spec("triton") is None:
        problem = "triton is not installed"
    elif tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        return
    else:
        problem = f"the tensors are on {tensor.device}, where Triton has only its interpreter"
    raise RuntimeError(
        f"{op}: `backend` must be 'torch' or 'auto' here, got 'triton'; {problem}; move the "
        "tensors to a GPU, or set TRITON_INTERPRET=1 before Triton is imported"
    )
