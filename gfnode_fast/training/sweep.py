"""The paper's ablation over the number of modes, on any trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from gfnode_fast.data.files import atomic_write
from gfnode_fast.spectra import spectral_gap_report
from gfnode_fast.training.checkpoint import write_json
from gfnode_fast.training.config import ConfigError, TrainConfig
from gfnode_fast.training.evaluation import evaluate
from gfnode_fast.training.events import Callback, TrainEvent
from gfnode_fast.training.loop import train
from gfnode_fast.training.problem import molecule_graph, read_trajectory
from gfnode_fast.training.report import MODEL, NOTHING_MOVES


@dataclass(frozen=True)
class ModeResult:
    """What one number of modes came to.

    Attributes:
        num_modes: M.
        cuts, gap: whether M cuts an eigenspace, and the gap after mode M (None: all modes taken);
            of several molecules, whether it does so of any, and the smallest gap.
        mse, mse_last: of the test windows (of all molecules together), Å² per coordinate, at all
            times and at the last.
        nothing_moves: the same error of the start frame kept.
        step_seconds: wall-clock time of a training step, validations and writing included.
        steps: training steps made.
    """

    num_modes: int
    cuts: bool
    gap: float | None
    mse: float
    mse_last: float
    nothing_moves: float
    step_seconds: float
    steps: int


def sweep_modes(
    config: TrainConfig,
    modes: Sequence[int],
    *,
    progress: Callback | None = None,
    found: Callable[[ModeResult], None] | None = None,
) -> list[ModeResult]:
    """Train and evaluate the same model with several numbers of modes.

    Args:
        config: of every run but for ``model.num_modes``; run M is made in ``output/modes-M``. A
            run that is there already is resumed, and costs nothing where it was completed.
        modes: numbers of modes, each from 1 to the number of atoms (of the smallest molecule).
        progress: as of :func:`train`.
        found: called with each result as it comes.

    Returns:
        In the order of ``modes``, up to an interruption; also written to ``output/sweep.json``.

    Raises:
        ConfigError: a number of modes out of range, or twice; a model without the graph basis.

    Source: GF-NODE (arXiv 2411.01600), ablation over the number of Fourier modes.
    """
    if config.model.fourier_basis != "graph" or config.model.no_fourier:
        raise ConfigError(
            "sweep-modes: `model.fourier_basis` must be graph, got a model without graph modes; "
            "leave model.fourier_basis and model.no_fourier out"
        )
    graphs = {
        name: molecule_graph(read_trajectory(data), data)
        for name, data in config.data.by_molecule().items()
    }
    name, smallest = min(graphs.items(), key=lambda item: item[1].num_atoms)
    bad = [m for m in modes if not 1 <= m <= smallest.num_atoms]
    if bad or len(set(modes)) != len(modes) or not modes:
        raise ConfigError(
            f"sweep-modes: `modes` must be different numbers from 1 to {smallest.num_atoms}, the "
            f"atoms of {name}, got {list(modes)}; correct them"
        )
    results = []
    for num_modes in modes:
        output = Path(config.output) / f"modes-{num_modes}"
        run = replace(config, model=replace(config.model, num_modes=num_modes), output=str(output))
        told = None if progress is None else _named(progress, f"{num_modes} modes")
        trained = train(run, resume=(output / "last.json").exists(), progress=told)
        if trained.status == "interrupted":
            break
        report = evaluate(output, device=config.device)
        gaps = [spectral_gap_report(graph.eigenvalues, num_modes) for graph in graphs.values()]
        gap = min(report.gap for report in gaps)
        result = ModeResult(
            num_modes=num_modes,
            cuts=any(report.cuts for report in gaps),
            gap=None if math.isinf(gap) else gap,
            mse=report.mse[MODEL],
            mse_last=report.mse_last[MODEL],
            nothing_moves=report.mse[NOTHING_MOVES],
            step_seconds=trained.total_seconds / trained.step,
            steps=trained.step,
        )
        results.append(result)
        if found is not None:
            found(result)
        write_json(Path(config.output) / "sweep.json", {"results": [asdict(r) for r in results]})
    return results


def _named(progress: Callback, name: str) -> Callback:
    """The same callback, told which run begins."""

    def tell(event: TrainEvent) -> None:
        progress(replace(event, note=name) if event.kind == "start" else event)

    return tell


def save_sweep_figure(results: Sequence[ModeResult], path: str | Path) -> None:
    """Draw error and time against the number of modes to a PNG, atomically.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "sweep-modes: `matplotlib` must be installed to draw, got an ImportError; do pip "
            "install matplotlib"
        ) from error
    figure = Figure(figsize=(9, 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    errors, times = figure.subplots(1, 2)
    ordered = sorted(results, key=lambda result: result.num_modes)
    modes = [r.num_modes for r in ordered]
    errors.plot(modes, [r.mse for r in ordered], "o-", color="#0b6fa4", label="all times")
    errors.plot(modes, [r.mse_last for r in ordered], "s--", color="#0b6fa4", alpha=0.5,
                label="last time")  # fmt: skip
    errors.axhline(ordered[0].nothing_moves, color="#7a7a7a", linewidth=1, label="nothing moves")
    cut = [r for r in ordered if r.cuts]
    errors.plot([r.num_modes for r in cut], [r.mse for r in cut], "o", color="#D55E00",
                label="cuts an eigenspace")  # fmt: skip
    errors.set_ylabel("mean squared error, Å²")
    errors.legend(frameon=False, fontsize=8)
    times.plot(modes, [1e3 * r.step_seconds for r in ordered], "o-", color="#0b6fa4")
    times.set_ylabel("training step, ms")
    times.set_ylim(bottom=0)
    for panel in (errors, times):
        panel.set_xlabel("modes M")
        panel.set_xticks(modes)
        panel.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")
