"""Evaluation of a trained model beside simple baselines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gfnode_fast.data import Trajectory, WindowDataset, Windows
from gfnode_fast.nn import FourierMD
from gfnode_fast.training.checkpoint import CheckpointError
from gfnode_fast.training.geometry import (
    angle_triples,
    bond_angles,
    bond_lengths,
    bond_pairs,
    mean_structure,
    superpose,
)
from gfnode_fast.training.metrics import molecule_columns, read_metrics
from gfnode_fast.training.problem import (
    Problem,
    check_time_step,
    forked_random_state,
    load_problem,
)
from gfnode_fast.training.report import (
    CONSTANT_VELOCITY,
    MEAN_STRUCTURE,
    MODEL,
    NOTHING_MOVES,
    PREDICTORS,
    Distribution,
    Report,
    distribution,
)
from gfnode_fast.training.trained import (
    TrainedModel,
    choose_model,
    load_models,
    model_for_trajectory,
)

HORIZON_BINS = 12
SPLITS = ("train", "val", "test")


def evaluate(
    run: str | Path | TrainedModel,
    *,
    molecule: str | int | None = None,
    trajectory: str | Path | None = None,
    dt_fs: float | None = None,
    split: str = "test",
    batch_size: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate a trained model on held-out windows, beside the baselines.

    The baselines: "nothing moves" (the start frame), "x + v t" (the start velocity kept), and
    "mean structure" (the mean of the training frames, superposed onto the start frame).

    Args:
        run: a run's directory (its best checkpoint, else its last), a manifest, or a loaded model.
        molecule: the one that is meant, in a run of several, by name or number; default: that
            whose atoms ``trajectory`` has; without one each, in ``molecules`` of the report, and
            all together.
        trajectory: another trajectory of the same molecule; default: the one trained on. Windows
            are drawn from it as configured for the training.
        dt_fs: time between frames, where that file does not say.
        split: ``train``, ``val`` or ``test``.
        batch_size: default: that of the training. Within the solver's tolerance the numbers
            depend on it, since one solve serves the whole batch.
        device: where to compute, unless ``run`` is a loaded model.
        progress: called with the windows done and all of them, batch by batch.

    Raises:
        ValueError: an unknown split or molecule, options that do not fit, frames of another
            spacing.
            CheckpointError: missing, damaged, or the training trajectory has changed.
            GraphMismatchError: another molecule, or an eigenvector basis that is not one of its
            Laplacian; the stored basis is the one used.

    Deterministic for a given batch size; the VAE's noise comes from the training's seed.
    """
    if split not in SPLITS:
        raise ValueError(
            f"evaluate: `split` must be one of {', '.join(SPLITS)}, got {split!r}; choose one"
        )
    if trajectory is None and dt_fs is not None:
        raise ValueError(
            f"evaluate: `dt_fs` must be None without `trajectory`, got {dt_fs}; leave it out, "
            "the training's trajectory has its own"
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"evaluate: `batch_size` must be at least 1, got {batch_size}; raise it")
    if isinstance(run, TrainedModel):
        if molecule is not None:
            raise ValueError(
                f"evaluate: `molecule` must be None with a loaded model, got {molecule!r}; load "
                "the one that is meant"
            )
        models = {"": run}
    else:
        models = load_models(run, device=device)
    frames = None
    if trajectory is not None:
        trained, frames = model_for_trajectory(models, trajectory, dt_fs=dt_fs, molecule=molecule)
        models = {"": trained}
    elif molecule is not None:
        models = {"": choose_model(models, molecule)}
    problems = {name: _problem(trained, frames) for name, trained in models.items()}
    done, total = 0, sum(len(problem.windows[split]) for problem in problems.values())

    def count(windows: int) -> None:
        nonlocal done
        done += windows
        if progress is not None:
            progress(done, total)

    tallies = {
        name: _Tally(problems[name], split, trained, batch_size, count)
        for name, trained in models.items()
    }
    sources = {
        name: str(trajectory or trained.config.data.trajectory) for name, trained in models.items()
    }
    single = {name: _report([tally], sources[name]) for name, tally in tallies.items()}
    if len(single) == 1:
        return next(iter(single.values()))
    together = _report(list(tallies.values()), ", ".join(single))
    return dataclasses.replace(together, molecules=single)


def _problem(trained: TrainedModel, trajectory: Trajectory | None) -> Problem:
    data = trained.config.data
    if trajectory is not None:
        data = dataclasses.replace(data, split_file=None)  # it names frames of the training's
    problem = load_problem(data, stored_graph=trained.graph, trajectory=trajectory)
    check_time_step("evaluate", trained.dt_fs, problem.trajectory)
    if trajectory is None and problem.hashes != trained.data_hashes:
        changed = [k for k, digest in problem.hashes.items() if digest != trained.data_hashes[k]]
        raise CheckpointError(
            f"evaluate: `trajectory` must be what {trained.path} was trained on, got another "
            f"{' and '.join(changed)} (by hash); restore the file, or name it as `trajectory`"
        )
    return problem


def _report(tallies: list[_Tally], source: str) -> Report:
    """Of the windows of one or several molecules together; `source` is what they came from."""
    trained, first = tallies[0].trained, tallies[0]
    data = trained.config.data
    errors = {name: torch.cat([tally.errors[name] for tally in tallies]) for name in PREDICTORS}
    dt_fs = first.problem.trajectory.dt_fs
    times = torch.cat([tally.times for tally in tallies])
    edges, horizon, count = _horizon(times, errors, data.delta_frame, data.sampling == "regular")
    molecule = trained.molecule if len(tallies) == 1 else None
    metric = "val_mse" if molecule is None else molecule_columns([molecule])[0]
    return Report(
        checkpoint=str(trained.path),
        trajectory=source,
        split=first.split,
        num_windows=len(times),
        num_atoms=sum(tally.problem.trajectory.num_atoms for tally in tallies),
        num_timesteps=data.num_timesteps,
        dt_fs=dt_fs,
        mse={name: float(errors[name].mean()) for name in PREDICTORS},
        mse_last={name: float(errors[name][:, -1].mean()) for name in PREDICTORS},
        horizon_fs=(edges * dt_fs).tolist(),
        horizon_mse=horizon,
        horizon_count=count,
        bond_lengths=_distribution([tally.lengths() for tally in tallies]),
        bond_angles=_distribution([tally.angles() for tally in tallies]),
        history=[
            (row["step"], row[metric])
            for row in read_metrics(trained.path.parent)
            if row["kind"] == "validation"
        ],
        molecule=molecule,
    )


def _horizon(
    times: Tensor, errors: Mapping[str, Tensor], delta_frame: int, regular: bool
) -> tuple[Tensor, dict[str, list[float | None]], list[int]]:
    """Bin edges (frames), errors and counts; bins are open on the left, ``None`` where empty."""
    bins = times.shape[1] if regular else min(HORIZON_BINS, delta_frame)
    edges = torch.linspace(0, delta_frame, bins + 1, dtype=torch.float64)
    place = torch.bucketize(times.double().flatten(), edges[1:-1])
    count = torch.bincount(place, minlength=bins)
    means = {
        name: torch.bincount(place, error.flatten(), minlength=bins) / count
        for name, error in errors.items()
    }
    found = {
        name: [None if math.isnan(value) else value for value in mean.tolist()]
        for name, mean in means.items()
    }
    return edges, found, count.tolist()


def _distribution(values: list[tuple[Tensor, Tensor] | None]) -> Distribution | None:
    """Predicted against true bond lengths, or angles, of all molecules that have any."""
    found = [pair for pair in values if pair is not None]
    if not found:
        return None
    true, predicted = (
        torch.cat([one.flatten() for one in side]) for side in zip(*found, strict=True)
    )
    return distribution(true, predicted)


class _Tally:
    """Runs everything once over a data set and keeps what the report needs.

    ``errors`` holds per predictor the squared error of each window and time, (S, T) on the CPU.
    """

    def __init__(
        self,
        problem: Problem,
        split: str,
        trained: TrainedModel,
        batch_size: int | None,
        count: Callable[[int], None],
    ) -> None:
        self.problem, self.split, self.trained = problem, split, trained
        self.dataset = problem.dataset(
            split,
            dtype=trained.dtype,
            device=trained.device,
            largest_number=trained.largest_number,
        )
        batch_size = batch_size or trained.config.optim.batch_size
        self.times = problem.windows[split].times
        mean = mean_structure(_training_frames(problem)).to(trained.device, trained.dtype)
        frames: dict[str, list[Tensor]] = {"true": [], "predicted": []}
        errors: dict[str, list[Tensor]] = {name: [] for name in PREDICTORS}
        with torch.no_grad(), forked_random_state(trained.device):
            torch.manual_seed(trained.config.optim.seed)
            for index in torch.arange(len(self.dataset), device=trained.device).split(batch_size):
                target, predictions = predict_batch(trained.model, self.dataset, index, mean)
                for name, predicted in predictions.items():
                    squared = (predicted - target).double().square().mean(dim=(-2, -1))
                    errors[name].append(squared.cpu())
                frames["true"].append(target.flatten(0, 1).cpu())
                frames["predicted"].append(predictions[MODEL].flatten(0, 1).cpu())
                count(len(index))
        self.errors = {name: torch.cat(values) for name, values in errors.items()}
        self.frames = {name: torch.cat(values) for name, values in frames.items()}

    def lengths(self) -> tuple[Tensor, Tensor] | None:
        """True and predicted bond lengths, (frames, bonds); None without bonds."""
        pairs = bond_pairs(self.problem.graph)
        return self._of_frames(bond_lengths, pairs) if len(pairs) else None

    def angles(self) -> tuple[Tensor, Tensor] | None:
        """True and predicted bond angles, (frames, angles); None without any."""
        triples = angle_triples(self.problem.graph)
        return self._of_frames(bond_angles, triples) if len(triples) else None

    def _of_frames(
        self, measure: Callable[[Tensor, Tensor], Tensor], atoms: Tensor
    ) -> tuple[Tensor, Tensor]:
        return measure(self.frames["true"], atoms), measure(self.frames["predicted"], atoms)


def predict_batch(
    model: FourierMD, dataset: WindowDataset, index: Tensor, mean: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Target and predictions of some windows, each (B, T, N, 3).

    Args:
        model: the model.
        dataset: the windows.
        index: (B,) which of them.
        mean: (N, 3), the mean structure.
    """
    batch = dataset.batch(index)
    size, num_times = batch.timeframes.shape
    atoms = len(mean)

    def by_window(flat: Tensor) -> Tensor:
        return flat.view(num_times, size, atoms, 3).transpose(0, 1)

    start, velocity = batch.x.view(size, 1, atoms, 3), batch.v.view(size, 1, atoms, 3)
    shape = (size, num_times, atoms, 3)
    return by_window(batch.target), {
        MODEL: by_window(model(**batch.inputs())[0]),
        NOTHING_MOVES: start.expand(shape),
        CONSTANT_VELOCITY: start + velocity * batch.timeframes[:, :, None, None].to(start.dtype),
        MEAN_STRUCTURE: superpose(mean, start.squeeze(1)).unsqueeze(1).expand(shape),
    }


def _training_frames(problem: Problem) -> Tensor:
    """(F, N, 3) fp64, the frames that the training windows show."""
    windows: Windows = problem.windows["train"]
    rows = torch.cat((windows.start, windows.target.flatten())).unique().cpu().numpy()
    return torch.from_numpy(problem.trajectory.positions[rows]).double()
