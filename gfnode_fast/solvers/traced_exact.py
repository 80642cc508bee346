"""The exact solve of linear dynamics, `exact`, and its adjoint as traceable functions."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.traced import Carries, PullBack, loop, record_loop


class TracedExact:
    """Taylor steps of one degree, their number being a tensor.

    `forward` and `backward` are what is compiled; both take W (M, C, C) last, and b (M, C) where
    there is a forcing s b.
    """

    def __init__(self, degree: int) -> None:
        self.degree = degree

    def _step(
        self,
        times: Tensor,
        substeps: Tensor,
        index: Tensor,
        y: Tensor,
        weight: Tensor,
        slope: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """End of step `index` from y (R, M, C), and the values (B, T, X) inside, 0 elsewhere."""
        scale = (1 / substeps).to(y.dtype)
        powers = [y]
        for k in range(self.degree):
            power = torch.bmm(powers[k].transpose(0, 1), weight * scale).transpose(0, 1)
            if slope is not None and k < 2:
                forcing = slope * (scale * scale)
                power = power + (forcing if k else forcing * index.to(y.dtype))
            powers.append(power)
        x = times * substeps - index
        inside = (x > 0) & (x <= 1)
        x = torch.where(inside, x, 0.0).to(y.dtype)[..., None]
        end = powers[-1]
        value = end.reshape(times.shape[0], 1, -1).expand(-1, times.shape[1], -1)
        for k in reversed(range(self.degree)):
            end = powers[k] + end / (k + 1)
            value = powers[k].reshape(times.shape[0], 1, -1) + value * (x / (k + 1))
        return end, value * inside[..., None].to(y.dtype)

    def forward(
        self, y0: Tensor, times: Tensor, substeps: Tensor, *dynamics: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values (B, T, D*M*C), and the starts of all S steps and the end (S+1, R, M, C).

        Args:
            y0: (B, D, M, C) state at s = 0, real.
            times: (B, T) float64.
            substeps: 0-dim float64, whole, steps per unit of time.
        """
        y = y0.flatten(0, 1)
        count = (times.max() * substeps).ceil()

        def proceed(index: Tensor, *rest: Tensor) -> Tensor:
            return index < count

        def body(index: Tensor, y: Tensor, values: Tensor) -> Carries:
            end, read = self._step(times, substeps, index, y, *dynamics)
            return index + 1, end.contiguous(), read.contiguous()

        values = y.new_zeros(*times.shape, y0[0].numel())
        _, ends, read = record_loop(proceed, body, (torch.zeros_like(count), y.clone(), values))
        return read.sum(dim=0), torch.cat((y[None], ends))

    def backward(
        self,
        grad_values: Tensor,
        times: Tensor,
        starts: Tensor,
        substeps: Tensor,
        *dynamics: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of y0 (R, M, C) and of the dynamics."""

        def proceed(left: Tensor, *rest: Tensor) -> Tensor:
            return left > 0

        def body(left: Tensor, grad_y: Tensor, *grads: Tensor) -> Carries:
            index = left - 1
            y = starts.index_select(0, index.reshape(1))[0]

            def step(y: Tensor, *dynamics: Tensor) -> tuple[Tensor, Tensor]:
                return self._step(times, substeps, index.double(), y, *dynamics)

            pull_back: PullBack = torch.func.vjp(step, y, *dynamics)[1]
            more_y, *more = pull_back((grad_y, grad_values))
            return index, more_y.contiguous(), *(a + b for a, b in zip(grads, more, strict=True))

        left = torch.zeros((), dtype=torch.int64, device=starts.device) + (starts.shape[0] - 1)
        grads = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in dynamics]
        return loop(proceed, body, (left, torch.zeros_like(starts[0]), *grads))[1:]
