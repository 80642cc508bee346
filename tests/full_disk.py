"""A disk that is full at a chosen moment, and one that takes files up to a size only."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest


class FullDisk:
    """Counts the calls by which the package writes files; call number `at` finds no space left.

    Attributes:
        calls: names of the calls so far: mkstemp, write, fsync, replace.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.at = at
        self.calls: list[str] = []
        for module, name in ((tempfile, "mkstemp"), (os, "fsync"), (os, "replace")):
            patch.setattr(module, name, self._counted(name, getattr(module, name)))
        patch.setattr(os, "fdopen", lambda descriptor, mode: _Stream(self, descriptor, mode))
        # The module's own name, so that everybody else's `open` stays.
        patch.setattr("gfnode_fast.data.files.open", self._open, raising=False)

    def count(self, name: str) -> None:
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _counted(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count(name)
            return function(*args, **kwargs)

        return call

    def _open(self, path: Any, mode: str, **kwargs: Any) -> Any:
        assert kwargs == {"buffering": 0}
        return _Stream(self, os.fspath(path), mode)


class _Stream(io.FileIO):
    def __init__(self, disk: FullDisk, file: Any, mode: str) -> None:
        super().__init__(file, mode)
        self._disk = disk

    def write(self, data: Any) -> int:
        try:
            self._disk.count("write")
        except OSError:
            super().write(data[: len(data) // 2])
            raise
        return super().write(data)


@contextlib.contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to let any file of this process grow beyond `size` bytes (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
