"""What a training run is: plain dataclasses, checked when they are made.

The defaults are the published recipe (Adam 1e-4, batch 50, 5000 epochs, StepLR(2500, 0.5),
5 + 5 layers of width 64, T = 8 irregular times up to 3000 frames).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from gfnode_fast.nn.backends import BACKENDS
from gfnode_fast.ops.graph_layers import PRECISIONS
from gfnode_fast.training.config_checks import ConfigError, choice, must, positive, positive_int
from gfnode_fast.training.data_config import SAMPLE_PREFIX, DataConfig

# Where a run writes, when it stops and what it reports: changing these cannot change a number.
CHANGEABLE_ON_RESUME = (
    "output",
    "max_steps",
    "max_seconds",
    "checkpoint_every",
    "tensorboard",
    "model.max_attempts",
)


@dataclass(frozen=True)
class ModelConfig:
    """Constructor arguments of :class:`gfnode_fast.FourierMD` that do not follow from the data."""

    n_layers: int = 5
    hidden_nf: int = 64
    num_modes: int = 2
    time_emb_dim: int = 32
    solver: str = "dopri5"
    rtol: float = 1e-3
    atol: float = 1e-4
    fourier_basis: Literal["graph", "linear"] | None = "graph"
    no_fourier: bool = False
    no_ode: bool = False
    use_vae: bool = False
    gnn_ablation_mode: str = "EGNN"
    mode_interaction: Literal["no_interaction", "attention", "concat"] = "no_interaction"
    time_mode: Literal["none", "concat", "mlp", "posenc", "rope"] = "none"
    propagate_x: bool = True
    propagate_h: bool = True
    norm: bool = False
    flat: bool = False
    backend: str = "auto"
    precision: str = "fp32"
    solver_mode: Literal["joint", "per_molecule", "exact"] = "joint"
    recompute: bool | None = None
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        positive_int("model.n_layers", self.n_layers)
        positive_int("model.hidden_nf", self.hidden_nf)
        positive_int("model.num_modes", self.num_modes)
        positive_int("model.time_emb_dim", self.time_emb_dim, minimum=4)
        choice("model.backend", self.backend, BACKENDS)
        choice("model.precision", self.precision, PRECISIONS)
        choice("model.solver_mode", self.solver_mode, ("joint", "per_molecule", "exact"))
        if self.max_attempts is not None:
            positive_int("model.max_attempts", self.max_attempts)
        positive("model.rtol", self.rtol)
        positive("model.atol", self.atol)
        choice(
            "model.gnn_ablation_mode",
            str(self.gnn_ablation_mode).lower(),
            ("egnn", "sage", "graphsage", "gcn"),
        )
        choice(
            "model.mode_interaction",
            self.mode_interaction,
            ("no_interaction", "attention", "concat"),
        )
        choice("model.time_mode", self.time_mode, ("none", "concat", "mlp", "posenc", "rope"))
        if self.no_fourier:
            must(
                self.fourier_basis is None,
                "model.fourier_basis",
                "null with model.no_fourier",
                self.fourier_basis,
                "set model.fourier_basis to null",
            )
        else:
            must(
                self.fourier_basis in ("graph", "linear"),
                "model.fourier_basis",
                "graph or linear",
                self.fourier_basis,
                "or set model.no_fourier",
            )


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule and validation.

    Attributes:
        optimizer: ``adam`` as published (weight decay is part of the gradient) or ``adamw``
            (decoupled from it).
        lr, weight_decay: of it.
        lr_scaling: with batches other than the published 50, the rate is multiplied by
            batch_size / 50 (``linear``), by its root (``sqrt``), or not (``none``).
        warmup_steps: steps over which the rate rises linearly to its full value.
        clip_norm: gradients are scaled down to this total norm; null: never.
        batch_size: windows in a step.
        accumulate: parts in which a batch is run, one after the other, gradients added up: less
            memory, the same update but for rounding (and, with ``model.solver_mode=joint``,
            within the solver's tolerance, since its steps follow from the molecules run together).
        ema_decay: validate and keep as best an exponential moving average of the weights with
            this decay; null: the weights themselves.
        epochs: passes over the training windows.
        lr_step_epochs, lr_gamma: the rate is multiplied by ``lr_gamma`` every so many epochs.
        kl_weight: weight of the VAE's divergence (without effect unless ``model.use_vae``).
        validate_every: epochs between validations; the last epoch is always validated.
        patience: validations without improvement before the run stops early; null: never.
        seed: of the initial values, the order of the windows and the VAE's noise.
        dtype: precision of parameters and data.
    """

    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 1e-4
    weight_decay: float = 1e-15
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    warmup_steps: int = 0
    clip_norm: float | None = None
    batch_size: int = 50
    accumulate: int = 1
    ema_decay: float | None = None
    epochs: int = 5000
    lr_step_epochs: int = 2500
    lr_gamma: float = 0.5
    kl_weight: float = 0.01
    validate_every: int = 5
    patience: int | None = None
    seed: int = 0
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        positive("optim.lr", self.lr)
        positive("optim.weight_decay", self.weight_decay, zero=True)
        positive("optim.lr_gamma", self.lr_gamma)
        positive("optim.kl_weight", self.kl_weight, zero=True)
        for name in ("batch_size", "accumulate", "epochs", "lr_step_epochs", "validate_every"):
            positive_int(f"optim.{name}", getattr(self, name))
        positive_int("optim.warmup_steps", self.warmup_steps, minimum=0)
        choice("optim.optimizer", self.optimizer, ("adam", "adamw"))
        choice("optim.lr_scaling", self.lr_scaling, ("none", "linear", "sqrt"))
        if self.clip_norm is not None:
            positive("optim.clip_norm", self.clip_norm)
        if self.ema_decay is not None:
            positive("optim.ema_decay", self.ema_decay)
            must(self.ema_decay < 1, "optim.ema_decay", "below 1", self.ema_decay, "try 0.999")
        if self.patience is not None:
            positive_int("optim.patience", self.patience)
        positive_int("optim.seed", self.seed, minimum=0)
        choice("optim.dtype", self.dtype, ("float32", "float64"))


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        data, model, optim: what is learned from, by what, and how.
        output: directory of the run; made if missing.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        capture: on a GPU, replay the step of every full batch as one CUDA graph (see
            :func:`gfnode_fast.capture_training_step`); a smaller last batch of an epoch is run
            plainly. Needs solves that decide nothing on the host, one process, one molecule and no
            accumulation. On the CPU it is the plain step.
        log_every: optimiser steps between two readings of the losses. Nothing is read from the
            device in between.
        checkpoint_every: epochs between two "last" checkpoints.
        max_steps: stop, resumable, once this many optimiser steps have been made in all.
        max_seconds: stop, resumable, after this much wall-clock time in this call.
        tensorboard: also write TensorBoard event files (needs the package ``tensorboard``).
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    output: str = "runs/gfnode"
    device: str = "auto"
    capture: bool = False
    log_every: int = 10
    checkpoint_every: int = 5
    max_steps: int | None = None
    max_seconds: float | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        ok = isinstance(self.output, str) and self.output != ""
        must(ok, "output", "a directory", self.output, "name one")
        device_ok = isinstance(self.device, str) and (
            self.device in ("auto", "cpu", "cuda")
            or (self.device.startswith("cuda:") and self.device[5:].isdigit())
        )
        must(device_ok, "device", "auto, cpu, cuda or cuda:N", self.device, "choose one of them")
        must(
            not self.capture or self.optim.accumulate == 1,
            "capture",
            f"false with optim.accumulate ({self.optim.accumulate})",
            self.capture,
            "a CUDA graph holds one whole batch: set optim.accumulate to 1",
        )
        must(
            not (self.capture and self.data.is_mixed),
            "capture",
            "false with data.molecules",
            self.capture,
            "a CUDA graph has one size, mixed batches have many: leave it out",
        )
        positive_int("log_every", self.log_every)
        positive_int("checkpoint_every", self.checkpoint_every)
        if self.max_steps is not None:
            positive_int("max_steps", self.max_steps)
        if self.max_seconds is not None:
            positive("max_seconds", self.max_seconds)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested plain values (what the checkpoints and config.json hold)."""
    plain = dataclasses.asdict(config)
    plain["data"]["fractions"] = list(plain["data"]["fractions"])
    bonds = plain["data"]["rigid_bonds"]
    plain["data"]["rigid_bonds"] = bonds if isinstance(bonds, str) else [list(p) for p in bonds]
    return plain


def config_from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """Inverse of :func:`config_to_dict`.

    Raises:
        ConfigError: an unknown key, a section that is not a mapping, or a bad value.
    """
    return _build(TrainConfig, values, "")


_Config = typing.TypeVar("_Config")


def _build(cls: type[_Config], values: object, prefix: str) -> _Config:
    section = prefix.rstrip(".") or "config"
    if not isinstance(values, Mapping):
        raise ConfigError(f"config: `{section}` must be a mapping, got {values!r}; nest its keys")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"config: `{prefix}{unknown[0]}` must be one of {', '.join(hints)}, "
            f"got an unknown key; remove it or correct its name"
        )
    kwargs = {}
    for name, value in values.items():
        hint = hints[name]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        kwargs[name] = _build(hint, value, f"{prefix}{name}.") if nested else value
    return cls(**kwargs)


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """Fields that differ and that may not change on resume, as ``name: old -> new``."""
    return [
        f"{name}: {before!r} -> {after!r}"
        for (name, before), (_, after) in zip(
            _flat(config_to_dict(old)), _flat(config_to_dict(new)), strict=True
        )
        if before != after and name not in CHANGEABLE_ON_RESUME
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            items += _flat(value, f"{prefix}{name}.")
        else:
            items.append((prefix + name, value))
    return items


__all__ = [
    "SAMPLE_PREFIX",
    "ConfigError",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "config_from_dict",
    "config_to_dict",
    "differences",
]
