"""What the published model crashes on, said in words: argument, expectation, what came, what to do.

No check synchronises with a GPU except the one on the values of `timeframes`, which the published
solver's `unique` does anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torchdiffeq._impl.odeint import SOLVERS

from gfnode_fast.reference.layers import GRAPH_LAYERS
from gfnode_fast.reference.propagator import FOURIER_BASES, MODE_INTERACTIONS
from gfnode_fast.reference.time_embedding import TIME_MODES

MIN_TIME_WIDTH = 4  # the frequencies divide by (width // 2 - 1)

Edges = Tensor | Sequence[Tensor]


def refuse(
    error: type[Exception], argument: str, expected: str, got: object, remedy: str
) -> NoReturn:
    """Raise `error` in the form of all messages of the published model and of `GFNODE`."""
    raise error(f"GF-NODE: `{argument}` must be {expected}, got {got}; {remedy}")


def describe(value: object) -> str:
    """Type, shape, dtype and device of a tensor, or the type of anything else."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}"
    return f"{type(value).__name__} ({value!r:.80})"


def check_choice(argument: str, value: object, choices: Sequence[str]) -> None:
    """Refuse anything but one of the names in `choices`."""
    if not isinstance(value, str):
        refuse(TypeError, argument, f"one of {list(choices)}", describe(value), "pass a string")
    if value not in choices:
        refuse(ValueError, argument, f"one of {list(choices)}", repr(value), "correct the name")


def _check_count(argument: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(TypeError, argument, "an int", describe(value), "pass a whole number")
    if value < minimum:
        refuse(ValueError, argument, f"at least {minimum}", value, "pass a larger one")


def _check_positive(argument: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse(TypeError, argument, "a positive number", describe(value), remedy)
    if not 0 < value < float("inf"):
        refuse(ValueError, argument, "a positive finite number", value, remedy)


def check_delta_frame(delta_frame: object) -> None:
    """Refuse a `delta_frame` that is not a positive finite number."""
    _check_positive("delta_frame", delta_frame, "pass the largest time in frames, e.g. 3000")


def check_constructor(
    *,
    counts: dict[str, object],
    flags: dict[str, object],
    activation: object,
    time_emb_dim: object,
    num_atoms: object,
    solver: object,
    rtol: object,
    atol: object,
    delta_frame: object,
    fourier_basis: object,
    gnn_ablation_mode: object,
    mode_interaction: object,
    time_mode: object,
) -> None:
    """Refuse constructor arguments with which the published model cannot run."""
    for name, value in counts.items():
        _check_count(name, value, 0 if name in ("n_layers", "in_edge_nf") else 1)
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            refuse(TypeError, name, "a bool", describe(flag), "pass True or False")
    if not flags["with_v"]:
        refuse(
            ValueError,
            "with_v",
            "True",
            False,
            "pass with_v=True and velocities: the model always integrates v",
        )
    if not isinstance(activation, nn.Module):
        refuse(
            TypeError, "activation", "an nn.Module instance", describe(activation), "e.g. nn.SiLU()"
        )
    _check_count("time_emb_dim", time_emb_dim, MIN_TIME_WIDTH)
    if num_atoms is not None:
        _check_count("num_atoms", num_atoms, 1)
    check_choice("solver", solver, [name for name in SOLVERS if name != "scipy_solver"])
    _check_positive("rtol", rtol, "e.g. 1e-3")
    _check_positive("atol", atol, "e.g. 1e-4")
    check_delta_frame(delta_frame)
    if not isinstance(gnn_ablation_mode, str):
        refuse(
            TypeError,
            "gnn_ablation_mode",
            f"one of {list(GRAPH_LAYERS)}",
            describe(gnn_ablation_mode),
            "pass a string",
        )
    check_choice("gnn_ablation_mode", gnn_ablation_mode.lower(), list(GRAPH_LAYERS))
    check_choice("mode_interaction", mode_interaction, MODE_INTERACTIONS)
    check_choice("time_mode", time_mode, TIME_MODES)
    if flags["no_fourier"]:
        if fourier_basis is not None:
            refuse(
                ValueError,
                "fourier_basis",
                "None when no_fourier=True",
                repr(fourier_basis),
                "drop one of the two",
            )
    elif fourier_basis is None:
        refuse(
            ValueError,
            "fourier_basis",
            f"one of {list(FOURIER_BASES)} unless no_fourier=True",
            None,
            "pass 'graph' for Laplacian eigenvectors",
        )
    else:
        check_choice("fourier_basis", fourier_basis, FOURIER_BASES)
    rotary = time_mode == "rope" and fourier_basis != "linear"
    if rotary and isinstance(time_emb_dim, int) and time_emb_dim % 2:
        refuse(
            ValueError,
            "time_emb_dim",
            "even with time_mode='rope'",
            time_emb_dim,
            "pass an even width",
        )
    if flags["no_ode"] and (fourier_basis != "graph" or time_mode != "none"):
        refuse(
            ValueError,
            "no_ode",
            "False unless fourier_basis='graph' and time_mode='none'",
            f"True with fourier_basis={fourier_basis!r}, time_mode={time_mode!r}",
            "drop no_ode or choose that basis and time mode",
        )


def _shape_text(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("*" if n is None else str(n) for n in shape) + ")"


def check_tensor(
    argument: str,
    value: object,
    shape: tuple[int | None, ...],
    dtype: torch.dtype | None,
    what: str,
) -> None:
    """Refuse anything but a tensor of this shape (None: any length) and dtype (None: any)."""
    if not isinstance(value, Tensor):
        expected = f"a tensor {_shape_text(shape)}, {what}"
        refuse(TypeError, argument, expected, describe(value), "pass it")
    if value.dim() != len(shape) or any(
        n is not None and n != m for n, m in zip(shape, value.shape, strict=True)
    ):
        expected = f"of shape {_shape_text(shape)}, {what}"
        refuse(ValueError, argument, expected, describe(value), "reshape it")
    if dtype is not None and value.dtype != dtype:
        refuse(
            TypeError,
            argument,
            f"{dtype}, the model's dtype",
            describe(value),
            f"convert the tensor with .to({dtype}) or the model",
        )


def check_forward(
    *,
    x: object,
    h: object,
    edge_index: object,
    edge_fea: object,
    v: object,
    loc_mean: object,
    timeframes: object,
    eigvecs: object,
    num_atoms: object,
    num_modes: int,
    num_timesteps: int | None,
    delta_frame: object,
    in_node_nf: int,
    in_edge_nf: int,
    basis: str | None,
    solves: bool,
    reads_times: bool,
    parameter: Tensor,
) -> tuple[int, int]:
    """Refuse inputs with which the published model cannot run; returns (B, N).

    Inputs must have `parameter`'s device and, unless autocast converts them, its dtype. Where
    `num_timesteps` is None, any number of times will do.
    """
    device = parameter.device
    dtype = None if torch.is_autocast_enabled(device.type) else parameter.dtype
    check_delta_frame(delta_frame)
    if num_atoms is None:
        refuse(
            ValueError,
            "num_atoms",
            "the number of atoms per molecule",
            None,
            "set model.num_atoms = N",
        )
    _check_count("num_atoms", num_atoms, 1)
    assert isinstance(num_atoms, int)
    check_tensor("x", x, (None, 3), dtype, "positions (B*N, 3)")
    assert isinstance(x, Tensor)
    total = x.shape[0]
    if total == 0 or total % num_atoms:
        refuse(
            ValueError,
            "num_atoms",
            f"a divisor of x's {total} rows",
            num_atoms,
            "set model.num_atoms to the number of atoms per molecule",
        )
    batch = total // num_atoms
    _check_modes(num_modes, num_atoms, basis)
    check_tensor("h", h, (total, in_node_nf), dtype, "node features (B*N, in_node_nf)")
    check_tensor("v", v, (total, 3), dtype, "velocities (B*N, 3)")
    check_tensor("loc_mean", loc_mean, (total, 3), dtype, "each molecule's centroid per atom")
    check_edges(edge_index, edge_fea, in_edge_nf, dtype)
    if basis == "graph":
        shape = (batch, num_atoms, num_atoms)
        check_tensor("U_batch", eigvecs, shape, dtype, "Laplacian eigenvectors (B, N, N)")
    check_times(timeframes, batch, num_timesteps, solves, reads_values=reads_times)
    named = {"x": x, "h": h, "v": v, "loc_mean": loc_mean, "timeframes": timeframes}
    named |= {"edge_fea": edge_fea} | ({"U_batch": eigvecs} if basis == "graph" else {})
    assert isinstance(edge_index, Tensor | tuple | list)
    named |= {f"edge_index[{i}]": end for i, end in enumerate(edge_index)}
    for name, value in named.items():
        if isinstance(value, Tensor) and value.device != device:
            refuse(
                ValueError,
                name,
                f"on {device}, the model's device",
                describe(value),
                "move it there",
            )
    return batch, num_atoms


def _check_modes(num_modes: int, num_atoms: int, basis: str | None) -> None:
    if basis is None:
        if num_modes != num_atoms:
            refuse(
                ValueError,
                "num_modes",
                f"num_atoms ({num_atoms}) when no_fourier=True",
                num_modes,
                "construct the model with that num_modes",
            )
        return
    limit = num_atoms // 2 + 1 if basis == "linear" else num_atoms
    if num_modes > limit:
        refuse(
            ValueError,
            "num_modes",
            f"at most {limit} for {num_atoms} atoms in the {basis} basis",
            num_modes,
            "construct the model with fewer modes or set model.num_atoms",
        )


def check_edges(
    edge_index: object, edge_fea: object, in_edge_nf: int, dtype: torch.dtype | None
) -> None:
    """Refuse anything but a pair (row, col) of integers with a row of features for each edge."""
    if not isinstance(edge_index, Tensor | tuple | list) or len(edge_index) != 2:
        refuse(
            TypeError, "edge_index", "a pair (row, col)", describe(edge_index), "pass two tensors"
        )
    row, col = edge_index
    check_tensor("edge_index[0]", row, (None,), None, "rows (E,)")
    check_tensor("edge_index[1]", col, (row.shape[0],), None, "columns (E,)")
    for i, end in enumerate((row, col)):
        if end.dtype not in (torch.int64, torch.int32):
            refuse(
                TypeError, f"edge_index[{i}]", "torch.int64", describe(end), "convert with .long()"
            )
    check_tensor(
        "edge_fea", edge_fea, (row.shape[0], in_edge_nf), dtype, "edge features (E, in_edge_nf)"
    )


def check_times(
    timeframes: object,
    batch: int,
    num_timesteps: int | None,
    solves: bool,
    *,
    reads_values: bool = True,
) -> None:
    """Refuse anything but (B, T) positive frames, without gradient where `solves`."""
    if (
        num_timesteps is not None
        and isinstance(timeframes, Tensor)
        and timeframes.dim() == 2
        and timeframes.shape[1] != num_timesteps
    ):
        refuse(
            ValueError,
            "timeframes",
            f"of width num_timesteps ({num_timesteps})",
            describe(timeframes),
            "pass that many output times per molecule or set num_timesteps",
        )
    check_tensor(
        "timeframes", timeframes, (batch, num_timesteps), None, "output times in frames (B, T)"
    )
    assert isinstance(timeframes, Tensor)
    if timeframes.dtype == torch.bool or timeframes.is_complex():
        refuse(TypeError, "timeframes", "real numbers", describe(timeframes), "pass frame counts")
    if solves and timeframes.requires_grad and torch.is_grad_enabled():
        refuse(
            ValueError,
            "timeframes",
            "without requires_grad: no gradient passes through the union of all output times",
            describe(timeframes),
            "pass timeframes.detach()",
        )
    if not reads_values or _cannot_read(timeframes):
        return
    if not ((timeframes > 0) & (timeframes < float("inf"))).all():
        refuse(
            ValueError,
            "timeframes",
            "positive and finite",
            f"a minimum of {timeframes.min().item()}",
            "pass frames after the start frame, which is time 0",
        )


def _cannot_read(tensor: Tensor) -> bool:
    """In a graph being compiled or captured there are no values; whoever runs it checks them."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
