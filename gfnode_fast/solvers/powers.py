"""The powers of linear or affine dynamics on a state, which Taylor and Runge-Kutta steps are sums
of.

    y' = y W           P_0 = y, P_{k+1} = P_k W
    y' = y W + s b     the same but P_1 = P_0 W + t b, P_2 = P_1 W + b at the step's start t

P_k is the k-th derivative of the solution through y. A buffer of powers is P (K+1, R, M, C):
R rows, B molecules times their components, of M modes and C channels. What costs time is a
`Powers`, in PyTorch or C++ (`csrc/cpu/powers.h`, float32 and float64 on the CPU), whose tensors are
contiguous.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gfnode_fast._extension import REBUILD, why_no_extension
from gfnode_fast.solvers.stage import flat

BACKENDS = ("auto", "torch", "cpp")


class Powers(Protocol):
    """What solves do with a buffer of powers."""

    def __hash__(self) -> int: ...

    def fill(
        self, buffer: Tensor, weight: Tensor, slope: Tensor | None, time: float, first: int = 0
    ) -> None:
        """Write the powers after `buffer[first]` from those up to it; `time` is the step's
        start.
        """

    def weights(
        self, times: Tensor, table: Tensor, start: float, size: float, end: float, like: Tensor
    ) -> Tensor:
        """Σ_p x^p table[p], x = (times - start) / size, where start < times <= end, elsewhere 0.

        Times (B, T) and table (terms, K+1) float64 → (B, T, K+1) in the real dtype of `like`.
        """

    def read(self, weights: Tensor, buffer: Tensor, values: Tensor | None = None) -> Tensor:
        """Σ_k weights (B, T, K+1) P_k, real (B, T, X), added to `values` in place if given."""

    def pull_readings(self, weights: Tensor, grad_values: Tensor, buffer: Tensor) -> Tensor:
        """Adjoint of `read`: the buffer's gradient; of `buffer` only shape and dtype are used."""

    def pull_back(
        self, buffer: Tensor, grad: Tensor, weight: Tensor, slope: Tensor | None, time: float
    ) -> tuple[Tensor, Tensor | None]:
        """Adjoint of `fill`: gradients of W and b. In place `grad[0]` becomes that of the state,
        and `grad[1]`, where there is a b, that of P_1; the others are undefined.
        """

    def measure(
        self, buffer: Tensor, table: Tensor, rtol: float, atol: float
    ) -> tuple[Tensor, Tensor]:
        """Sums with the rows of a table (n, K+1), n <= K+1: the first, shaped like a state, and the
        mean squares (n,) float64 of all relative to atol + rtol max(|P_0|, |the first|).
        """


def by_molecule(buffer: Tensor, batch: int) -> Tensor:
    """(K+1, R, M, C) → (B, K+1, X) real, a view."""
    return flat(buffer).view(len(buffer), batch, -1).transpose(0, 1)


def as_complex_or_real(numbers: Tensor, like: Tensor) -> Tensor:
    """Real numbers in the shape and kind of a state or buffer, a view."""
    if like.is_complex():
        return torch.view_as_complex(numbers.view(*like.shape, 2))
    return numbers.view(like.shape)


def _by_mode(rows: Tensor) -> Tensor:
    """(R, M, C) → (M, R, C), a view that a batched product takes as it is."""
    return rows.transpose(0, 1)


class _TorchPowers:
    def fill(
        self, buffer: Tensor, weight: Tensor, slope: Tensor | None, time: float, first: int = 0
    ) -> None:
        for k in range(first, len(buffer) - 1):
            torch.bmm(_by_mode(buffer[k]), weight, out=_by_mode(buffer[k + 1]))
            if slope is not None and k < 2:
                buffer[k + 1].add_(slope, alpha=time if k == 0 else 1)

    def weights(
        self, times: Tensor, table: Tensor, start: float, size: float, end: float, like: Tensor
    ) -> Tensor:
        inside = (times > start) & (times <= end)
        x = ((times - start) / size).where(inside, 0)
        factors = x.unsqueeze(-1).repeat(1, 1, len(table))
        factors[..., 0] = inside
        found = factors.cumprod(dim=-1) @ table
        return found.to(like.real.dtype if like.is_complex() else like.dtype)

    def read(self, weights: Tensor, buffer: Tensor, values: Tensor | None = None) -> Tensor:
        powers = by_molecule(buffer, len(weights))
        return torch.bmm(weights, powers) if values is None else values.baddbmm_(weights, powers)

    def pull_readings(self, weights: Tensor, grad_values: Tensor, buffer: Tensor) -> Tensor:
        pulled = torch.bmm(weights.transpose(1, 2), grad_values).transpose(0, 1).contiguous()
        return as_complex_or_real(pulled, buffer)

    def pull_back(
        self, buffer: Tensor, grad: Tensor, weight: Tensor, slope: Tensor | None, time: float
    ) -> tuple[Tensor, Tensor | None]:
        adjoint = weight.mH
        for k in reversed(range(len(grad) - 1)):
            _by_mode(grad[k]).baddbmm_(_by_mode(grad[k + 1]), adjoint)
        before = buffer[:-1].flatten(0, 1).permute(1, 2, 0).conj()
        grad_weight = torch.bmm(before, _by_mode(grad[1:].flatten(0, 1)))
        if slope is None:
            return grad_weight, None
        ends = grad[1:3].sum(dim=1)
        return grad_weight, ends[1].add(ends[0], alpha=time)

    def measure(
        self, buffer: Tensor, table: Tensor, rtol: float, atol: float
    ) -> tuple[Tensor, Tensor]:
        sums = as_complex_or_real(table @ flat(buffer), buffer[: len(table)])
        tolerance = torch.maximum(buffer[0].abs(), sums[0].abs()).mul_(rtol).add_(atol)
        return sums[0], (sums.abs() / tolerance).square_().mean(dim=(1, 2, 3)).double()


class _CompiledPowers:
    """Row by row and molecule by molecule the same bits whatever the others are."""

    def fill(
        self, buffer: Tensor, weight: Tensor, slope: Tensor | None, time: float, first: int = 0
    ) -> None:
        torch.ops.gfnode_fast.powers_fill(buffer, weight, slope, time, first)

    def weights(
        self, times: Tensor, table: Tensor, start: float, size: float, end: float, like: Tensor
    ) -> Tensor:
        found: Tensor = torch.ops.gfnode_fast.powers_weights(times, table, start, size, end, like)
        return found

    def read(self, weights: Tensor, buffer: Tensor, values: Tensor | None = None) -> Tensor:
        adds = values is not None
        if values is None:
            batch, times, _ = weights.shape
            values = weights.new_empty(batch, times, buffer[0].numel() // batch)
        torch.ops.gfnode_fast.powers_read(buffer, weights, values, adds)
        return values

    def pull_readings(self, weights: Tensor, grad_values: Tensor, buffer: Tensor) -> Tensor:
        pulled: Tensor = torch.ops.gfnode_fast.powers_pull_readings(buffer, weights, grad_values)
        return pulled

    def pull_back(
        self, buffer: Tensor, grad: Tensor, weight: Tensor, slope: Tensor | None, time: float
    ) -> tuple[Tensor, Tensor | None]:
        of_weight, of_slope = torch.ops.gfnode_fast.powers_pull(
            buffer, grad, weight, time, slope is not None
        )
        return of_weight, None if slope is None else of_slope

    def measure(
        self, buffer: Tensor, table: Tensor, rtol: float, atol: float
    ) -> tuple[Tensor, Tensor]:
        measured: tuple[Tensor, Tensor] = torch.ops.gfnode_fast.powers_measure(
            buffer, table, rtol, atol
        )
        return measured


TORCH: Powers = _TorchPowers()
CPP: Powers = _CompiledPowers()


def why_not_compiled(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where C++ serves a state of this kind, else what is missing."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"the state is {dtype}"
    if problem := why_no_extension():
        return problem
    if not hasattr(torch.ops.gfnode_fast, "powers_fill"):
        return f"the extension was built without it; {REBUILD}"
    return None


def choose_powers(op: str, backend: str, state: Tensor) -> Powers:
    """Who computes: "torch", "cpp", or "auto", which is C++ where it serves.

    Raises:
        ValueError: another backend.
        RuntimeError: "cpp" where it does not serve.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"{op}: `backend` must be one of {', '.join(BACKENDS)}, got {backend!r}; choose one of "
            "these"
        )
    if backend == "torch":
        return TORCH
    problem = why_not_compiled(state.device, state.dtype)
    if problem is None:
        return CPP
    if backend == "cpp":
        raise RuntimeError(
            f"{op}: `backend` must be 'torch' or 'auto' here, got 'cpp'; no C++ kernel: {problem}"
        )
    return TORCH
