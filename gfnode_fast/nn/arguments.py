"""What the shapes of a state_dict tell of the model that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# The state of a time mode that only widens the modes' matrices does not say which mode it is.
SILENT_TIME_MODES = ("concat", "posenc", "rope")


def arguments_of(
    op: str, state: Mapping[str, Tensor], *, time_mode: str | None = None
) -> dict[str, Any]:
    """Constructor arguments of the model that a state_dict belongs to, as far as shapes tell.

    They do not tell: norm, propagate_x, propagate_h, solver, rtol, atol, delta_frame, no_ode,
    num_timesteps, num_atoms, the activation, and `no_fourier` from the graph basis.

    Args:
        op: who asks, for messages.
        state: a published state_dict.
        time_mode: needed where the shapes leave "concat", "posenc" and "rope" open.

    Raises:
        LookupError: not the state_dict of a FourierMD; names what is missing or misshapen.
        ValueError: `time_mode` is needed and missing, or contradicts the shapes.
    """
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
                f"{op}: `time_mode` must be given, one of {', '.join(SILENT_TIME_MODES)}, since "
                f"these have the same shapes, got none; name the one of the training"
            )
        arguments["time_mode"] = time_mode
    if time_mode is not None and time_mode != arguments["time_mode"]:
        raise ValueError(
            f"{op}: `time_mode` must be {arguments['time_mode']}, as the weights' shapes say, "
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
