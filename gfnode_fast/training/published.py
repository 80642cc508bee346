"""Published checkpoints: weights from a file, sizes from the weights."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.training.checkpoint import CheckpointError, read_checkpoint

WRAPPERS = ("state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
# The state of a time mode that only widens the modes' matrices does not say which mode it is.
SILENT_TIME_MODES = ("concat", "posenc", "rope")


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

    They do not tell: norm, propagate_x, propagate_h, solver, rtol, atol, delta_frame, no_ode,
    num_timesteps, the activation, and ``no_fourier`` from the graph basis.

    Args:
        state: a published state_dict.
        time_mode: needed where the shapes leave ``concat``, ``posenc`` and ``rope`` open.

    Raises:
        CheckpointError: not the state_dict of a FourierMD.
        ValueError: ``time_mode`` is needed and missing, or contradicts the shapes.
    """
    try:
        return _infer(state, time_mode)
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"check: `checkpoint` must be the state_dict of a FourierMD, got one without a usable "
            f"{error}; it belongs to another model"
        ) from error


def _infer(state: Mapping[str, Tensor], time_mode: str | None) -> dict[str, Any]:
    hidden, in_node = _matrix(state, "embedding.weight")
    layers = {name.split(".")[1] for name in state if name.startswith("encode_layers.")}
    layer = _layer_sizes(state, "encode_layers.0.")
    decoder = _layer_sizes(state, "decode_layers.0.")
    weights = state["freq_conv.t_conv.ode_func.weights1"]
    if weights.dim() not in (3, 4):
        raise KeyError("freq_conv.t_conv.ode_func.weights1")
    rhs = {name.removeprefix("freq_conv.t_conv.ode_func.") for name in state}
    width = decoder["width"] - hidden
    linear = weights.dim() == 4
    arguments = {
        "n_layers": len(layers),
        "in_node_nf": in_node,
        "in_edge_nf": layer["in_edge"],
        "hidden_nf": hidden,
        "flat": layer["flat"],
        "num_modes": weights.shape[2] if linear else weights.shape[0],
        "time_emb_dim": width,
        "fourier_basis": "linear" if linear else "graph",
        "use_vae": "fc_mu_h.weight" in state,
        "gnn_ablation_mode": layer["kind"],
        "mode_interaction": "no_interaction",
        "time_mode": "none",
    }
    if "post_attn_linear.weight" in rhs:
        arguments["mode_interaction"] = "attention"
    elif "mlp.0.weight" in rhs:
        arguments["mode_interaction"] = "concat"
    if "time_mlp.0.weight" in rhs:
        arguments["time_mode"] = "mlp"
    elif not linear and weights.shape[1] != hidden:
        if time_mode is None:
            raise ValueError(
                f"check: `time_mode` must be given, one of {', '.join(SILENT_TIME_MODES)}, since "
                f"these have the same shapes, got none; name the one of the training"
            )
        arguments["time_mode"] = time_mode
    if time_mode is not None and time_mode != arguments["time_mode"]:
        raise ValueError(
            f"check: `time_mode` must be {arguments['time_mode']}, as the weights' shapes say, "
            f"got {time_mode!r}; leave it out"
        )
    return arguments


def _matrix(state: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """Shape of the matrix of this name; KeyError when there is none."""
    if state[name].dim() != 2:
        raise KeyError(name)
    rows, columns = state[name].shape
    return rows, columns


def _layer_sizes(state: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Kind, width (hidden_nf, or with the time embedding), edge width and flatness of a layer."""
    if prefix + "edge_message_net.scalar_net.mlp.0.weight" in state:
        width = _matrix(state, prefix + "coord_net.mlp.0.weight")[1]
        out, columns = _matrix(state, prefix + "edge_message_net.scalar_net.mlp.0.weight")
        in_edge = columns - 2 * width - 1
        return {"kind": "egnn", "width": width, "in_edge": in_edge, "flat": out == 4 * width}
    # SAGE and GCN layers work on positions, velocities and features at once.
    channels = _matrix(state, prefix + "edge_mlp.mlp.2.weight")[0]
    out, columns = _matrix(state, prefix + "edge_mlp.mlp.0.weight")
    node_columns = _matrix(state, prefix + "node_mlp.mlp.0.weight")[1]
    return {
        "kind": "sage" if node_columns == 2 * channels else "gcn",
        "width": channels - 6,
        "in_edge": columns - 2 * channels,
        "flat": out == 4 * channels,
    }
