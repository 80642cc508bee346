"""What this installation is and can do: versions, devices, backends and why not, the extension."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

from gfnode_fast._extension import binary_info, build_record, why_no_extension
from gfnode_fast._version import __version__
from gfnode_fast.ops.dispatch import verified_gpus
from gfnode_fast.ops.graph_layers_cpp import why_not_compiled

PACKAGES = (
    "torch",
    "torchdiffeq",
    "numpy",
    "triton",
    "safetensors",
    "jsonargparse",
    "pyyaml",
    "tqdm",
    "matplotlib",
    "ase",
    "tblite",
    "rdkit",
    "mdtraj",
    "tensorboard",
)


def info() -> dict[str, Any]:
    """Describe the installation.

    Returns:
        A dict that `json.dumps` takes:

        version, python, platform: of this package, the interpreter, the machine.
        packages: name → version, None where it is not installed.
        devices: `cpu` with its cores and torch's threads; `cuda` with `available`, `why_not`,
            `toolkit` (torch's) and per device name, compute capability, memory in bytes and
            number of multiprocessors.
        backends: of FourierMD: name → `available`, `why_not`.
        auto: what backend="auto" takes, and why; `FourierMD` is what GFNODE_BACKEND in the
            environment makes of it (a model's own `backend_report` tells all its parts).
        verified_gpus: GPU families on which the Triton kernels have passed → the committed result.
        solvers: the methods solved here, and those left to torchdiffeq with the published costs.
        spectra: counters of the caches of spectra that live.
        extension: `available`, `why_not`, `build` (what the installation asked for, built, and why
            no more) and `binary` (what the loaded binary says of itself).

    Notes:
        Loads the extension if it is there. Queries CUDA devices, allocates nothing on them.
    """
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _installed_version(name) for name in PACKAGES},
        "devices": {"cpu": _cpu(), "cuda": _cuda()},
        "backends": _backends(),
        "auto": _chosen(),
        "verified_gpus": dict(verified_gpus()),
        "solvers": _solvers(),
        "spectra": _spectra(),
        "extension": _extension(),
    }


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _availability(problem: str | None) -> dict[str, Any]:
    return {"available": problem is None, "why_not": problem}


def _cpu() -> dict[str, Any]:
    import torch

    return {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}


def _why_no_cuda() -> str | None:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def _cuda() -> dict[str, Any]:
    import torch

    problem = _why_no_cuda()
    devices = []
    for index in range(0 if problem else torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {**_availability(problem), "toolkit": torch.version.cuda, "devices": devices}


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _why_no_cuda()


def _backends() -> dict[str, dict[str, Any]]:
    from gfnode_fast.nn.backends import BACKENDS

    problems: dict[str, str | None] = dict.fromkeys(name for name in BACKENDS if name != "auto")
    problems |= {"cpp": why_not_compiled(), "triton": _why_no_triton()}
    return {name: _availability(problem) for name, problem in problems.items()}


def _chosen() -> dict[str, dict[str, str]]:
    import torch

    from gfnode_fast.nn.backends import ENVIRONMENT_VARIABLE, requested_backend
    from gfnode_fast.ops.dispatch import choose_automatically
    from gfnode_fast.ops.eigh import choose_backend as choose_eigh

    try:
        asked = requested_backend("auto")
        model = {"backend": asked.backend, "reason": asked.reason}
    except ValueError as error:
        model = {"backend": os.environ[ENVIRONMENT_VARIABLE], "reason": str(error)}
    problem = why_not_compiled()
    layers = ("torch", problem) if problem else ("cpp", "in float32 with SiLU or Tanh, else torch")
    chosen = {
        "FourierMD": model,
        "graph layers on the CPU": {"backend": layers[0], "reason": layers[1]},
        "transforms on the CPU": {"backend": "torch", "reason": "Triton kernels are for GPUs"},
        "solves of linear dynamics on the CPU": {
            "backend": layers[0],
            "reason": problem or "in float32 and float64, else torch",
        },
    }
    eigh, eigh_reason = choose_eigh(torch.device("cpu"), 0)
    chosen["eigh_batched on the CPU"] = {"backend": eigh, "reason": eigh_reason}
    devices = 0 if _why_no_cuda() else torch.cuda.device_count()
    for index in range(devices):
        backend, reason = choose_automatically(torch.device("cuda", index))
        chosen[f"on cuda:{index}"] = {"backend": backend, "reason": reason}
    return chosen


def _solvers() -> dict[str, list[str]]:
    from torchdiffeq._impl.odeint import SOLVERS

    from gfnode_fast.solvers import TABLEAUS

    theirs = [name for name in SOLVERS if name not in TABLEAUS and name != "scipy_solver"]
    return {"own": list(TABLEAUS), "torchdiffeq": theirs}


def _spectra() -> dict[str, Any]:
    from gfnode_fast.spectra.cache import counters_of_all

    return {"caches": counters_of_all()}


def _extension() -> dict[str, Any]:
    problem = why_no_extension()
    return {
        **_availability(problem),
        "build": build_record(),
        "binary": None if problem else binary_info(),
    }
