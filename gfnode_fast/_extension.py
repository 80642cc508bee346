"""The compiled extension `gfnode_fast._C`: loaded on first need, and why not when it cannot be."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

from gfnode_fast._version import __version__

REBUILD = "reinstall the package with GFNODE_BUILD=cpu or GFNODE_BUILD=cuda to build it"


@functools.cache
def why_no_extension() -> str | None:
    """Load the extension if that has not happened; None on success, else what is wrong."""
    import torch  # before the extension, whose symbols it provides

    try:
        importlib.import_module("gfnode_fast._C")
    except ModuleNotFoundError:
        record = build_record()
        reason = record["reason"] if record else "the package is used without being installed"
        return f"it was not built: {reason}; {REBUILD}"
    except ImportError as error:
        return f"it does not load with torch {torch.__version__} ({error}); {REBUILD}"
    built_version = binary_info()["version"]
    if built_version != __version__:
        return f"it was built for version {built_version}, this is {__version__}; {REBUILD}"
    return None


def binary_info() -> dict[str, Any]:
    """What the loaded binary says of itself.

    Returns:
        version: of this package, when it was built.
        compiler: name and version of the C++ compiler.
        torch_abi: oldest torch the binary serves.
        cuda: version of the CUDA toolkit, None without a CUDA part.
        cuda_architectures: compute capabilities times 100.
    """
    import torch

    info: dict[str, Any] = json.loads(torch.ops.gfnode_fast.build_info())
    return info


def build_record() -> dict[str, Any] | None:
    """What the installation was asked to build, built, and why no more; None if not installed."""
    path = Path(__file__).with_name("_build.json")
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record
