"""An exponential moving average of a model's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class WeightAverage:
    """Average of the parameters over the last updates.

    After update n it takes in the parameters with weight 1 - min(decay, n / (n + 9)): early on
    it averages over about the last tenth of all updates, later over 1 / (1 - decay) of them.

    Args:
        model: whose parameters are averaged.
        decay: in (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = dict(model.named_parameters())
        self._average = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the parameters after update `number`, counted from 1; no host synchronisation."""
        weight = 1 - min(self.decay, number / (number + 9))
        torch._foreach_lerp_(list(self._average.values()), list(self._parameters.values()), weight)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside, and its own again after."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self._parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self._average[name])
            self._average[name].copy_(own)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by parameter name, for a checkpoint."""
        return dict(self._average)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`."""
        for name, average in self._average.items():
            average.copy_(tensors[name])
