"""Reading npz files from strangers: sizes are looked at first, and pickles never loaded."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable
from typing import IO, Any

import numpy as np

from gfnode_fast.data.trajectory import Array, TrajectoryError

# No single array may be larger than this when unpacked; MD17's largest has 0.2 GB.
MAX_ARRAY_BYTES = 4 * 2**30
Header = tuple[tuple[int, ...], np.dtype[Any]]
_NPY: Any = np.lib.format  # Any: its functions are not annotated.
_HEADER_READERS = {(1, 0): _NPY.read_array_header_1_0, (2, 0): _NPY.read_array_header_2_0}


def read_headers(path: str | os.PathLike[str]) -> dict[str, Header]:
    """Shape and dtype of every array of an npz file; no data is read.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    TrajectoryError
        When it is not an npz file, is damaged or truncated, or holds a key twice.
    """
    headers = {}
    with _open(path) as archive:
        for key, member in _members(archive, path).items():
            with _reading(archive, member, path, key) as stream:
                headers[key] = _header(stream, path, key)
    return headers


def read_arrays(path: str | os.PathLike[str], keys: Iterable[str]) -> dict[str, Array]:
    """Read the arrays `keys` of an npz file; other arrays are not touched.

    Raises
    ------
    FileNotFoundError
        When there is no such file.
    TrajectoryError
        When a key is missing, its array holds Python objects (pickles are never loaded), is larger
        than `MAX_ARRAY_BYTES`, does not have the size its header declares, or is damaged. Sizes
        are compared before anything is allocated.
    """
    arrays = {}
    with _open(path) as archive:
        members = _members(archive, path)
        for key in keys:
            if key not in members:
                raise TrajectoryError(
                    f"{path}: key '{key}' is missing; the file has {', '.join(sorted(members))}"
                )
            arrays[key] = _read(archive, members[key], path, key)
    return arrays


def read_metadata(arrays: dict[str, Array], path: str | os.PathLike[str]) -> dict[str, object]:
    """Parse the JSON object in `arrays["metadata"]`; an empty dict where there is none."""
    if "metadata" not in arrays:
        return {}
    text = arrays["metadata"]
    try:
        if text.shape != () or text.dtype.kind not in "US":
            raise ValueError(f"a {text.dtype} array of shape {text.shape}")
        metadata = json.loads(str(text))
        if not isinstance(metadata, dict):
            raise ValueError(f"a JSON {type(metadata).__name__}")
    except ValueError as error:
        raise TrajectoryError(
            f"{path}: key 'metadata' must be a string with a JSON object, got {error}"
        ) from error
    return metadata


def read_number(arrays: dict[str, Array], key: str, path: str | os.PathLike[str]) -> float:
    """The one number in `arrays[key]`."""
    array = arrays[key]
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise TrajectoryError(
            f"{path}: key '{key}' must be one number, got {array.dtype} of shape {array.shape}"
        )
    return float(array.reshape(()))


def _open(path: str | os.PathLike[str]) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        raise TrajectoryError(
            f"{path}: must be an npz file, but is damaged, truncated or another kind ({error})"
        ) from error


def _members(archive: zipfile.ZipFile, path: str | os.PathLike[str]) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        if not member.filename.endswith(".npy"):
            raise TrajectoryError(
                f"{path}: key '{member.filename}' must be an .npy array; this is not an npz file"
            )
        key = member.filename.removesuffix(".npy")
        if key in members:
            raise TrajectoryError(f"{path}: key '{key}' must be there once, got it twice")
        members[key] = member
    return members


class _reading:
    """Open one member; damage found while reading it becomes a TrajectoryError naming the key."""

    def __init__(
        self, archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: object, key: str
    ) -> None:
        self._archive, self._member, self._path, self._key = archive, member, path, key
        self._stream: IO[bytes] | None = None

    def _damaged(self, error: BaseException) -> TrajectoryError:
        return TrajectoryError(
            f"{self._path}: key '{self._key}' cannot be read, the file is damaged or truncated "
            f"({type(error).__name__}: {error})"
        )

    def __enter__(self) -> IO[bytes]:
        try:
            self._stream = self._archive.open(self._member)
        except Exception as error:
            raise self._damaged(error) from error
        return self._stream

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._stream is not None:
            self._stream.close()
        # Damage shows as anything: BadZipFile, zlib.error, EOFError, even tokenize.TokenError.
        if isinstance(error, Exception) and not isinstance(error, (TrajectoryError, MemoryError)):
            raise self._damaged(error) from error


def _header(stream: IO[bytes], path: object, key: str) -> Header:
    version = _NPY.read_magic(stream)
    if version not in _HEADER_READERS:
        raise TrajectoryError(
            f"{path}: key '{key}' must be in npy format 1.0 or 2.0, got {version[0]}.{version[1]}"
        )
    shape, _, dtype = _HEADER_READERS[version](stream)
    return shape, dtype


def _read(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: str | os.PathLike[str], key: str
) -> Array:
    with _reading(archive, member, path, key) as stream:
        shape, dtype = _header(stream, path, key)
        if dtype.hasobject:
            raise TrajectoryError(
                f"{path}: key '{key}' must be numbers or text, got Python objects, which would be "
                "unpickled; pickles are never loaded: save the array with a plain dtype"
            )
        size = dtype.itemsize
        for extent in shape:
            size *= extent
        if size > MAX_ARRAY_BYTES or min(shape, default=0) < 0:
            raise TrajectoryError(
                f"{path}: key '{key}' must have at most {MAX_ARRAY_BYTES} bytes, got shape {shape} "
                f"of {dtype} ({size} bytes); split the trajectory"
            )
        if stream.tell() + size != member.file_size:
            raise TrajectoryError(
                f"{path}: key '{key}' must have the {size} bytes its header declares for shape "
                f"{shape} of {dtype}, got {member.file_size - stream.tell()}; the file is damaged "
                "or truncated"
            )
    with _reading(archive, member, path, key) as stream:
        array: Array = _NPY.read_array(stream, allow_pickle=False)
        stream.read(1)  # The end must be reached for zipfile to compare the checksum.
    return array
