"""Which backend serves an operation, and why."""

from __future__ import annotations

import importlib.util
import json
import os
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


@lru_cache(maxsize=1)
def verified_gpus() -> dict[str, str]:
    """GPU families on which the Triton kernels have passed, each with the committed result.

    Returns:
        For example {"sm_90": "benchmarks/results/....json"}; read from `verified_gpus.json` at the
        first use. An entry is {"family": "sm_90", "result": the committed file}.
    """
    text = resources.files("gfnode_fast.ops").joinpath("verified_gpus.json").read_text("utf-8")
    return {entry["family"]: entry["result"] for entry in json.loads(text)}


def family(device: torch.device) -> str:
    """The name of a GPU's family, such as sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def choose_automatically(device: torch.device) -> tuple[str, str]:
    """What "auto" takes on a device, and why: Triton on a GPU of a verified family, else torch."""
    if device.type != "cuda":
        return "torch", f"Triton kernels are for GPUs, the tensors are on {device}"
    name = family(device)
    result = verified_gpus().get(name)
    if result is None:
        return "torch", f"the Triton kernels have not yet run on hardware of this family ({name})"
    return "triton", f"passed on {name}, {result}"


# A constant to torch's compiler, which cannot trace a look at a file or a device.
choose_automatically._dynamo_marked_constant = True  # type: ignore[attr-defined]


def choose_backend(
    op: str,
    requested: str,
    device: torch.device | None = None,
    *,
    unserved: str | None = None,
) -> tuple[str, str]:
    """The backend that serves a request, and the reason.

    Args:
        op: name of the operation, for the message.
        requested: "auto", "torch" or "triton".
        device: where the tensors are, the CPU when not given.
        unserved: what of this call the Triton kernels do not serve, if anything; sends "auto" to
            "torch".

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
    if requested != "auto":
        return requested, "requested"
    chosen, reason = choose_automatically(device or torch.device("cpu"))
    return ("torch", unserved) if chosen == "triton" and unserved else (chosen, reason)


def why_no_triton(device: torch.device) -> str | None:
    """None where Triton can launch kernels on tensors of this device: on a GPU, or interpreted."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the tensors are on {device}, where Triton has only its interpreter"


def require_triton(op: str, tensor: Tensor) -> None:
    """Raise unless Triton can launch kernels on the tensor: on a GPU, or interpreted.

    Raises:
        RuntimeError: naming what is missing.
    """
    if problem := why_no_triton(tensor.device):
        raise RuntimeError(
            f"{op}: `backend` must be 'torch' or 'auto' here, got 'triton'; {problem}; move the "
            "tensors to a GPU, or set TRITON_INTERPRET=1 before Triton is imported"
        )


def in_transform() -> bool:
    """Whether torch.func transforms (grad, vjp, jvp, vmap, ...) what is running."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
