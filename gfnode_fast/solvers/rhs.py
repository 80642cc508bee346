"""Right-hand sides dy/ds = g(s, y) as the solvers see them, and their replay for the discrete
adjoint.

A state y is (R, M, C): R rows (a molecule, or one Cartesian component of it), M modes, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gfnode_fast.solvers.transfers import to_device

Forcing = Callable[..., Tensor]
"""(s (n,), *parameters) → (n, M, C): what the time embedding adds to dy/ds at n times."""


class Tape(Protocol):
    """Evaluations of one right-hand side during a backward pass, each pulled back later."""

    def evaluate(self, s: float, y: Tensor) -> tuple[Tensor, int]:
        """g(s, y) and the evaluation's number."""

    def pull_back(self, number: int, grad: Tensor) -> Tensor:
        """The gradient with respect to that evaluation's y; parameters' gradients accumulate."""

    def flush(self) -> None:
        """Drop stored evaluations; all of them have been pulled back or never will be."""

    def finish(self) -> tuple[Sequence[Tensor | None], dict[int, Tensor]]:
        """Parameter gradients in order, and the derivative with respect to s of each evaluation,
        0-dim float64.
        """


class RightHandSide(Protocol):
    """dy/ds = g(s, y)."""

    parameters: tuple[Tensor, ...]
    published: Callable[[Tensor, Tensor], Tensor]
    """The reference's own function of (s, y (M, R, C)), whose rounding decides the steps."""

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        """s, 0-dim or (R,) with a time per row, y (R, M, C) → (R, M, C), differentiable."""

    def bind(self, parameters: Sequence[Tensor]) -> RightHandSide:
        """The same right-hand side with other parameters."""

    def tape(self, parameters: Sequence[Tensor], *, wants_time: bool) -> Tape:
        """A tape over detached `parameters`; `wants_time`: whether derivatives in s are needed."""


class LinearRHS:
    """dy_m/ds = y_m W_m + forcing(s): no mixing of modes, so linear, or affine with a time
    embedding.

    Args:
        weight: (M, C, C), real or complex; modes are multiplied from the left, y @ W.
        forcing: what the time embedding adds, or None; called with its own parameters.
        forcing_parameters: differentiable inputs of `forcing`.
        is_proportional: whether the forcing is s times a constant.
    """

    def __init__(
        self,
        published: Callable[[Tensor, Tensor], Tensor],
        weight: Tensor,
        forcing: Forcing | None = None,
        forcing_parameters: tuple[Tensor, ...] = (),
        *,
        is_proportional: bool = False,
    ) -> None:
        self.published = published
        self.weight = weight
        self.forcing = forcing
        self.is_proportional = is_proportional
        self.parameters = (weight, *forcing_parameters)

    def slope(self) -> Tensor | None:
        """b (M, C) of a forcing s b; None if there is no forcing or another one."""
        if self.forcing is None or not self.is_proportional:
            return None
        return self.forcing(self.weight.new_ones(1), *self.parameters[1:])[0].contiguous()

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        product = torch.bmm(y.transpose(0, 1), self.weight).transpose(0, 1)
        if self.forcing is None:
            return product
        return product + self.forcing(s.reshape(-1), *self.parameters[1:])

    def bind(self, parameters: Sequence[Tensor]) -> LinearRHS:
        return LinearRHS(
            self.published,
            parameters[0],
            self.forcing,
            tuple(parameters[1:]),
            is_proportional=self.is_proportional,
        )

    def tape(self, parameters: Sequence[Tensor], *, wants_time: bool) -> Tape:
        return _LinearTape(self, parameters, wants_time)


class _LinearTape:
    def __init__(self, rhs: LinearRHS, parameters: Sequence[Tensor], wants_time: bool) -> None:
        self.weight, *self.forcing_parameters = parameters
        self.forcing = rhs.forcing
        self.wants_time = wants_time
        self.adjoint_weight = self.weight.mH
        self.grad_weight = torch.zeros_like(self.weight)
        self.times: list[float] = []
        self.states: dict[int, Tensor] = {}
        self.pulled: list[tuple[Tensor, Tensor]] = []
        self.forced: dict[int, Tensor] = {}

    def _scalar(self, s: Sequence[float]) -> Tensor:
        real = self.weight.real.dtype if self.weight.is_complex() else self.weight.dtype
        return to_device(torch.tensor(s, dtype=torch.float64), self.weight.device).to(real)

    def evaluate(self, s: float, y: Tensor) -> tuple[Tensor, int]:
        number = len(self.times)
        self.times.append(s)
        self.states[number] = y
        k = torch.bmm(y.transpose(0, 1), self.weight).transpose(0, 1)
        if self.forcing is not None:
            k = k + self.forcing(self._scalar([s]), *self.forcing_parameters)
        return k, number

    def pull_back(self, number: int, grad: Tensor) -> Tensor:
        self.pulled.append((self.states[number], grad))
        if self.forcing is not None:
            self.forced[number] = grad.sum(dim=0)
        return torch.bmm(grad.transpose(0, 1), self.adjoint_weight).transpose(0, 1)

    def flush(self) -> None:
        if self.pulled:
            y = torch.cat([state for state, _ in self.pulled])
            grad = torch.cat([grad for _, grad in self.pulled])
            self.grad_weight += torch.bmm(y.permute(1, 2, 0).conj(), grad.transpose(0, 1))
        self.pulled.clear()
        self.states.clear()

    def finish(self) -> tuple[Sequence[Tensor | None], dict[int, Tensor]]:
        self.flush()
        if self.forcing is None or not self.forced:
            return [self.grad_weight, *(None for _ in self.forcing_parameters)], {}
        numbers = list(self.forced)
        s = self._scalar([self.times[n] for n in numbers]).requires_grad_(self.wants_time)
        parameters = [p.detach().requires_grad_() for p in self.forcing_parameters]
        with torch.enable_grad():
            value = self.forcing(s, *parameters)
        wanted = [*parameters, s] if self.wants_time else parameters
        grads = torch.autograd.grad(
            value, wanted, torch.stack([self.forced[n] for n in numbers]), allow_unused=True
        )
        grad_s: dict[int, Tensor] = {}
        if self.wants_time and grads[-1] is not None:
            grad_s = dict(zip(numbers, grads[-1].double().unbind(), strict=True))
        return [self.grad_weight, *grads[: len(parameters)]], grad_s


class GeneralRHS:
    """Any differentiable g(s, y, *parameters), pulled back by autograd, one evaluation at a
    time.
    """

    def __init__(
        self,
        published: Callable[[Tensor, Tensor], Tensor],
        function: Callable[..., Tensor],
        parameters: tuple[Tensor, ...],
    ) -> None:
        self.published = published
        self.function = function
        self.parameters = parameters

    def __call__(self, s: Tensor, y: Tensor) -> Tensor:
        return self.function(s, y, *self.parameters)

    def bind(self, parameters: Sequence[Tensor]) -> GeneralRHS:
        return GeneralRHS(self.published, self.function, tuple(parameters))

    def tape(self, parameters: Sequence[Tensor], *, wants_time: bool) -> Tape:
        return _AutogradTape(self, parameters, wants_time)


class _AutogradTape:
    def __init__(self, rhs: GeneralRHS, parameters: Sequence[Tensor], wants_time: bool) -> None:
        self.function = rhs.function
        self.parameters = [p.detach().requires_grad_() for p in parameters]
        self.wants_time = wants_time
        self.grads: list[Tensor | None] = [None] * len(self.parameters)
        self.count = 0
        self.stored: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.grad_s: dict[int, Tensor] = {}

    def evaluate(self, s: float, y: Tensor) -> tuple[Tensor, int]:
        number, self.count = self.count, self.count + 1
        real = y.real.dtype if y.is_complex() else y.dtype
        leaf_s = torch.full((), s, dtype=torch.float64, device=y.device).to(real)
        leaf_s.requires_grad_(self.wants_time)
        leaf_y = y.detach().requires_grad_()
        with torch.enable_grad():
            k = self.function(leaf_s, leaf_y, *self.parameters)
        self.stored[number] = (leaf_s, leaf_y, k)
        return k.detach(), number

    def pull_back(self, number: int, grad: Tensor) -> Tensor:
        leaf_s, leaf_y, k = self.stored.pop(number)
        wanted = [leaf_y, *self.parameters, *([leaf_s] if self.wants_time else [])]
        grads = torch.autograd.grad(k, wanted, grad, allow_unused=True)
        for i, g in enumerate(grads[1 : 1 + len(self.parameters)]):
            if g is not None:
                mine = self.grads[i]
                self.grads[i] = g if mine is None else mine + g
        if self.wants_time and grads[-1] is not None:
            self.grad_s[number] = grads[-1].double()
        grad_y: Tensor = grads[0]
        return grad_y

    def flush(self) -> None:
        self.stored.clear()

    def finish(self) -> tuple[Sequence[Tensor | None], dict[int, Tensor]]:
        self.flush()
        return self.grads, self.grad_s
