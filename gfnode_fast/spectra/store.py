"""Spectra on disk: one file per graph, written atomically, checked when read."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class SpectralStore:
    """A directory of safetensors files, safe for several processes at once.

    Args:
        directory: made if it is not there.

    Raises:
        ImportError: safetensors is not installed.
        OSError: the directory cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        import safetensors.torch  # noqa: F401 - fail now, not at the first read

        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)

    def path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"

    def read(self, key: str) -> tuple[Tensor, Tensor] | None:
        """(w, U) in float64, or None where there is no intact file; a damaged one is reported and
        will be replaced.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            data = self.path(key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            found = load(data)
            w, U = found["w"], found["U"]
            if int(found["checksum"]) != checksum(key, w, U):
                raise ValueError("its checksum does not fit its contents")
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            logger.warning("%s is damaged (%s); it is computed again", self.path(key), error)
            return None
        return w, U

    def write(self, key: str, w: Tensor, U: Tensor) -> None:
        """Store float64 (w, U); a reader sees the whole file or none."""
        from safetensors.torch import save

        content = save(
            {
                "w": w.contiguous(),
                "U": U.contiguous(),
                "checksum": torch.tensor(checksum(key, w, U)),
            }
        )
        handle, name = tempfile.mkstemp(dir=self.directory, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.path(key))
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def checksum(key: str, w: Tensor, U: Tensor) -> int:
    """CRC-32 over the key, shapes and values."""
    head = json.dumps([key, list(w.shape), list(U.shape)]).encode()
    code = zlib.crc32(head)
    for values in (w, U):
        code = zlib.crc32(values.contiguous().numpy().tobytes(), code)
    return code
