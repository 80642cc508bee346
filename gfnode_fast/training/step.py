"""One optimisation step: parts of a batch, loss, gradients over the ranks, guarded update."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.data import MixedDataset, WindowDataset
from gfnode_fast.nn import FourierMD
from gfnode_fast.nn.capture import TrainingStep, capture_training_step, why_not_capturable
from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.training.averaging import WeightAverage
from gfnode_fast.training.break_even import BreakEven, measure_break_even
from gfnode_fast.training.checkpoint import Checkpoint
from gfnode_fast.training.config import ConfigError, TrainConfig
from gfnode_fast.training.events import NonFiniteLossError
from gfnode_fast.training.optimizer import (
    GuardedAdam,
    clip_to_norm,
    learning_rate,
    optimizer_tensors,
    restore_optimizer,
)
from gfnode_fast.training.order import derived_seed
from gfnode_fast.training.problem import forked_random_state
from gfnode_fast.training.ranks import Ranks


class BatchStep:
    """`step(index, number, epoch)`: one update; nothing is read from the device until `read`.

    Args:
        config: of the run.
        model: on the data's device.
        data: the training windows.
        ranks: the processes of the run.

    Attributes:
        average: of the weights, or None.

    Raises:
        ConfigError: ``capture`` of a step that cannot be captured.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: FourierMD,
        data: WindowDataset | MixedDataset,
        ranks: Ranks,
    ) -> None:
        optim = config.optim
        self._config, self._model, self._data, self._ranks = config, model, data, ranks
        self._optimizer = GuardedAdam(
            model.parameters(),
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            decoupled=optim.optimizer == "adamw",
        )
        self.average = WeightAverage(model, optim.ema_decay) if optim.ema_decay else None
        parameter = next(model.parameters()).detach()
        # Loss and gradient norm: of the steps since the last reading, by number % log_every, and
        # of the last step, where a captured one leaves them.
        self._readings = parameter.new_zeros(config.log_every, 2)
        self._reading = parameter.new_zeros(2)
        self._full_batch = min(optim.batch_size, len(data))
        self._captured: TrainingStep | None = None
        if config.capture:
            _check_capture(model, ranks)

    def __call__(self, index: Tensor, number: int, epoch: int) -> None:
        """Update on a batch of windows.

        Args:
            index: (B,) windows, on the data's `index_device`; the same on every rank.
            number, epoch: steps and passes made before.
        """
        optim, where = self._config.optim, f"at step {number + 1}"
        if self._ranks.count > 1 and self._config.model.use_vae:
            torch.manual_seed(derived_seed(optim.seed, number, self._ranks.rank))
        self._optimizer.set_lr(learning_rate(optim, number, epoch))
        if self._config.capture and len(index) == self._full_batch:
            self._run_captured(index, where)
        else:
            self._update(self._gradients(index, where))
        self._readings[number % len(self._readings)] = self._reading
        if self.average is not None:
            self.average.update(number + 1)

    def break_even(self) -> BreakEven:
        """Compile the solves of ``backend="compiled"`` now; time what that costs and saves.

        Forward and backward of one batch are run several times and thrown away: parameters,
        optimiser and random state, and with them the run, are what they would be without.
        """
        device = self._reading.device
        index = torch.arange(self._full_batch, device=self._data.index_device)
        index = index * len(self._data) // self._full_batch  # of all molecules
        with forked_random_state(device):
            found = measure_break_even(
                self._model, lambda: self._gradients(index, "in the step that is timed")
            )
        self._optimizer.zero_grad(set_to_none=True)
        return found

    def _gradients(self, index: Tensor, where: str) -> Tensor:
        """Run a batch forward and backward; the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._reading.new_zeros(())
        for part, weight in self._parts(index):
            batch = self._data.batch(part)
            with naming_failed_solves(self._config, where):
                outputs = self._model(**batch.inputs())
            share = self._with_divergence(batch.loss(outputs[0]), outputs[3]) * weight
            share.backward()
            loss += share.detach()
        return loss

    def _run_captured(self, index: Tensor, where: str) -> None:
        batch = self._data.batch(index)
        inputs = batch.inputs()
        with naming_failed_solves(self._config, where):
            if self._captured is None:
                self._captured = capture_training_step(
                    self._model,
                    self._optimizer,
                    loss_fn=self._loss,
                    inputs=inputs,
                    targets=(batch.target,),
                    update=self._update,
                )
            self._captured(inputs, batch.target)

    def _parts(self, index: Tensor) -> list[tuple[Tensor, float]]:
        """What this rank runs of a batch, one after the other, and the weight of each part."""
        own = self._ranks.share(index)
        if len(own) == 0:  # gradients are summed over the ranks: one window, which does not count
            return [(index[:1], 0.0)]
        parts = own.tensor_split(min(self._config.optim.accumulate, len(own)))
        return [(part, len(part) / len(index)) for part in parts]

    def _loss(self, outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Of a captured step, which has the batch's tensors alone."""
        return self._with_divergence((outputs[0] - target).square().mean(), outputs[3])

    def _with_divergence(self, loss: Tensor, kld: Tensor) -> Tensor:
        if self._config.model.use_vae:
            loss = loss + self._config.optim.kl_weight * kld
        return loss

    def _update(self, loss: Tensor) -> None:
        """From the batch's loss and gradients on this rank to new weights; may be captured."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        self._ranks.sum([loss, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._config.optim.clip_norm is not None:
            clip_to_norm(gradients, norm, self._config.optim.clip_norm)
        torch.stack((loss, norm), out=self._reading)
        self._optimizer.guarded_step(torch.isfinite(self._reading).all())

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
        moments = optimizer_tensors(self._optimizer)
        tensors = {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        tensors["readings"] = self._readings
        if self.average is not None:
            tensors |= {f"average.{k}": t for k, t in self.average.tensors().items()}
        return tensors

    def restore(self, checkpoint: Checkpoint) -> None:
        """Inverse of `tensors`, from the checkpoint that they were written to.

        Raises:
            CheckpointError: it holds tensors of another run.
        """
        expected = self.tensors()
        for k, parameter in enumerate(self._model.parameters()):
            own = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            own = {f"optimizer.{k}.{name}": tensor for name, tensor in own.items()}
            # None yet before the first step, or without a gradient.
            if not own.keys().isdisjoint(checkpoint.state):
                expected |= own
        checkpoint.check("state", expected)
        restore_optimizer(self._optimizer, checkpoint.section("optimizer"))
        if self.average is not None:
            self.average.restore(checkpoint.section("average"))
        self._readings.copy_(checkpoint.state["readings"])


def _check_capture(model: FourierMD, ranks: Ranks) -> None:
    problem = None
    if ranks.count > 1:
        problem = (
            f"{ranks.count} processes, whose gradients are added up between backward and update"
        )
    elif next(model.parameters()).is_cuda and (reads := why_not_capturable(model)):
        problem = reads
    if problem is not None:
        raise ConfigError(
            f"train: `capture` must be false with this run, got true and {problem}; leave it out, "
            "or take model.backend=triton in one process"
        )


@contextlib.contextmanager
def naming_failed_solves(config: TrainConfig, where: str) -> Iterator[None]:
    """Raise a solver's failure as a NonFiniteLossError that says where in the run it was."""
    try:
        yield
    except (SolverError, AssertionError) as error:
        if isinstance(error, AssertionError) and not _is_torchdiffeqs(error):
            raise
        raise NonFiniteLossError(
            f"train: `loss` must be finite, got a failed ODE solve ({error}) {where}; "
            f"{_advice(config)}"
        ) from error


def _is_torchdiffeqs(error: AssertionError) -> bool:
    """Whether torchdiffeq asserted that a step advances time, or that its state is finite."""
    raised = list(traceback.walk_tb(error.__traceback__))[-1][0]
    return raised.f_globals.get("__name__") == "torchdiffeq._impl.rk_common" and str(
        error
    ).startswith(("underflow in dt", "non-finite values in state"))


def _advice(config: TrainConfig) -> str:
    return (
        f"lower optim.lr or check the data. The last good checkpoint is "
        f"{Path(config.output) / 'last.json'}"
    )
