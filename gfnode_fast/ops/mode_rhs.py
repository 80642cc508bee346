"""The per-mode right-hand side of the spectral ODE, for every mode interaction and time mode.

z = [y, e(s)], mixed across modes by attention or an MLP (or not at all), then one matrix per mode:
dy_m/ds = z_m W_m. Oracle: `gfnode_fast.reference.ModeRHS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

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
    query, key, value = F.linear(z, in_weight, in_bias).chunk(3, dim=-1)
    scores = torch.bmm(query, key.transpose(1, 2)) / math.sqrt(z.shape[-1])
    mixed = torch.bmm(scores.softmax(dim=-1), value)
    return F.linear(F.linear(mixed, out_weight, out_bias), post_weight, post_bias)


def _mix_by_mlp(z: Tensor, *mlp: Tensor) -> Tensor:
    """An MLP over all modes of a row at once, z (R, M, E) flattened mode-major."""
    return _mlp(z.flatten(1), *mlp).view_as(z)


_MIXERS: dict[str, Callable[..., Tensor]] = {"attention": _attend, "concat": _mix_by_mlp}


def _parameters(module: ModeRHS, *prefixes: str) -> tuple[Tensor, ...]:
    return tuple(p for name, p in module.named_parameters() if name.startswith(prefixes))


def right_hand_side(module: ModeRHS | LinearBasisRHS) -> RightHandSide:
    """The solvers' view of a reference right-hand side, sharing its parameters.

    Linear or affine where modes do not mix, general otherwise.
    """
    if isinstance(module, LinearBasisRHS):
        return LinearRHS(module, torch.view_as_complex(module.weights1).permute(2, 0, 1))
    embedding = module.time_embedding
    time_mlp = _parameters(module, "time_mlp.")
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
    mixer = _parameters(module, "attn.", "post_attn_linear.", "mlp.")
    num_mixer = len(mixer)

    def general(s: Tensor, y: Tensor, weight: Tensor, *rest: Tensor) -> Tensor:
        z = y
        if embedding is not None:
            e = _embed(embedding, s, rest[num_mixer:]).to(y.dtype)
            z = torch.cat((y, e.unsqueeze(1).expand(*y.shape[:2], -1)), dim=-1)
        z = mix(z, *rest[:num_mixer])
        return torch.bmm(z.transpose(0, 1), weight).transpose(0, 1)

    return GeneralRHS(module, general, (weight, *mixer, *time_mlp))
