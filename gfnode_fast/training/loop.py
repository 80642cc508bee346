"""A training run: position, epochs, exact resume, validation and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.training.checkpoint import (
    Checkpoint,
    read_checkpoint,
    write_checkpoint,
    write_json,
)
from gfnode_fast.training.config import (
    ConfigError,
    TrainConfig,
    config_from_dict,
    config_to_dict,
    differences,
)
from gfnode_fast.training.events import (
    Callback,
    EventKind,
    Status,
    TrainEvent,
    TrainResult,
)
from gfnode_fast.training.interruption import interruptions
from gfnode_fast.training.metrics import MetricsLog, molecule_columns
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.optimizer import learning_rate
from gfnode_fast.training.order import epoch_order
from gfnode_fast.training.problem import (
    build_model,
    forked_random_state,
    resolve_device,
    torch_dtype,
)
from gfnode_fast.training.ranks import Ranks, joined_ranks, local_device
from gfnode_fast.training.step import BatchStep, naming_failed_solves
from gfnode_fast.training.validation import mean_squared_errors

logger = logging.getLogger(__name__)


@dataclass
class _Position:
    """Where a run stands: everything that counts, and nothing that is a tensor."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    best_mse: float | None = None
    best_epoch: int | None = None
    stale: int = 0
    seconds: float = 0.0
    rows: int = 0


def train(
    config: TrainConfig, *, resume: bool = False, progress: Callback | None = None
) -> TrainResult:
    """Train a model; the loss is the mean squared error of the positions over atoms and times.

    With ``data.molecules`` one model, a GFNODE, learns from batches that mix them. Every window of
    a batch, and of a validation, counts the same, whatever the size of its molecule; so "best" is
    the lowest mean over all validation windows, and ``val_size`` of a molecule is its weight in it.

    Under ``torchrun`` the processes share every batch (`gfnode_fast.training.ranks`): the same run
    as in one process, to rounding and, with joint steps, the solver's tolerance. Rank 0 writes.
    A run may be resumed by another number of processes.

    SIGINT and SIGTERM (when called from the main thread) end the run after the current step with
    a "last" checkpoint; a second one is handled as if this function were not there.

    Args:
        config: the run.
        resume: go on from ``config.output/last.json``. On the CPU an interrupted and resumed run
            equals an uninterrupted one bit for bit (same machine, versions and thread count; a
            warning is logged where torch's version or its thread count changed).
        progress: called with a :class:`TrainEvent`; nothing is printed here.

    Raises:
        ConfigError: a value that cannot be used; an output directory that already holds a run;
            on resume, a configuration that differs (``output``, ``max_steps``, ``max_seconds``,
            ``checkpoint_every`` and ``tensorboard`` may).
        CheckpointError: on resume, a missing or damaged checkpoint, or changed data.
        WriteError: a full disk, or no permission. The last checkpoint stands; resume from it.
        NonFiniteLossError: the loss or its gradient was not finite. The update of that step was
            left out and no checkpoint has been written since.
        PeerLostError: another rank ended.
    """
    output = Path(config.output)
    if not resume and (output / "last.json").exists():
        raise ConfigError(
            f"train: `output` must not hold a run already, got {config.output!r}; "
            "resume it or choose another directory"
        )
    checkpoint = _read_resumable(config) if resume else None
    device = resolve_device(local_device(config.device))
    # What names no device, such as pinned memory and the start of NCCL, is then not on GPU 0.
    current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with (
        current,
        forked_random_state(device),
        interruptions() as interrupted,
        joined_ranks(device) as ranks,
    ):
        ranks.wait(device)  # until all have looked for an earlier run
        run = _Run(config, device, ranks, checkpoint, interrupted, progress)
        with contextlib.closing(run.metrics) if run.metrics else contextlib.nullcontext():
            return run.run()


class _Run:
    """One call of :func:`train`."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        ranks: Ranks,
        checkpoint: Checkpoint | None,
        interrupted: threading.Event,
        progress: Callback | None,
    ) -> None:
        self.config, self.device, self.ranks = config, device, ranks
        self.interrupted, self.progress = interrupted, progress
        self.output = Path(config.output)
        self.molecules = Molecules(config, checkpoint)
        dtype = torch_dtype(config)
        self.train_set = self.molecules.dataset("train", dtype=dtype, device=device)
        self.val_set = self.molecules.dataset("val", dtype=dtype, device=device)
        torch.manual_seed(config.optim.seed)
        self.model = build_model(config, self.molecules.num_atoms).to(device, dtype)
        self.step = BatchStep(config, self.model, self.train_set, ranks)
        self.position = _Position()
        if checkpoint is not None:
            self._restore(checkpoint)
        elif ranks.is_first:
            self.molecules.warn_if_modes_cut()
        self.metrics = self._begin_files() if ranks.is_first else None
        self.batches_per_epoch = -(-len(self.train_set) // config.optim.batch_size)
        self.total_steps = config.optim.epochs * self.batches_per_epoch
        if config.max_steps is not None:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.started = time.perf_counter()
        self.seconds_before, self.steps_before = self.position.seconds, self.position.step

    def _begin_files(self) -> MetricsLog:
        self.output.mkdir(parents=True, exist_ok=True)
        metrics = MetricsLog(
            self.output,
            keep_rows=self.position.rows,
            tensorboard=self.config.tensorboard,
            molecules=self.molecules.names,
        )
        write_json(self.output / "config.json", config_to_dict(self.config))
        self.molecules.save_windows(self.output)
        return metrics

    def run(self) -> TrainResult:
        self._tell("start")
        if self.position.step == 0:
            self._save("last")
        self._compile()
        status = self._loop()
        self._check_readings()
        self._save("last")
        self._tell("end")
        position = self.position
        return TrainResult(
            status,
            self.output,
            position.step,
            position.epoch,
            position.best_mse,
            position.best_epoch,
            position.seconds - self.seconds_before,
            position.seconds,
        )

    def _compile(self) -> None:
        """Compile before the first step, where the model does, and say whether it pays back."""
        to_go = self.total_steps - self.position.step
        if self.model.backend != "compiled" or to_go <= 0:
            return
        self._tell("compile", note="compiling the solves; the first time this takes minutes")
        found = self.step.break_even()
        self._tell("compile", dataclasses.asdict(found), note=found.sentence(to_go))

    def _loop(self) -> Status:
        optim, position = self.config.optim, self.position
        while position.epoch < optim.epochs and not self._stale():
            order = epoch_order(
                optim.seed,
                position.epoch,
                self.train_set.counts,
                self.config.data.sampling_temperature,
            )
            batches = order.to(self.train_set.index_device).split(optim.batch_size)
            while position.batch < len(batches):
                reason = self._reason_to_stop()
                if reason is not None:
                    return reason
                self._step(batches[position.batch])
            position.epoch, position.batch = position.epoch + 1, 0
            if position.epoch % optim.validate_every == 0 or position.epoch == optim.epochs:
                self._validate()
            if position.epoch % self.config.checkpoint_every == 0:
                self._check_readings()
                self._save("last")
        return "early_stopped" if self._stale() else "completed"

    def _stale(self) -> bool:
        patience = self.config.optim.patience
        return patience is not None and self.position.stale >= patience

    def _reason_to_stop(self) -> Status | None:
        config = self.config
        if config.max_steps is not None and self.position.step >= config.max_steps:
            return "max_steps"
        # Several ranks must agree, and do so where losses are read anyway.
        if self.ranks.count > 1 and self.position.step % config.log_every:
            return None
        if self.ranks.any(self.interrupted.is_set(), self.device):
            return "interrupted"
        elapsed = time.perf_counter() - self.started
        late = config.max_seconds is not None and elapsed >= config.max_seconds
        return "max_seconds" if self.ranks.any(late, self.device) else None

    def _step(self, index: Tensor) -> None:
        position = self.position
        self.step(index, position.step, position.epoch)
        position.step, position.batch = position.step + 1, position.batch + 1
        if position.step % self.config.log_every == 0:
            loss, norm = np.mean(self._check_readings(), axis=0)
            self._record("train", loss=float(loss), grad_norm=float(norm))

    def _check_readings(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return self.step.read(self.position.step)

    def _lr(self) -> float:
        return learning_rate(self.config.optim, self.position.step, self.position.epoch)

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model has the weights to be judged and kept as best: the average, if there is one."""
        average = self.step.average
        return average.applied() if average else contextlib.nullcontext()

    def _validate(self) -> None:
        self._check_readings()
        position, optim = self.position, self.config.optim
        where = f"in the validation after step {position.step}"
        with naming_failed_solves(self.config, where), self._averaged():
            mse, last, by_molecule = mean_squared_errors(
                self.model,
                self.val_set,
                batch_size=optim.batch_size,
                seed=optim.seed,
                ranks=self.ranks,
            )
        improved = position.best_mse is None or mse < position.best_mse
        if improved:
            position.best_mse, position.best_epoch = mse, position.epoch
        position.stale = 0 if improved else position.stale + 1
        columns = molecule_columns(self.molecules.names)
        values = dict(zip(columns, by_molecule, strict=True)) if columns else {}
        self._record("validation", val_mse=mse, val_mse_last=last, **values)
        if improved:
            with self._averaged():
                self._save("best")

    def _record(self, kind: Literal["train", "validation"], **values: float) -> None:
        row = {
            "kind": kind,
            "step": self.position.step,
            "epoch": self.position.epoch,
            "seconds": round(self._seconds(), 3),
            "lr": self._lr(),
            **values,
        }
        if self.metrics is not None:
            self.metrics.write(row)
        self._tell(kind, values)

    def _tell(
        self,
        kind: EventKind,
        values: Mapping[str, float] | None = None,
        note: str = "",
    ) -> None:
        if self.progress is not None and self.ranks.is_first:
            position = self.position
            args = (position.step, self.total_steps, position.epoch, values or {}, note)
            self.progress(TrainEvent(kind, *args))

    def _seconds(self) -> float:
        if self.position.step == self.steps_before:
            return self.seconds_before  # a completed run looked at again has taken no longer
        return self.seconds_before + time.perf_counter() - self.started

    def _save(self, name: Literal["best", "last"]) -> None:
        self.position.seconds = self._seconds()
        if self.metrics is None:
            return
        self.metrics.synchronise()
        self.position.rows = self.metrics.num_rows
        state = self.molecules.tensors()
        manifest: dict[str, Any] = {
            **_decides_bits(),
            "device": self.device.type,
            "config": config_to_dict(self.config),
            **self.molecules.manifest(),
            "position": dataclasses.asdict(self.position),
        }
        if name == "last":
            state |= self.step.tensors() | self._random_state()
        write_checkpoint(
            self.output, name, model=self.model.state_dict(), state=state, manifest=manifest
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        stored_device = checkpoint.value("device", str)
        if stored_device != self.device.type:
            raise ConfigError(
                f"train: `device` must be of the kind that the run was started on "
                f"({stored_device}), got {self.device.type}; resume it on such a machine"
            )
        self._warn_if_bits_may_differ(checkpoint)
        checkpoint.load_weights(self.model)
        self.step.restore(checkpoint)
        kinds = typing.get_type_hints(_Position)
        self.position = _Position(
            **{name: checkpoint.value(f"position.{name}", kind) for name, kind in kinds.items()}
        )
        checkpoint.check("state", self._random_state())
        torch.set_rng_state(checkpoint.state["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(checkpoint.state["random.cuda"], self.device)

    def _random_state(self) -> dict[str, Tensor]:
        state = {"random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _warn_if_bits_may_differ(self, checkpoint: Checkpoint) -> None:
        if self.device.type != "cpu" or not self.ranks.is_first:
            return
        for name, now in _decides_bits().items():
            if (before := checkpoint.manifest.get(name, "not recorded")) != now:
                logger.warning(
                    "train: %s was %s when the run stopped and is %s now; it goes on correctly, "
                    "but not bit for bit as without the stop",
                    name,
                    before,
                    now,
                )


def _decides_bits() -> dict[str, object]:
    """What, beside the checkpoint, the bits of a run on the CPU depend on, of what can be asked."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _read_resumable(config: TrainConfig) -> Checkpoint:
    checkpoint = read_checkpoint(Path(config.output) / "last.json")
    changed = differences(config_from_dict(checkpoint.value("config", dict)), config)
    if changed:
        raise ConfigError(
            f"train: `config` must be the one that the run in {config.output} was started with, "
            f"got changes in {'; '.join(changed)}; undo them or start a new run"
        )
    return checkpoint
