"""The published right-hand sides with their constant products taken together.

With z = [y, e], e the time embedding, W_m = weights1[m] and its first C rows W_m^y, last Kt W_m^e:

    no interaction  dy_m = y_m W_m^y + e W_m^e
    attention       scores (z_m Q + q)(z_n K + k)ᵀ / √E: what does not depend on n cancels in the
                    softmax, and so does e's part of z_n. What is left is u_m · y_n with
                    u = z (Q Kᵀ)[:, :C] / √E + (q Kᵀ)[:C] / √E. The softmax's rows sum to 1, so
                    biases and e pass through it, and V, both projections and W_m are one matrix.
    concat          the MLP's first layer takes e's part as a bias; its second is multiplied by W_m.

At C = 64, Kt = 32, M = 2 attention costs 34 kflop a row in place of 210. The sums are the published
ones in another order, so equal to rounding only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fold_linear(weight: Tensor, e: Tensor | None, channels: int) -> tuple[Tensor, Tensor | None]:
    """weight (M, C+Kt, C), e (Kt,) → W (M, C, C) and b (M, C)."""
    bias = None if e is None else torch.einsum("k,mkc->mc", e, weight[:, channels:])
    return weight[:, :channels], bias


def _attention_products(
    weight: Tensor,
    channels: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    post_weight: Tensor,
    post_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(E, C) of the scores and their constant row (C,); (M, E, C) of what is mixed and its constant
    rows (M, C). The first C of the E rows are for y, the others for e.
    """
    query, key, value = in_weight.chunk(3)
    query_bias, _, value_bias = in_bias.chunk(3)
    key = key[:, :channels] / math.sqrt(key.shape[1])
    after = post_weight @ out_weight
    passed = after @ value_bias + post_weight @ out_bias + post_bias
    mixed = torch.matmul((after @ value).T, weight)
    return query.T @ key, query_bias @ key, mixed, torch.einsum("k,mkc->mc", passed, weight)


def fold_attention(
    weight: Tensor, e: Tensor | None, channels: int, *mixer: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Published parameters → P (C, C), q (C,), W (M, C, C), b (M, C)."""
    scores, score_bias, mixed, bias = _attention_products(weight, channels, *mixer)
    if e is not None:
        score_bias = score_bias + e @ scores[channels:]
        bias = bias + torch.einsum("k,mkc->mc", e, mixed[:, channels:])
    return scores[:channels], score_bias, mixed[:, :channels], bias


def fold_attention_in_time(
    weight: Tensor, channels: int, *mixer: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with q (S, C) and b (S, M, C): the constant, and for time_mode='concat', whose e is
    s in every entry, the slope in s.
    """
    scores, score_bias, mixed, bias = _attention_products(weight, channels, *mixer)
    q, b = [score_bias], [bias]
    if weight.shape[1] > channels:
        q.append(scores[channels:].sum(0))
        b.append(mixed[:, channels:].sum(1))
    return scores[:channels], torch.stack(q), mixed[:, :channels], torch.stack(b)


def fold_mlp(
    weight: Tensor,
    e: Tensor | None,
    channels: int,
    weight0: Tensor,
    bias0: Tensor,
    weight2: Tensor,
    bias2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Published parameters → V (M, C, H), c (H,), W (M, H, C), b (M, C)."""
    modes, width, _ = weight.shape
    first = weight0.unflatten(1, (modes, width))
    bias = bias0 if e is None else bias0 + torch.einsum("hmk,k->h", first[:, :, channels:], e)
    second = weight2.unflatten(0, (modes, width))
    return (
        first[:, :, :channels].permute(1, 2, 0),
        bias,
        torch.bmm(second.transpose(1, 2), weight),
        torch.einsum("mk,mkc->mc", bias2.unflatten(0, (modes, width)), weight),
    )
