"""An optimizer's tensors held in place, for a CUDA graph that has their addresses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

UNCHANGEABLE = ("betas", "eps", "weight_decay", "amsgrad", "maximize")


class Snapshot:
    """Values of an optimizer's parameters and state, to put back after warming up."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = _parameters(optimizer)
        self.values = [p.detach().clone() for p in self.parameters]
        self.state = [
            {k: v.clone() for k, v in optimizer.state.get(p, {}).items() if isinstance(v, Tensor)}
            for p in self.parameters
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the values into the tensors there are now; state made since becomes 0, which is
        where Adam starts.
        """
        for p, value, saved in zip(self.parameters, self.values, self.state, strict=True):
            p.copy_(value)
            p.grad = None
            for name, tensor in self.optimizer.state.get(p, {}).items():
                if name in saved:
                    tensor.copy_(saved[name])
                else:
                    tensor.zero_()


class StaticOptimizer:
    """Keeps what a graph reads and writes of an Adam optimizer where it is.

    Learning rates become tensors. Later assignments to them, and state that was loaded, are copied
    into the tensors of the graph.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters = _parameters(optimizer)
        device = self.parameters[0].device
        self.rates = []
        for group in optimizer.param_groups:
            rate = torch.as_tensor(group["lr"], dtype=torch.float32, device=device).clone()
            group["lr"] = rate
            self.rates.append(rate)
        self.fixed = [_fixed(group) for group in optimizer.param_groups]
        self.places: list[tuple[int, int]] = []
        self.state: list[dict[str, Tensor]] = []

    def freeze(self) -> None:
        """Take the tensors there are now as those of the graph."""
        self.places = [_place(p) for p in self.parameters]
        self.state = [dict(self.optimizer.state[p]) for p in self.parameters]

    @torch.no_grad()
    def gather(self) -> None:
        """Copy what has been assigned or loaded since into the tensors of the graph.

        Raises:
            RuntimeError: something that the graph holds as a number or an address has changed.
        """
        groups = self.optimizer.param_groups
        if [_place(p) for p in _parameters(self.optimizer)] != self.places:
            raise _changed("model", "the parameters that were captured, in place", "others")
        for group, rate, fixed in zip(groups, self.rates, self.fixed, strict=True):
            for name, value in _fixed(group).items():
                if value != fixed[name]:
                    raise _changed("optimizer", f"of {name} {fixed[name]}", repr(value))
            if group["lr"] is not rate:
                if isinstance(group["lr"], Tensor):
                    rate.copy_(group["lr"])
                else:
                    rate.fill_(group["lr"])  # a launch; a copy from the host would wait for the GPU
                group["lr"] = rate
        for p, static in zip(self.parameters, self.state, strict=True):
            current = self.optimizer.state[p]
            for name, tensor in static.items():
                value = current.get(name)
                if value is None:
                    tensor.zero_()
                elif value is not tensor:
                    tensor.copy_(value)
                current[name] = tensor


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _place(parameter: Tensor) -> tuple[int, int]:
    """Which parameter, and where its values are."""
    return id(parameter), parameter.data_ptr()


def _fixed(group: dict[str, Any]) -> dict[str, Any]:
    return {name: group[name] for name in UNCHANGEABLE if name in group}


def _changed(argument: str, expected: str, got: str) -> RuntimeError:
    return RuntimeError(
        f"capture_training_step: `{argument}` must be {expected}, got {got} since; capture again"
    )
