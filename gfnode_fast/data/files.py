"""Files written whole or not at all, and files that grow by whole lines."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class WriteError(OSError):
    """A file could not be written: no space, no directory, no permission; the text names it."""


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` only when the block ends without an error.

    The bytes go to a temporary file in the same folder, are synchronised to the disk and renamed,
    so a reader (or a run resumed after a power cut) sees the old file or the new one, never a part.

    Raises
    ------
    WriteError
        When the folder does not exist or cannot be written, or the disk is full. No temporary file
        stays behind.
    """
    path = Path(path)
    with _naming(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            # mkstemp makes files private; results get the permissions that the user's umask gives.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _synchronise_folder(path.parent)


class AppendedFile:
    """A text file that lines are added to; the operating system has a line once it is written.

    Raises
    ------
    WriteError
        From every method, when the file cannot be written. A part of the last line may stay.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        with _naming(self._path):
            # Without a buffer, closing after an error does not write again.
            self._stream = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, line: str) -> None:
        """Add a line, which brings its own end."""
        rest = line.encode()
        with _naming(self._path):
            while rest:
                rest = rest[self._stream.write(rest) :]

    def synchronise(self) -> None:
        """Make what was written outlast a power cut."""
        with _naming(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file the system complains of: it names none, or a temporary one."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(
            f"write: `{path}` must be a file that can be written, got {error.strerror or error}; "
            "free space, make its directory or give permission, then repeat"
        ) from error


def _synchronise_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
