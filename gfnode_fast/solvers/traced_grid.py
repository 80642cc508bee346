"""Fixed steps along a piece of a time grid and their adjoint, as traceable functions."""

from __future__ import annotations

import torch
from torch import Tensor

from gfnode_fast.solvers.tableau import Tableau
from gfnode_fast.solvers.traced import Function, PullBack, loop, record_loop, runge_kutta


class TracedGrid:
    """Steps of a fixed-step method; `forward` and `backward` are what is compiled."""

    def __init__(self, function: Function, tableau: Tableau) -> None:
        self.function = function
        self.tableau = tableau

    def _step(self, y: Tensor, t: Tensor, end: Tensor, *parameters: Tensor) -> Tensor:
        k = self.function(t.to(y.dtype), y, *parameters)
        return runge_kutta(self.function, self.tableau, t, end - t, y, k, parameters)[0]

    def forward(self, y: Tensor, grid: Tensor, *parameters: Tensor) -> Tensor:
        """y (R, M, C) at grid[0], grid (n+1,) float64, ascending → (n+1, R, M, C), y first."""

        def proceed(index: Tensor, y: Tensor) -> Tensor:
            return index < grid.shape[0] - 1

        def body(index: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            t, end = (grid.index_select(0, (index + i).reshape(1))[0] for i in range(2))
            return index + 1, self._step(y, t, end, *parameters).contiguous()

        index = torch.zeros((), dtype=torch.int64, device=y.device)
        return torch.cat((y[None], record_loop(proceed, body, (index, y.clone()))[1]))

    def backward(
        self, y: Tensor, grid: Tensor, grad_states: Tensor, grad_end: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of y and of the parameters; the states in between are recomputed.

        Args:
            y, grid: as in `forward`.
            grad_states: (n+1, R, M, C) gradient of what is read from each state.
            grad_end: (R, M, C) gradient of the last state from what follows.
        """
        states = self.forward(y, grid, *parameters)

        def proceed(index: Tensor, *rest: Tensor) -> Tensor:
            return index > 0

        def body(index: Tensor, grad: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
            before, here = (index - 1).reshape(1), index.reshape(1)
            start = (a.index_select(0, before)[0] for a in (states, grid))
            end = grid.index_select(0, here)[0]
            grad = grad + grad_states.index_select(0, here)[0]

            def step(y: Tensor, t: Tensor, *parameters: Tensor) -> Tensor:
                return self._step(y, t, end, *parameters)

            pull_back: PullBack = torch.func.vjp(step, *start, *parameters)[1]
            grad_y, _, *more = pull_back(grad)  # type: ignore[arg-type]
            return (
                index - 1,
                grad_y.contiguous(),
                *(a + b for a, b in zip(grads, more, strict=True)),
            )

        index = torch.zeros((), dtype=torch.int64, device=y.device) + (grid.shape[0] - 1)
        grads = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in parameters]
        return loop(proceed, body, (index, grad_end.clone(), *grads))[1:]
