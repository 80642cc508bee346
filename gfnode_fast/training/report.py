"""The result of an evaluation, and the statistics in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.training.checkpoint import write_json

MODEL = "model"
NOTHING_MOVES = "nothing moves"
CONSTANT_VELOCITY = "x + v t"
MEAN_STRUCTURE = "mean structure"
PREDICTORS = (MODEL, NOTHING_MOVES, CONSTANT_VELOCITY, MEAN_STRUCTURE)


@dataclass(frozen=True)
class Distribution:
    """Predicted against true values of one internal coordinate.

    Attributes:
        edges: bin edges, A or degrees; values outside are counted in the end bins.
        true, predicted: fraction of the values in each bin.
        wasserstein: mean distance of the sorted values, A or degrees (Wasserstein-1).
        jensen_shannon: Jensen-Shannon divergence of the two histograms, bits: 0 same, 1 disjoint.
    """

    edges: list[float]
    true: list[float]
    predicted: list[float]
    wasserstein: float
    jensen_shannon: float


@dataclass(frozen=True)
class Report:
    """What :func:`gfnode_fast.training.evaluate` found.

    Attributes:
        checkpoint, trajectory, split: what was evaluated on what.
        num_windows, num_atoms, num_timesteps: sizes.
        dt_fs: time between frames, fs.
        mse: mean squared error per coordinate, A^2, over all atoms and all T times, of the model
            and of each baseline.
        mse_last: the same at the last of the T times.
        horizon_fs: edges of the horizon bins, fs.
        horizon_mse: mean squared error in each bin (``None`` where no time fell into it).
        horizon_count: times that fell into each bin.
        bond_lengths, bond_angles: over all bonds, or angles, and all times; ``None`` without any.
        history: (step, validation MSE) of the training.
        molecules: of a run of several, the report of each by name; the rest is then over all of
            their windows together, ``num_atoms`` their sum.
        molecule: the one of several that this is of, else ``None``.
    """

    checkpoint: str
    trajectory: str
    split: str
    num_windows: int
    num_atoms: int
    num_timesteps: int
    dt_fs: float
    mse: dict[str, float]
    mse_last: dict[str, float]
    horizon_fs: list[float]
    horizon_mse: dict[str, list[float | None]]
    horizon_count: list[int]
    bond_lengths: Distribution | None
    bond_angles: Distribution | None
    history: list[tuple[int, float]]
    molecules: dict[str, Report] = field(default_factory=dict)
    molecule: str | None = None

    @property
    def improvement(self) -> float:
        """How far the model's MSE lies below that of "nothing moves", as a fraction of it."""
        return 1.0 - self.mse[MODEL] / self.mse[NOTHING_MOVES]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        molecules = {name: report.to_dict() for name, report in self.molecules.items()}
        values = dataclasses.asdict(self) | {"molecules": molecules}
        return {**values, "improvement": self.improvement}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, atomically."""
        write_json(Path(path), self.to_dict())


def read_report(path: str | Path) -> Report:
    """Inverse of :meth:`Report.save`; also of reports from before runs of several molecules.

    Raises:
        ValueError: the file is no report.
    """
    try:
        return _from_dict(json.loads(Path(path).read_bytes()))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"read_report: `path` must be a file of Report.save, got {path}, which is damaged or "
            f"another kind ({type(error).__name__}: {error}); evaluate again"
        ) from error


def _from_dict(values: Mapping[str, Any]) -> Report:
    values = {"molecules": {}, "molecule": None, **values}
    fields = {field.name: values[field.name] for field in dataclasses.fields(Report)}
    for name in ("bond_lengths", "bond_angles"):
        if fields[name] is not None:
            fields[name] = Distribution(**fields[name])
    fields["history"] = [(int(step), float(mse)) for step, mse in fields["history"]]
    fields["molecules"] = {name: _from_dict(own) for name, own in fields["molecules"].items()}
    return Report(**fields)


def distribution(true: Tensor, predicted: Tensor, *, bins: int = 60) -> Distribution:
    """Compare two samples of the same size.

    The bins span all true values and the middle 98 % of the predicted ones.
    """
    true = true.double().flatten().sort().values
    predicted = predicted.double().flatten().sort().values
    tail = len(predicted) // 100
    low = torch.minimum(true[0], predicted[tail])
    high = torch.maximum(true[-1], predicted[-1 - tail])
    margin = max(0.02 * float(high - low), 1e-3)
    edges = torch.linspace(float(low) - margin, float(high) + margin, bins + 1, dtype=torch.float64)
    histograms = [_fractions(values, edges) for values in (true, predicted)]
    return Distribution(
        edges=edges.tolist(),
        true=histograms[0].tolist(),
        predicted=histograms[1].tolist(),
        wasserstein=float((true - predicted).abs().mean()),
        jensen_shannon=jensen_shannon(*histograms),
    )


def jensen_shannon(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon divergence of two discrete distributions, in bits."""
    middle = (p + q) / 2
    return float((_divergence(p, middle) + _divergence(q, middle)) / 2)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    some = p > 0
    return (p[some] * (p[some] / q[some]).log2()).sum()


def _fractions(values: Tensor, edges: Tensor) -> Tensor:
    place = torch.bucketize(values, edges[1:-1], right=True)
    return torch.bincount(place, minlength=len(edges) - 1).double() / len(values)
