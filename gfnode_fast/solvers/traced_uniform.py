"""Uniform steps and their cubic reading, `fixed_step`, as traceable functions."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.traced import (
    Carries,
    Function,
    TracedSteps,
    canonical,
    record_loop,
    runge_kutta,
)


class TracedUniform(TracedSteps):
    """Steps of `step_size` with a fixed-step method."""

    def __init__(self, function: Function, tableau: Tableau, step_size: float) -> None:
        self.function = function
        self.tableau = tableau
        self.step_size = step_size

    def evaluations(self, steps: int) -> int:
        return 1 + steps * self.tableau.num_stages

    def begin(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.full((), self.step_size, dtype=torch.float64, device=y.device)
        return self.function(y.new_zeros(()), y, *parameters), step

    def _end(
        self, y: Tensor, k: Tensor, t: Tensor, dt: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        y1, _ = runge_kutta(self.function, self.tableau, t, dt, y, k, parameters)
        return y1, self.function((t + dt).to(y.dtype), y1, *parameters)

    def _cubic(self, x: Tensor, y: Tensor, k: Tensor, y1: Tensor, k1: Tensor) -> Tensor:
        left = 1 - x
        first = left * left * ((1 + 2 * x) * y + self.step_size * x * k)
        return first + x * x * ((3 - 2 * x) * y1 - self.step_size * left * k1)

    def piece(
        self, times: Tensor, y: Tensor, k: Tensor, t: Tensor, dt: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        y1, k1 = self._end(y, k, t, dt, *parameters)
        x = times / self.step_size - (t / self.step_size).round()
        inside = (x > 0) & (x <= 1)
        x = torch.where(inside, x, 0.0).to(y.dtype)[..., None]
        ends = (a.reshape(times.shape[0], 1, -1) for a in (y, k, y1, k1))
        return y1, k1, self._cubic(x, *ends) * inside[..., None].to(y.dtype)

    def forward(self, y0: Tensor, times: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """`TracedSolve.forward`; every step is accepted, and the last entry of the report is
        whether the end is finite.
        """
        batch, width = times.shape[0], y0[0].numel()
        position = times / self.step_size
        count = position.max().ceil()
        y = y0.flatten(0, 1)
        k, step = self.begin(y, *parameters)

        def proceed(index: Tensor, *rest: Tensor) -> Tensor:
            return index < count

        def body(index: Tensor, y: Tensor, k: Tensor) -> Carries:
            y1, k1 = self._end(y, k, index * self.step_size, step, *parameters)
            return index + 1, canonical(y1), canonical(k1)

        start = torch.zeros_like(count)
        points, ys, ks = record_loop(proceed, body, (start, canonical(y), canonical(k)))
        points = torch.cat((start[None], points))
        y_all, k_all = (torch.cat((a[None], b)) for a, b in ((y, ys), (k, ks)))

        index = (position.ceil() - 1).long()
        molecule = torch.arange(batch, device=times.device)[:, None]
        x = (position - index).to(y.dtype)[..., None]
        left, right = (
            [a.view(-1, batch, width)[i, molecule] for a in (y_all, k_all)]
            for i in (index, index + 1)
        )
        values = self._cubic(x, *left, *right)
        is_finite = torch.isfinite(y_all[-1]).all()
        report = torch.cat((torch.ones_like(points[1:]), is_finite[None].double()))
        return values, points * self.step_size, step.expand_as(points).clone(), y_all, k_all, report
