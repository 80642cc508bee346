"""The joint adaptive solve and its adjoint as traceable functions: tensors in, tensors out, no
host.

torch.compile turns each into one graph whose loop is a `while_loop`, so its size does not depend on
the number of steps. Autograd never sees the loops: `while_loop` drops gradients through carries
whose initial value does not require them. The forward loop records where each attempt starts, the
backward loop pulls back one accepted step at a time from its start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from gfnode_fast.solvers.control import (
    MAX_GROWTH,
    MIN_GROWTH,
    SAFETY,
    TINY_NORM,
    TINY_STEP,
)
from gfnode_fast.solvers.tableau import Row, Tableau

Function = Callable[..., Tensor]
"""(s 0-dim, y (R, M, C), *parameters) → dy/ds (R, M, C)."""

PullBack = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]

Carries = tuple[Tensor, ...]


def loop(proceed: Callable[..., Tensor], body: Callable[..., Carries], carries: Carries) -> Carries:
    """`body` on the carries while `proceed`: one node in a traced graph, a plain loop outside."""
    out: Carries = torch.ops.higher_order.while_loop(proceed, body, carries, ())
    return out


def record_loop(
    proceed: Callable[..., Tensor], body: Callable[..., Carries], carries: Carries
) -> Carries:
    """`loop` that returns the carries of every pass, stacked."""
    out: Carries = torch.ops.higher_order.while_loop_stack_output(proceed, body, carries, ())
    return out


def canonical(tensor: Tensor) -> Tensor:
    """A contiguous copy with the strides of its shape, unit dimensions included, in memory of its
    own: the compiler guards strides, and its loops take no two inputs that share memory.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def combine(stages: list[Tensor], row: Row, step: Tensor) -> Tensor:
    """step * Σ_j row[j] k_j, one fused loop over the state once compiled."""
    terms = [weight * k for weight, k in zip(row, stages, strict=False) if weight]
    return step * sum(terms[1:], terms[0])


def by_row(step: Tensor) -> Tensor:
    """A step, or one per row, that multiplies a state."""
    return step if step.dim() == 0 else step[:, None, None]


def is_first_same_as_last(tableau: Tableau) -> bool:
    """`Tableau.ends_on_last_stage` without its cache, whose lock the compiler cannot trace."""
    return tableau.is_adaptive and tableau.solution == (*tableau.beta[-1], 0)


def runge_kutta(
    function: Function,
    tableau: Tableau,
    t: Tensor,
    dt: Tensor,
    y: Tensor,
    k: Tensor,
    parameters: tuple[Tensor, ...],
) -> tuple[Tensor, list[Tensor]]:
    """One step from y (R, M, C) with slope k: its end and all its stages.

    t and dt are float64, 0-dim or (R,) with a step per row.
    """
    start, step = t.to(y.dtype), dt.to(y.dtype)
    stages, point = [k], y
    size = by_row(step)
    for alpha, row in zip(tableau.alpha, tableau.beta, strict=True):
        point = y + combine(stages, row, size)
        when = start + alpha * step
        if alpha == 1.0 and tableau.is_adaptive:  # just before the end, as published
            end = (t + dt).to(y.dtype)
            when = end + (torch.nextafter(end, end - 1) - end).detach()
        stages.append(function(when, point, *parameters))
    if is_first_same_as_last(tableau):
        return point, stages
    return y + combine(stages, tableau.solution, size), stages


def _rms(y: Tensor) -> Tensor:
    """Root mean square, with gradient 0 instead of NaN at 0."""
    mean = y.square().mean()
    is_zero = mean == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, mean).sqrt())


class TracedSteps(ABC):
    """A solve by steps that know their start, (y, k), time and size.

    `forward` and `backward` are what is compiled; both take the parameters last.
    """

    tableau: Tableau

    @abstractmethod
    def evaluations(self, steps: int) -> int:
        """How often `steps` attempts evaluate the right-hand side, the start included."""

    @abstractmethod
    def begin(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """First slope and first step size (float64)."""

    @abstractmethod
    def piece(
        self, times: Tensor, y: Tensor, k: Tensor, t: Tensor, dt: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """End and slope of an accepted step, and the values (B, T, X) at the times inside, 0 at all
        others.
        """

    def backward(
        self,
        grad_values: Tensor,
        times: Tensor,
        t: Tensor,
        dt: Tensor,
        y: Tensor,
        k: Tensor,
        first_accepted: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        """Gradients of y0 (R, M, C) and of the parameters.

        Args:
            grad_values: (B, T, D*M*C).
            t, dt, y, k: as returned by `forward`, accepted attempts only.
            first_accepted: 0-dim float64, 1 if the first attempt was accepted, else 0: then the
                first step size carries gradient, to the size of the first step and to the start of
                each later one.
        """

        def piece(
            y: Tensor, k: Tensor, t: Tensor, dt: Tensor, *parameters: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            return self.piece(times, y, k, t, dt, *parameters)

        def proceed(left: Tensor, *rest: Tensor) -> Tensor:
            return left > 0

        def body(
            left: Tensor, grad_y: Tensor, grad_k: Tensor, grad_h: Tensor, *grads: Tensor
        ) -> tuple[Tensor, ...]:
            index = left - 1
            at = index.reshape(1)
            start = (a.index_select(0, at)[0] for a in (y, k, t, dt))
            pull_back: PullBack = torch.func.vjp(piece, *start, *parameters)[1]
            more_y, more_k, grad_t, grad_dt, *more = pull_back((grad_y, grad_k, grad_values))
            grad_h = grad_h + first_accepted * torch.where(index == 0, grad_dt, grad_t)
            return (
                index,
                more_y.contiguous(),
                more_k.contiguous(),
                grad_h,
                *(a + b for a, b in zip(grads, more, strict=True)),
            )

        left = torch.zeros((), dtype=torch.int64, device=y.device) + (t.shape[0] - 1)
        zero = torch.zeros_like(y[0])
        grads = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        _, grad_y, grad_k, grad_h, *grads = loop(
            proceed, body, (left, zero, zero.clone(), torch.zeros_like(dt[0]), *grads)
        )
        pull_back: PullBack = torch.func.vjp(self.begin, y[0], *parameters)[1]
        more_y, *more = pull_back((grad_k, grad_h))
        return grad_y + more_y, *(a + b for a, b in zip(grads, more, strict=True))


class TracedSolve(TracedSteps):
    """An adaptive solve with `tableau` at tolerances rtol, atol."""

    def __init__(self, function: Function, tableau: Tableau, rtol: float, atol: float) -> None:
        self.function = function
        self.tableau = tableau
        self.rtol = rtol
        self.atol = atol
        self.dense_rows = [tuple(row) for row in tableau.dense.tolist()]

    def evaluations(self, steps: int) -> int:
        return 2 + steps * (self.tableau.num_stages - 1)

    def begin(self, y: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """`control.initial_step` without branches."""
        k = self.function(y.new_zeros(()), y, *parameters)
        scale = self.atol + y.abs() * self.rtol
        d0, d1 = _rms(y / scale), _rms(k / scale)
        is_small = (d0 < TINY_NORM) | (d1 < TINY_NORM)
        h0 = torch.where(is_small, TINY_STEP, 0.01 * d0 / torch.where(is_small, 1.0, d1))
        d2 = _rms((self.function(h0, y + h0 * k, *parameters) - k) / scale) / h0
        is_flat = (d1 <= 1e-15) & (d2 <= 1e-15)
        slope = torch.where(is_flat, 1.0, torch.where(d2 > d1, d2, d1))
        h1 = torch.where(
            is_flat, (h0 * 1e-3).clamp(min=TINY_STEP), (0.01 / slope) ** (1 / self.tableau.order)
        )
        return k, torch.minimum(100 * h0, h1).double()

    def attempt(
        self, t: Tensor, dt: Tensor, y: Tensor, k: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """End and stages of a step, and its error ratio (float64); <= 1 is accepted."""
        y1, stages = runge_kutta(self.function, self.tableau, t, dt, y, k, parameters)
        error = combine(stages, self.tableau.error, dt.to(y.dtype))
        tolerance = self.atol + self.rtol * torch.maximum(y.abs(), y1.abs())
        return y1, stages, _rms(error / tolerance).double()

    def _polynomial(self, stages: list[Tensor], dt: Tensor) -> Tensor:
        """Coefficients (3, R, M, C) of x², x³, x⁴ inside a step; those below are y and dt k_0."""
        step = dt.to(stages[0].dtype)
        return torch.stack([combine(stages, row, step) for row in self.dense_rows[1:]])

    def forward(self, y0: Tensor, times: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Solve past the last of `times`.

        Args:
            y0: (B, D, M, C) state at s = 0, real.
            times: (B, T) float64.

        Returns:
            values (B, T, D*M*C); t, dt (S+1,), y, k (S+1, R, M, C) at the start of each of S
            attempts and after the last; and (S+1,) float64, 1 for each accepted attempt and at
            the end if all times were reached.
        """
        last = times.max()
        y = y0.flatten(0, 1)
        k, step = self.begin(y, *parameters)
        start = torch.zeros_like(step)

        def can_go_on(t: Tensor, dt: Tensor) -> Tensor:
            return (t < last) & (t + dt > t)

        def proceed(t: Tensor, dt: Tensor, y: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
            return can_go_on(t, dt)

        def body(t: Tensor, dt: Tensor, y: Tensor, k: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            y1, stages, ratio = self.attempt(t, dt, y, k, *parameters)
            accepted = ratio <= 1
            floor = torch.where(ratio < 1, 1.0, MIN_GROWTH)
            growth = (SAFETY / ratio ** (1 / self.tableau.order)).maximum(floor)
            # An infinite error of a finite state shrinks the step; a non-finite state stops.
            growth = torch.where(ratio == 0, MAX_GROWTH, growth.clamp(max=MAX_GROWTH))
            can_recover = (ratio < float("inf")) | torch.isfinite(y1).all()
            return (
                torch.where(accepted, t + dt, t),
                torch.where(can_recover, dt * growth, float("nan")),
                torch.where(accepted, y1, y),
                torch.where(accepted, stages[-1], k),
                self._polynomial(stages, dt),
                accepted,
            )

        first = (start, step, y.clone(), k.clone(), y.new_zeros(3, *y.shape), start > 0)
        ends, next_steps, ys, ks, coefficients, accepted = record_loop(proceed, body, first)
        t, dt = (torch.cat((a[None], b)) for a, b in ((start, ends), (step, next_steps)))
        y_all, k_all = (torch.cat((a[None], b)) for a, b in ((y, ys), (k, ks)))

        # Rejected attempts end where they start, so the first that ends late enough is accepted.
        index = torch.searchsorted(ends, times).clamp(max=ends.shape[0] - 1)
        molecule = torch.arange(times.shape[0], device=times.device)[:, None]
        t_own, dt_own = t[index], dt[index]
        x = ((times - t_own) / ((t_own + dt_own) - t_own)).to(y.dtype)[..., None]
        batch = times.shape[0]
        y_own = y_all.view(-1, batch, y0[0].numel())[index, molecule]
        k_own = k_all.view(-1, batch, y0[0].numel())[index, molecule]
        c2, c3, c4 = (
            coefficients[:, p].reshape(-1, batch, y0[0].numel())[index, molecule] for p in range(3)
        )
        slope = dt_own.to(y.dtype)[..., None] * k_own
        values = y_own + x * (slope + x * (c2 + x * (c3 + x * c4)))
        report = torch.cat((accepted, (ends[-1:] >= last))).double()
        return values, t, dt, y_all, k_all, report

    def piece(
        self,
        times: Tensor,
        y: Tensor,
        k: Tensor,
        t: Tensor,
        dt: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y1, stages = runge_kutta(self.function, self.tableau, t, dt, y, k, parameters)
        return y1, stages[-1], self._read(times, t, dt, y, k, stages)

    def _read(
        self, times: Tensor, t: Tensor, dt: Tensor, y: Tensor, k: Tensor, stages: list[Tensor]
    ) -> Tensor:
        """Values (B, T, X) at the times inside a step, 0 at all others."""
        end = t + dt
        inside = (times > t) & (times <= end)
        x = torch.where(inside, (times - t) / (end - t), 0.0).to(y.dtype)[..., None]
        c2, c3, c4 = self._polynomial(stages, dt).view(3, times.shape[0], 1, -1)
        y, k = (a.reshape(times.shape[0], 1, -1) for a in (y, k))
        value = y + x * (dt.to(y.dtype) * k + x * (c2 + x * (c3 + x * c4)))
        read: Tensor = value * inside[..., None].to(y.dtype)
        return read
