"""The per-mode right-hand side of the spectral ODE, for every mode interaction and time mode.

z = [y, e(s)], mixed across modes by attention or an MLP (or not at all), then one matrix per mode:
dy_m/ds = z_m W_m. Oracle: `gfnode_fast.reference.ModeRHS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gfnode_fast.ops import mode_rhs_registered as on_triton
from gfnode_fast.ops.dispatch import choose_backend
from gfnode_fast.ops.mode_rhs_folded import fold_attention, fold_linear, fold_mlp
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeRHS
from gfnode_fast.reference.time_embedding import SolverTimeEmbedding
from gfnode_fast.solvers.rhs import GeneralRHS, LinearRHS, RightHandSide


def _embed(embedding: SolverTimeEmbedding, s: Tensor, mlp: tuple[Tensor, ...]) -> Tensor:
    """Times (n,) → (n, Kt); `mlp` holds the weights of time_mode='mlp'."""

    def time_mlp(column: Tensor) -> Tensor:
        return _mlp(column, *mlp)

    return embedding(s, time_mlp if mlp else None)


def _mlp(z: Tensor, weight0: Tensor, bias0: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(z, weight0, bias0)), weight2, bias2)


def _linear(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear of z (R, M, E); in 3-D its derivative would fix R in a compiled graph."""
    out: Tensor = F.linear(z.flatten(0, 1), weight, bias).unflatten(0, z.shape[:2])
    return out


def _attend(
    z: Tensor,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
) -> Tensor:
    """One-head self-attention over the modes of each row, z (R, M, E), and the linear after it."""
    query, key, value = _linear(z, in_weight, in_bias).chunk(3, dim=-1)
    scores = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(z.shape[-1])
    mixed = torch.bmm(scores.softmax(dim=-1), value)
    return _linear(_linear(mixed, out_weight, out_bias), post_weight, post_bias)


def _mix_by_mlp(z: Tensor, *mlp: Tensor) -> Tensor:
    """An MLP over all modes of a row at once, z (R, M, E) flattened mode-major."""
    return _mlp(z.flatten(1), *mlp).view_as(z)


_MIXERS: dict[str, Callable[..., Tensor]] = {"attention": _attend, "concat": _mix_by_mlp}


_MIXER_NAMES = {
    "no_interaction": (),
    "attention": (
        "attn.in_proj_weight",
        "attn.in_proj_bias",
        "attn.out_proj.weight",
        "attn.out_proj.bias",
        "post_attn_linear.weight",
        "post_attn_linear.bias",
    ),
    "concat": ("mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"),
}
_TIME_MLP_NAMES = ("time_mlp.0.weight", "time_mlp.0.bias", "time_mlp.2.weight", "time_mlp.2.bias")


def _value(module: nn.Module, name: str) -> Tensor:
    """By attribute: parametrised, pruned or replicated modules have other parameters."""
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if found is None:  # a bias that was taken away
        weight = _value(module, name.removesuffix("bias") + "weight")
        return weight.new_zeros(weight.shape[0])
    value: Tensor = found
    return value


def _mixer(module: ModeRHS) -> tuple[Tensor, ...]:
    return tuple(_value(module, name) for name in _MIXER_NAMES[module.mode_interaction])


def _time_mlp(module: ModeRHS) -> tuple[Tensor, ...]:
    return tuple(_value(module, name) for name in _TIME_MLP_NAMES if module.time_mode == "mlp")


def parameter_names(module: ModeRHS | LinearBasisRHS) -> tuple[str, ...]:
    """What a right-hand side computes with, weights1 first."""
    if isinstance(module, LinearBasisRHS):
        return ("weights1",)
    time_mlp = _TIME_MLP_NAMES if module.time_mode == "mlp" else ()
    return ("weights1", *_MIXER_NAMES[module.mode_interaction], *time_mlp)


def parameter_values(module: ModeRHS | LinearBasisRHS) -> list[Tensor]:
    """The values of `parameter_names`."""
    return [_value(module, name) for name in parameter_names(module)]


def right_hand_side(module: ModeRHS | LinearBasisRHS) -> RightHandSide:
    """The solvers' view of a reference right-hand side, sharing its parameters.

    Linear or affine where modes do not mix, general otherwise.
    """
    if isinstance(module, LinearBasisRHS):
        return LinearRHS(module, torch.view_as_complex(module.weights1).permute(2, 0, 1))
    embedding = module.time_embedding
    time_mlp = _time_mlp(module)
    weight = module.weights1
    channels = weight.shape[2]
    if module.mode_interaction == "no_interaction":
        if embedding is None:
            return LinearRHS(module, weight)

        def forcing(s: Tensor, weight: Tensor, *mlp: Tensor) -> Tensor:
            e = _embed(embedding, s, mlp).to(weight.dtype)
            return torch.einsum("nk,mkc->nmc", e, weight)

        return LinearRHS(
            module,
            weight[:, :channels],
            forcing,
            (weight[:, channels:], *time_mlp),
            is_proportional=module.time_mode == "concat",
        )

    mix = _MIXERS[module.mode_interaction]
    mixer = _mixer(module)
    num_mixer = len(mixer)

    def general(s: Tensor, y: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        z = y
        if embedding is not None:
            e = _embed(embedding, s, rest[num_mixer:]).to(y.dtype)
            z = torch.cat((y, e.unsqueeze(1).expand(*y.shape[:2], -1)), dim=-1)
        z = mix(z, *rest[:num_mixer])
        return torch.bmm(z.transpose(0, 1), weight).transpose(0, 1)

    return GeneralRHS(module, general, (weight, *mixer, *time_mlp))


def mode_rhs(module: ModeRHS, s: Tensor | None, y: Tensor, *, backend: str = "auto") -> Tensor:
    """The right-hand side dy/ds of the spectral ODE.

    z = [y, e(s)], mixed across modes or not; dy/ds[m] = z[m] @ weights1[m]

    Args:
        module: reference right-hand side: mode interaction, time mode, parameters.
        s: 0-dim normalised time; None where `module.time_mode` is "none".
        y: (M, R, C) modes of R rows, dtype and device of the parameters.
        backend: "torch", "triton" (fp32 and fp64, C <= 64, products of constant matrices taken
            together), or "auto", which is "triton" where it serves and has passed on this family of
            GPU (`dispatch.verified_gpus`), else "torch".

    Returns:
        (M, R, C).

    Raises:
        TypeError, ValueError: shape, dtype or device that does not match; a time that is missing
            or not wanted.
        RuntimeError: Triton was asked for and cannot serve.

    Notes:
        Deterministic. Torch is differentiable any number of times, Triton once, in y, the
        parameters and, through the embedding, s.
    """
    modes, _, channels = module.weights1.shape
    if y.dim() != 3 or y.shape[0] != modes or y.shape[2] != channels:
        raise ValueError(
            f"mode_rhs: `y` must be ({modes}, R, {channels}) for weights1 "
            f"{tuple(module.weights1.shape)}, got {tuple(y.shape)}; reshape it"
        )
    if y.dtype != module.weights1.dtype:
        raise TypeError(
            f"mode_rhs: `y` must be {module.weights1.dtype} like the parameters, got {y.dtype}; "
            "convert one of them"
        )
    if y.device != module.weights1.device:
        raise ValueError(
            f"mode_rhs: `y` must be on {module.weights1.device} like the parameters, got "
            f"{y.device}; move it"
        )
    if (s is None) != (module.time_mode == "none") or (s is not None and s.dim() != 0):
        wanted = "None" if module.time_mode == "none" else "a 0-dim tensor"
        got = None if s is None else tuple(s.shape)
        raise ValueError(
            f"mode_rhs: `s` must be {wanted} with time_mode={module.time_mode!r}, got {got}; pass "
            "the time that the embedding takes"
        )
    backend, _ = choose_backend(
        "mode_rhs", backend, y.device, unserved=on_triton.unserved_by_triton(y.dtype, y.shape[2])
    )
    rows = y.transpose(0, 1)
    if backend == "torch":
        time = y.new_zeros(()) if s is None else s
        return right_hand_side(module)(time, rows).transpose(0, 1)
    e = None
    if module.time_embedding is not None and s is not None:
        e = _embed(module.time_embedding, s, _time_mlp(module))[0].to(y.dtype)
    weight = module.weights1
    mixer = _mixer(module)
    out: Tensor
    if module.mode_interaction == "attention":
        out = on_triton.mode_attention(rows, *fold_attention(weight, e, channels, *mixer))
    elif module.mode_interaction == "concat":
        out, _ = on_triton.mode_mlp(rows, *fold_mlp(weight, e, channels, *mixer))
    else:
        out = on_triton.mode_linear(rows, *fold_linear(weight, e, channels))
    return out.transpose(0, 1)
