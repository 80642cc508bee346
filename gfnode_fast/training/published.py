"""Published checkpoints: weights from a file, sizes from the weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.nn.arguments import arguments_of
from gfnode_fast.training.checkpoint import CheckpointError, read_checkpoint

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The weights in a file; no code in it is ever run.

    Reads ``.safetensors``, a checkpoint of this package (directory or manifest), and what
    ``torch.save`` wrote, with ``weights_only=True``. Wrapping dictionaries (``{"state_dict": …}``)
    and prefixes (``module.``) are removed.

    Raises:
        CheckpointError: not such a file, or one that would need code to be run.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".json":
        return read_checkpoint(path).model
    if not path.is_file():
        raise CheckpointError(
            f"check: `checkpoint` must be an existing file, got {path}; check the path"
        )
    values = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    for wrapper in WRAPPERS:
        if isinstance(values, Mapping) and isinstance(values.get(wrapper), Mapping):
            values = values[wrapper]
    if (
        not isinstance(values, Mapping)
        or not values
        or not all(isinstance(value, Tensor) for value in values.values())
    ):
        raise CheckpointError(
            f"check: `checkpoint` must hold a state_dict (names to tensors), "
            f"got {type(values).__name__} in {path}; save model.state_dict()"
        )
    state = {str(name): value for name, value in values.items()}
    for name, value in state.items():
        if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"check: `checkpoint` must hold finite floating-point weights, got {value.dtype} "
                f"or NaN or infinity in {name} of {path}; save an intact model.state_dict()"
            )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _load_safetensors(path: Path) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            f"check: `checkpoint` must be a safetensors file, got {path} ({error}); save it again"
        ) from error


def _load_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"check: `checkpoint` must hold weights alone, got {path}, which torch refuses to "
            f"read without running code from it ({reason}); save model.state_dict()"
        ) from error
    except (MemoryError, PermissionError):
        raise
    # Damage shows as anything: RuntimeError, EOFError, KeyError, IndexError, OSError 22.
    except Exception as error:
        raise CheckpointError(
            f"check: `checkpoint` must be what torch.save wrote, got {path} "
            f"({type(error).__name__}: {error}); "
            "the file is damaged or of another kind"
        ) from error


def infer_arguments(state: Mapping[str, Tensor], *, time_mode: str | None = None) -> dict[str, Any]:
    """Constructor arguments of the model that a state_dict belongs to, as far as shapes tell.

    ``gfnode_fast.nn.arguments`` says what they do not tell.

    Args:
        state: a published state_dict.
        time_mode: needed where the shapes leave ``concat``, ``posenc`` and ``rope`` open.

    Raises:
        CheckpointError: not the state_dict of a FourierMD.
        ValueError: ``time_mode`` is needed and missing, or contradicts the shapes.
    """
    try:
        return arguments_of("check", state, time_mode=time_mode)
    except LookupError as error:
        raise CheckpointError(
            f"check: `checkpoint` must be the state_dict of a FourierMD, got one without a usable "
            f"{error}; it belongs to another model"
        ) from error
