"""U1: the reference with each molecule's own times and list + stack instead of in-place writes.

Nothing else differs from U0. The solver is torchdiffeq's own, driven step by step: the accepted
steps do not depend on the output times, so the T own times of every molecule are read from the
interpolants, where U0 reads all united times for all molecules.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchdiffeq._impl.misc import _check_inputs
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver

from gfnode_fast import reference
from gfnode_fast.reference.propagator import ModeODE, Propagator


class OwnTimesODE(ModeODE):
    """`ModeODE` without the union: y0 (M, B, D, C), s (B, T) → (T, B, M, D, C).

    Raises:
        NotImplementedError: a fixed-step solver, whose step grid is the union itself.
    """

    def forward(self, y0: Tensor, s: Tensor) -> Tensor:
        if self.no_ode:
            return super().forward(y0, s)
        num_modes, batch, components, channels = y0.shape
        state = y0.reshape(num_modes, batch * components, channels)
        starts, ends, coefficients = self._solve(state, s)
        polynomials = torch.stack([torch.stack(c) for c in coefficients])  # (S, 5, M, B*D, C)
        polynomials = polynomials.view(*polynomials.shape[:2], *y0.shape)
        start, end = torch.stack(starts), torch.stack(ends)
        times = s.to(end.dtype)
        step = torch.searchsorted(end.detach(), times)  # (B, T): first step that ends at or after
        molecule = torch.arange(batch, device=s.device)
        solution = []
        for t in range(s.shape[1]):
            k = step[:, t]
            x = ((times[:, t] - start[k]) / (end[k] - start[k])).to(y0.real.dtype)
            solution.append(evaluate(polynomials[k, :, :, molecule], x))
        return torch.stack(solution)

    def _solve(
        self, state: Tensor, s: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[list[Tensor]]]:
        """Start, end and interpolant of each accepted step up to the last requested time."""
        span = torch.stack((torch.zeros_like(s[0, 0]), s.max()))
        _, func, state, span, rtol, atol, method, options, _, _ = _check_inputs(
            self.ode_func, state, span, self.rtol, self.atol, self.solver, None, None, SOLVERS
        )
        if not issubclass(SOLVERS[method], RKAdaptiveStepsizeODESolver):
            raise NotImplementedError(f"U1 has adaptive Runge-Kutta solvers only, got {method!r}")
        solver = SOLVERS[method](func=func, y0=state, rtol=rtol, atol=atol, **options)
        span = span.to(solver.dtype)
        solver._before_integrate(span)
        starts, ends, coefficients = [], [], []
        while span[1] > solver.rk_state.t1:
            before = solver.rk_state.t1
            solver.rk_state = solver._adaptive_step(solver.rk_state)
            if solver.rk_state.t1 > before:  # accepted
                starts.append(solver.rk_state.t0)
                ends.append(solver.rk_state.t1)
                coefficients.append(solver.rk_state.interp_coeff)
        return starts, ends, coefficients


def evaluate(polynomial: Tensor, x: Tensor) -> Tensor:
    """Coefficients (B, 5, M, D, C) in ascending order at x (B,), summed in torchdiffeq's order."""
    x = x.view(-1, 1, 1, 1)
    total = polynomial[:, 0] + x * polynomial[:, 1]
    power = x
    for i in range(2, polynomial.shape[1]):
        power = power * x
        total = total + power * polynomial[:, i]
    return total


class FourierMD(reference.FourierMD):
    """The reference model with `OwnTimesODE` in its propagators."""

    def _propagator(self, channels: int) -> Propagator:
        propagator = super()._propagator(channels)
        ode = propagator.t_conv
        propagator.t_conv = OwnTimesODE(
            ode.ode_func, solver=ode.solver, rtol=ode.rtol, atol=ode.atol, no_ode=ode.no_ode
        )
        return propagator
