"""Packages that are needed only for some things, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingPackageError(RuntimeError):
    """An optional package is not installed; the text names the command that installs it."""


def require(module: str, op: str, install: str) -> Any:
    """Import `module` for the function `op`, or say how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"{op}: the module {module} must be there, but cannot be imported ({error}); do "
            f"pip install {install}"
        ) from error
