"""Checkpoints that a crash cannot spoil.

A checkpoint NAME in a run's directory is three files:

* ``NAME-<hash>.model.safetensors``: exactly the model's state_dict;
* ``NAME-<hash>.state.safetensors``: everything else that is a tensor (graph, optimiser, random
  state);
* ``NAME.json``: the manifest. It names the two others with their SHA-256, holds the rest, and its
  own SHA-256.

Every file is written beside its place, fsynced and renamed, the manifest last; tensor files are
named by their content and never overwritten by other content. So at any moment ``NAME.json``
describes one complete checkpoint, the old or the new. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from gfnode_fast.data.files import atomic_write

FORMAT = "gfnode_fast checkpoint"
VERSION = 1
PARTS = ("model", "state")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another kind; the message names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read: tensors on the CPU, ``manifest`` as plain values."""

    path: Path
    model: dict[str, Tensor]
    state: dict[str, Tensor]
    manifest: dict[str, Any]

    def value(self, name: str, kind: Any) -> Any:
        """A value of the manifest, ``position.step`` of its section ``position``.

        Raises:
            CheckpointError: it is not there, or no ``kind`` (a type, or a union of types).
        """
        return _value(self.path, self.manifest, name, kind)

    def section(self, prefix: str, names: Iterable[str] = ()) -> dict[str, Tensor]:
        """The state tensors under ``prefix.``, with the prefix removed.

        Raises:
            CheckpointError: one of ``names`` is not among them.
        """
        found = {
            name.removeprefix(prefix + "."): tensor
            for name, tensor in self.state.items()
            if name.startswith(prefix + ".")
        }
        for name in names:
            if name not in found:
                raise self._other("state", f"'{prefix}.{name}'", "none of that name")
        return found

    def load_weights(self, model: nn.Module) -> None:
        """Give ``model``, of the run's dtype, the stored weights.

        Raises:
            CheckpointError: they are those of another model.
        """
        expected = model.state_dict()
        self.check("model", expected)
        for name in self.model.keys() - expected.keys():
            raise self._other("model", f"no {name!r}", "it")
        model.load_state_dict(self.model)

    def check(self, part: Literal["model", "state"], expected: Mapping[str, Tensor]) -> None:
        """Check that a part has tensors like these.

        Raises:
            CheckpointError: one is missing, or of another shape or dtype.
        """
        found = {"model": self.model, "state": self.state}[part]
        for name, tensor in expected.items():
            before = _kind(found[name]) if name in found else "none of that name"
            if before != _kind(tensor):
                raise self._other(part, f"{name!r} as {_kind(tensor)}", before)

    def _other(self, part: str, expected: str, got: str) -> CheckpointError:
        file = self.path.with_name(self.manifest["files"][part]["name"])
        return _broken(file, f"of the run that {self.path.name} describes, with {expected}", got)


def write_json(path: Path, values: object) -> None:
    """Write ``values`` as JSON, atomically."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(values, indent=1) + "\n").encode())


def write_checkpoint(
    directory: Path,
    name: str,
    *,
    model: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> Path:
    """Write checkpoint ``name`` into ``directory``, replacing the one of that name.

    Returns:
        The path of the manifest, ``directory/name.json``.

    Raises:
        WriteError: no space or no permission. The checkpoint that was there stands, and nothing
            of the new one stays behind (unless the manifest that was there is damaged, so that
            nobody knows which files are its own).
        RuntimeError: the package ``safetensors`` is not installed.
    """
    safetensors = _safetensors()
    path = directory / f"{name}.json"
    files = {}
    try:
        for part, tensors in (("model", model), ("state", state)):
            plain = {key: t.detach().cpu().contiguous().clone() for key, t in tensors.items()}
            packed = safetensors.save(plain)
            digest = hashlib.sha256(packed).hexdigest()
            file = directory / f"{name}-{digest[:16]}.{part}.safetensors"
            if not file.exists():
                with atomic_write(file) as stream:
                    stream.write(packed)
            files[part] = {"name": file.name, "sha256": digest}
        content = {"format": FORMAT, "version": VERSION, "files": files, **manifest}
        write_json(path, {**content, "sha256": _digest(content)})
    except BaseException as error:
        try:
            _remove_stale(path)
        except (CheckpointError, OSError) as second:  # what failed first is what counts
            error.add_note(f"Nothing was tidied up: {second}")
        raise
    _remove_stale(path)
    return path


def _remove_stale(path: Path) -> None:
    """Remove what the manifest at ``path``, if any, does not name.

    Of earlier checkpoints, of a write that failed, and of a process that was killed while writing.

    Raises:
        CheckpointError: the manifest is damaged, so that nobody knows; nothing was removed.
    """
    files = _read_manifest(path)["files"] if path.exists() else {}
    current = {entry["name"] for entry in files.values()}
    name, directory = path.stem, path.parent
    for stale in (*directory.glob(f"{name}-*.safetensors"), *directory.glob(f".{name}*.tmp")):
        if stale.name not in current:
            stale.unlink()


def find_checkpoint(path: str | Path) -> Path:
    """The manifest that ``path`` means: itself, or a run's ``best.json``, else ``last.json``.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if path.is_dir():
        for name in ("best.json", "last.json"):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(
            f"checkpoint: `path` must be a run holding best.json or last.json, got {path}; "
            "train one first"
        )
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint: `path` must be a run's directory or a manifest, got {path}, "
            "which does not exist; check the path"
        )
    return path


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the checkpoint that :func:`find_checkpoint` finds, verifying its hashes.

    Raises:
        CheckpointError: missing, damaged, or not a checkpoint of this package.
        RuntimeError: the package ``safetensors`` is not installed.
    """
    safetensors = _safetensors()
    from safetensors import SafetensorError

    path = find_checkpoint(path)
    manifest = _read_manifest(path)
    parts = {}
    for part in PARTS:
        entry = manifest["files"][part]
        file = path.with_name(Path(entry["name"]).name)
        if not file.is_file():
            raise _broken(file, f"the {part} tensors that {path.name} names", "no such file")
        content = file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != entry["sha256"]:
            raise _broken(file, f"of SHA-256 {entry['sha256'][:16]}…", f"{digest[:16]}…")
        try:
            parts[part] = safetensors.load(content)
        except SafetensorError as error:
            raise _broken(file, "a safetensors file", f"{error}") from error
    return Checkpoint(path, parts["model"], parts["state"], manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise _broken(path, "JSON", f"{error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _broken(path, f"a manifest of format {FORMAT!r}", "another kind of file")
    if manifest.get("version") != VERSION:
        raise _broken(path, f"of version {VERSION}", f"version {manifest.get('version')!r}")
    digest = manifest.pop("sha256", None)
    if digest != _digest(manifest):
        raise _broken(path, f"of SHA-256 {str(digest)[:16]}…", f"{_digest(manifest)[:16]}…")
    for part in PARTS:
        for entry in ("name", "sha256"):
            _value(path, manifest, f"files.{part}.{entry}", str)
    return manifest


def _value(path: Path, manifest: Mapping[str, Any], name: str, kind: Any) -> Any:
    found: Any = manifest
    for key in name.split("."):
        try:
            found = found[int(key) if isinstance(found, list) else key]
        except (LookupError, TypeError, ValueError):
            raise _broken(path, f"a manifest with {name!r}", "one without it") from None
    if not isinstance(found, kind):
        expected = getattr(kind, "__name__", str(kind))
        raise _broken(path, f"a manifest with {name!r} of type {expected}", repr(found))
    return found


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}".removeprefix("torch.")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _broken(path: Path, expected: str, got: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint: `{path}` must be {expected}, got {got}; "
        "restore the file or use another checkpoint"
    )


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise RuntimeError(
            "checkpoint: `safetensors` must be installed to read or write checkpoints, "
            "got an ImportError; do pip install safetensors"
        ) from error
    return safetensors.torch
