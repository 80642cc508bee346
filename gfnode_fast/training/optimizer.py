"""Adam that can leave out an update without asking the host."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gfnode_fast.training.config import OptimConfig

PUBLISHED_BATCH = 50


class GuardedAdam(torch.optim.Adam):
    """Adam (fused), whose update is skipped on the device where ``found_inf`` is 1.

    ``found_inf`` is the attribute through which torch's gradient scaler skips updates: neither
    the parameters, nor the moments, nor the step counts change then, and nothing is copied to
    the host to decide it. ``None`` always updates. On a GPU it can be part of a CUDA graph.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        decoupled: bool = False,
    ) -> None:
        parameters = list(parameters)
        super().__init__(
            parameters,
            lr=lr,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled,
            capturable=parameters[0].is_cuda,
            fused=True,
        )

    def guarded_step(self, ok: Tensor) -> None:
        """Update where ``ok`` (0-dim bool on the parameters' device) is true."""
        self.found_inf = (~ok).to(torch.float32)
        self.step()

    def set_lr(self, lr: float) -> None:
        """Use this rate from now on."""
        for group in self.param_groups:
            group["lr"] = lr


def learning_rate(optim: OptimConfig, step: int, epoch: int) -> float:
    """The rate of an update: scaled with the batch, warmed up by step, decayed by epoch.

    Args:
        optim: names the rate at PUBLISHED_BATCH, the schedule and the scaling.
        step, epoch: updates and passes made before it.
    """
    larger = optim.batch_size / PUBLISHED_BATCH
    scale = {"none": 1.0, "linear": larger, "sqrt": math.sqrt(larger)}[optim.lr_scaling]
    warm = min(1.0, (step + 1) / optim.warmup_steps) if optim.warmup_steps else 1.0
    decay = math.pow(optim.lr_gamma, epoch // optim.lr_step_epochs)
    return optim.lr * scale * warm * decay


def clip_to_norm(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of this total norm in place so that it is at most the limit."""
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``index.name`` tensors."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": tensor for i, entry in state.items() for name, tensor in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of :func:`optimizer_tensors`; rates and other options stay the optimiser's own."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
