"""The solve with each molecule's own steps and its adjoint, `per_molecule`, as traceable functions.

All molecules attempt a step in every pass of the loop, until the last has arrived. The loop records
where each attempt starts; backward pulls back one attempt at a time, all molecules at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.per_molecule import (
    UNUSED_STEP,
    Method,
    first_step,
    growth_after,
    molecule_norm,
)
from gfnode_fast.solvers.traced import (
    Carries,
    Function,
    PullBack,
    by_row,
    combine,
    loop,
    record_loop,
    runge_kutta,
)


class TracedPerMolecule:
    """`forward` and `backward` are what is compiled; both take the parameters last."""

    def __init__(self, function: Function, method: Method) -> None:
        self.function = function
        self.method = method
        self.tableau = method.tableau
        self.dense_rows = [tuple(row) for row in method.tableau.dense.tolist()]

    def _rows(self, value: Tensor) -> Tensor:
        """(B,) → (R,)."""
        return value[:, None].expand(-1, self.method.components).reshape(-1)

    def _begin(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """First slope, and the first step sizes (B,) float64."""

        def function(s: Tensor, y: Tensor) -> Tensor:
            return self.function(s, y, *parameters)

        k = function(y.new_zeros(y.shape[0]), y)
        return k, first_step(self.method, function, y, k)

    def attempt(
        self, time: Tensor, step: Tensor, y: Tensor, k: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """End and stages of a step; time and step (B,) float64."""
        rows, sizes = self._rows(time), self._rows(step)
        return runge_kutta(self.function, self.tableau, rows, sizes, y, k, parameters)

    def _polynomial(self, stages: list[Tensor], step: Tensor) -> Tensor:
        """Coefficients (3, R, M, C) of x², x³, x⁴ inside a step."""
        size = by_row(self._rows(step).to(stages[0].dtype))
        return torch.stack([combine(stages, row, size) for row in self.dense_rows[1:]])

    def forward(self, y0: Tensor, times: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Solve every molecule past the last of its `times`.

        Args:
            y0: (B, D, M, C) state at s = 0, real.
            times: (B, T) float64.

        Returns:
            values (B, T, D*M*C); time, step (S+1, B), y, k (S+1, R, M, C) at the start of each of S
            attempts and after the last; accepted (S+1, B), the last one False; and (3,) float64:
            whether all arrived, how many attempts of molecules on their way were accepted, and how
            many were not.
        """
        method, batch, width = self.method, times.shape[0], y0[0].numel()
        last = times.amax(dim=1)
        y = y0.flatten(0, 1)
        k, step = self._begin(y, *parameters)
        start = torch.zeros_like(last)

        def proceed(time: Tensor, step: Tensor, *rest: Tensor) -> Tensor:
            active = time < last
            return active.any() & ~(active & ~(time + step > time)).any()

        def body(time: Tensor, step: Tensor, y: Tensor, k: Tensor, *rest: Tensor) -> Carries:
            y1, stages = self.attempt(time, step, y, k, *parameters)
            tolerance = torch.maximum(y.abs(), y1.abs()) * method.rtol + method.atol
            size = by_row(self._rows(step).to(y.dtype))
            error = combine(stages, self.tableau.error, size) / tolerance
            ratio = molecule_norm(error, method.components).double()
            finite = torch.isfinite(y1).flatten(1).all(dim=1).view(batch, -1).all(dim=1)
            accepted = (time < last) & (ratio <= 1)
            rows = by_row(self._rows(accepted))
            ahead = torch.where(accepted, time + step, time)
            # An infinite error of a finite state shrinks the step; a non-finite state stops.
            grown = torch.where(
                (ratio < float("inf")) | finite,
                step * growth_after(ratio, self.tableau.order),
                float("nan"),
            )
            return (
                ahead,
                torch.where(ahead < last, grown, step),
                torch.where(rows, y1, y),
                torch.where(rows, stages[-1], k),
                self._polynomial(stages, step),
                accepted,
            )

        first = (start, step, y.clone(), k.clone(), y.new_zeros(3, *y.shape), start > 0)
        ends, next_steps, ys, ks, coefficients, accepted = record_loop(proceed, body, first)
        time, steps = (torch.cat((a[None], b)) for a, b in ((start, ends), (step, next_steps)))
        y_all, k_all = (torch.cat((a[None], b)) for a, b in ((y, ys), (k, ks)))

        # Rejected attempts end where they start, so the first that ends late enough is accepted.
        index = (ends[:, :, None] < times).sum(dim=0).clamp(max=ends.shape[0] - 1)
        molecule = torch.arange(batch, device=times.device)[:, None]
        t_own, dt_own = time[index, molecule], steps[index, molecule]
        x = ((times - t_own) / dt_own).to(y.dtype)[..., None]
        y_own, k_own = (a.view(-1, batch, width)[index, molecule] for a in (y_all, k_all))
        c2, c3, c4 = (
            coefficients[:, p].reshape(-1, batch, width)[index, molecule] for p in range(3)
        )
        slope = dt_own.to(y.dtype)[..., None] * k_own
        values = y_own + x * (slope + x * (c2 + x * (c3 + x * c4)))
        rejected = (time[:-1] < last) & ~accepted
        summary = torch.stack(((ends[-1] >= last).all(), accepted.sum(), rejected.sum())).double()
        accepted = torch.cat((accepted, (start > 0)[None]))
        return values, time, steps, y_all, k_all, accepted, summary

    def backward(
        self,
        grad_values: Tensor,
        times: Tensor,
        time: Tensor,
        step: Tensor,
        y: Tensor,
        k: Tensor,
        accepted: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of y0 (R, M, C) and of the parameters.

        Args:
            grad_values: (B, T, D*M*C).
            time, step, y, k, accepted: as returned by `forward`.
        """
        batch = times.shape[0]

        def proceed(left: Tensor, *rest: Tensor) -> Tensor:
            return left > 0

        def body(
            left: Tensor, grad_y: Tensor, grad_k: Tensor, grad_h: Tensor, *grads: Tensor
        ) -> Carries:
            index = left - 1
            y_i, k_i, t_i, dt_i, taken = (
                a.index_select(0, index.reshape(1))[0] for a in (y, k, time, step, accepted)
            )
            # What was not accepted is not used; a tiny step keeps it finite, and 0 times it 0.
            dt_i = torch.where(taken, dt_i, UNUSED_STEP)
            rows = by_row(self._rows(taken))

            def piece(
                y: Tensor, k: Tensor, t: Tensor, dt: Tensor, *parameters: Tensor
            ) -> tuple[Tensor, Tensor, Tensor]:
                y1, stages = self.attempt(t, dt, y, k, *parameters)
                begin, size = t[:, None], dt[:, None]
                inside = (times > begin) & (times <= begin + size) & taken[:, None]
                x = torch.where(inside, (times - begin) / size, 0.0).to(y.dtype)[..., None]
                c2, c3, c4 = self._polynomial(stages, dt).view(3, batch, 1, -1)
                start, slope = (a.reshape(batch, 1, -1) for a in (y, k))
                slope = size[..., None].to(y.dtype) * slope
                value = start + x * (slope + x * (c2 + x * (c3 + x * c4)))
                return y1, stages[-1], value * inside[..., None].to(y.dtype)

            pull_back: PullBack = torch.func.vjp(piece, y_i, k_i, t_i, dt_i, *parameters)[1]
            more_y, more_k, grad_t, grad_dt, *more = pull_back(
                (torch.where(rows, grad_y, 0), torch.where(rows, grad_k, 0), grad_values)
            )
            # Of an accepted first attempt the size is h, and later ones start that much later.
            moved = torch.where(index == 0, grad_dt, grad_t)
            return (
                index,
                (more_y + torch.where(rows, 0, grad_y)).contiguous(),
                (more_k + torch.where(rows, 0, grad_k)).contiguous(),
                grad_h + torch.where(accepted[0], moved, 0.0),
                *(a + b for a, b in zip(grads, more, strict=True)),
            )

        left = torch.zeros((), dtype=torch.int64, device=y.device) + (accepted.shape[0] - 1)
        zero = torch.zeros_like(y[0])
        grads = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        _, grad_y, grad_k, grad_h, *grads = loop(
            proceed, body, (left, zero, zero.clone(), torch.zeros_like(step[0]), *grads)
        )
        pull_back: PullBack = torch.func.vjp(self._begin, y[0], *parameters)[1]
        more_y, *more = pull_back((grad_k, grad_h))
        return grad_y + more_y, *(a + b for a, b in zip(grads, more, strict=True))
