"""One optimisation step: parts of a batch, loss, gradients over the ranks, guarded update."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data import WindowDataset
from gfnode_fast.nn import FourierMD
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.training.averaging import WeightAverage
from gfnode_fast.training.checkpoint import Checkpoint
from gfnode_fast.training.config import TrainConfig
from gfnode_fast.training.events import NonFiniteLossError
from gfnode_fast.training.optimizer import (
    GuardedAdam,
    clip_to_norm,
    learning_rate,
    optimizer_groups,
    optimizer_tensors,
    restore_optimizer,
)
from gfnode_fast.training.ranks import Ranks


def derived_seed(*numbers: int) -> int:
    """A seed that is a function of all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


class BatchStep:
    """`step(index, number, epoch)`: one update; nothing is read from the device until `read`.

    Attributes:
        optimizer: of the model's parameters.
        average: of the weights, or None.
    """

    def __init__(
        self, config: TrainConfig, model: FourierMD, data: WindowDataset, ranks: Ranks
    ) -> None:
        optim = config.optim
        self._config, self._model, self._data, self._ranks = config, model, data, ranks
        self.optimizer = GuardedAdam(
            model.parameters(),
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            decoupled=optim.optimizer == "adamw",
        )
        self.average = WeightAverage(model, optim.ema_decay) if optim.ema_decay else None
        # Loss and gradient norm of the steps since the last reading, by number % log_every.
        self._readings = next(model.parameters()).new_zeros(config.log_every, 2).detach()

    def __call__(self, index: Tensor, number: int, epoch: int) -> None:
        """Update on a batch of windows.

        Args:
            index: (B,) windows, on the data's device; the same on every rank.
            number, epoch: steps and passes made before.
        """
        optim = self._config.optim
        if self._ranks.count > 1 and self._config.model.use_vae:
            torch.manual_seed(derived_seed(optim.seed, number, self._ranks.rank))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._readings.new_zeros(())
        for part, weight in self._parts(index):
            share = self._loss(part, number) * weight
            share.backward()
            loss += share.detach()
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._ranks.sum([loss, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        if optim.clip_norm is not None:
            clip_to_norm(gradients, norm, optim.clip_norm)
        reading = torch.stack((loss, norm))
        self.optimizer.set_lr(learning_rate(optim, number, epoch))
        self.optimizer.guarded_step(torch.isfinite(reading).all())
        self._readings[number % len(self._readings)] = reading
        if self.average is not None:
            self.average.update(number + 1)

    def _parts(self, index: Tensor) -> list[tuple[Tensor, float]]:
        """What this rank runs of a batch, one after the other, and the weight of each part."""
        own = self._ranks.share(index)
        if len(own) == 0:  # gradients are summed over the ranks: one window, which does not count
            return [(index[:1], 0.0)]
        parts = own.tensor_split(min(self._config.optim.accumulate, len(own)))
        return [(part, len(part) / len(index)) for part in parts]

    def _loss(self, index: Tensor, number: int) -> Tensor:
        batch = self._data.batch(index)
        with naming_failed_solves(self._config, f"at step {number + 1}"):
            predicted, _, _, kld = self._model(**batch.inputs())
        loss: Tensor = (predicted - batch.target).square().mean()
        if self._config.model.use_vae:
            loss = loss + self._config.optim.kl_weight * kld
        return loss

    def read(self, made: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Loss and gradient norm, (steps, 2), since the last multiple of ``log_every``.

        Args:
            made: steps made so far.

        Raises:
            NonFiniteLossError: one of them is not finite.
        """
        count = made % len(self._readings)
        if count == 0 and made > 0:
            count = len(self._readings)
        values = self._readings[:count].double().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
        if len(bad):
            step = made - count + int(bad[0]) + 1
            loss, norm = values[bad[0]]
            raise NonFiniteLossError(
                f"train: `loss` must be finite, got {loss} (gradient norm {norm}) at step {step}; "
                f"that update was left out and the run stopped; {_advice(self._config)}"
            )
        return values

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next steps depend on besides model and random state."""
        moments = optimizer_tensors(self.optimizer)
        tensors = {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        tensors["readings"] = self._readings
        if self.average is not None:
            tensors |= {f"average.{k}": t for k, t in self.average.tensors().items()}
        return tensors

    def groups(self) -> list[dict[str, Any]]:
        """The optimiser's parameter groups, for the checkpoint's manifest."""
        return optimizer_groups(self.optimizer)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `tensors` and `groups`, from the checkpoint that they were written to."""
        restore_optimizer(
            self.optimizer,
            checkpoint.section("optimizer"),
            checkpoint.manifest["optimizer_groups"],
        )
        if self.average is not None:
            self.average.restore(checkpoint.section("average"))
        self._readings.copy_(checkpoint.state["readings"])


@contextlib.contextmanager
def naming_failed_solves(config: TrainConfig, where: str) -> Iterator[None]:
    """Raise a solver's failure as a NonFiniteLossError that says where in the run it was."""
    try:
        yield
    # AssertionError: torchdiffeq's word for a step size that is 0 or NaN.
    except (SolverError, AssertionError) as error:
        raise NonFiniteLossError(
            f"train: `loss` must be finite, got a failed ODE solve ({error}) {where}; "
            f"{_advice(config)}"
        ) from error


def _advice(config: TrainConfig) -> str:
    return (
        f"lower optim.lr or check the data. The last good checkpoint is "
        f"{Path(config.output) / 'last.json'}"
    )
