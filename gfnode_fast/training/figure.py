"""The report as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from gfnode_fast.data.files import atomic_write
from gfnode_fast.training.report import (
    CONSTANT_VELOCITY,
    MEAN_STRUCTURE,
    MODEL,
    NOTHING_MOVES,
    PREDICTORS,
    Distribution,
    Report,
)

_COLOURS = {
    MODEL: "#0b6fa4",
    NOTHING_MOVES: "#7a7a7a",
    CONSTANT_VELOCITY: "#c9a227",
    MEAN_STRUCTURE: "#b5533c",
}
_LABELS = {MODEL: "GF-NODE"}


def save_figure(report: Report, path: str | Path, *, title: str | None = None) -> None:
    """Draw a report to a PNG, atomically.

    Four panels: the error of the model and of each baseline, the error against the horizon, and
    the predicted against the true bond lengths and angles.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "evaluate: `matplotlib` must be installed to draw the report, got an ImportError; "
            "do pip install matplotlib"
        ) from error
    figure = Figure(figsize=(11.5, 8.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    figure.suptitle(title or _title(report), fontsize=15, fontweight="bold")
    _draw_bars(panels[0, 0], report)
    _draw_horizon(panels[0, 1], report)
    _draw_distribution(panels[1, 0], report.bond_lengths, "Bond lengths", "Å")
    _draw_distribution(panels[1, 1], report.bond_angles, "Bond angles", "°")
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontweight("bold")
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")


def _title(report: Report) -> str:
    change = report.improvement
    verdict = f"{abs(change):.0%} {'below' if change >= 0 else 'above'} “nothing moves”"
    return f"GF-NODE on {Path(report.trajectory).name} ({report.split} windows): error {verdict}"


def _draw_bars(panel: Any, report: Report) -> None:
    """Both errors of each predictor; the axis ends where the useful bars do."""
    names = list(PREDICTORS)[::-1]
    limit = 1.25 * max(
        max(errors[name] for errors in (report.mse, report.mse_last))
        for name in names
        if name != CONSTANT_VELOCITY
    )
    for offset, errors, alpha in ((0.2, report.mse, 1.0), (-0.2, report.mse_last, 0.45)):
        for place, name in enumerate(names):
            value = errors[name]
            clipped = value > limit
            width = limit if clipped else value
            panel.barh(place + offset, width, 0.38, color=_COLOURS[name], alpha=alpha)
            label = f"{value:.3g}" + (" →" if clipped else "")
            inside = width > 0.85 * limit
            panel.text(
                width + (-0.01 if inside else 0.01) * limit,
                place + offset,
                label,
                va="center",
                ha="right" if inside else "left",
                fontsize=9,
                color="white" if inside and alpha == 1.0 else "black",
            )
    panel.set_yticks(range(len(names)), [_LABELS.get(name, name) for name in names])
    panel.set_xlim(0, limit)
    panel.set_xlabel("mean squared error per coordinate (Å²)")
    times = f"all {report.num_timesteps} times (dark), last time (light)"
    panel.set_title(f"Error over {report.num_windows} windows\n{times}", fontsize=11)


def _draw_horizon(panel: Any, report: Report) -> None:
    scale, unit = (1e-3, "ps") if report.horizon_fs[-1] >= 1000 else (1.0, "fs")
    edges = [edge * scale for edge in report.horizon_fs]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    top = 0.0
    for name in PREDICTORS:
        points = [
            (t, value)
            for t, value in zip(middles, report.horizon_mse[name], strict=True)
            if value is not None
        ]
        if name != CONSTANT_VELOCITY:
            top = max([top, *(value for _, value in points)])
        panel.plot(
            [t for t, _ in points],
            [value for _, value in points],
            "o-",
            color=_COLOURS[name],
            linewidth=2.6 if name == MODEL else 1.6,
            markersize=5 if name == MODEL else 3,
            label=_LABELS.get(name, name),
            zorder=3 if name == MODEL else 2,
        )
    panel.set_xlim(0, edges[-1])
    panel.set_ylim(0, 1.25 * top)
    panel.set_xlabel(f"time since the start frame ({unit})")
    panel.set_ylabel("mean squared error (Å²)")
    panel.set_title("Error against the horizon", fontsize=11)
    panel.legend(frameon=False, fontsize=9)
    panel.grid(alpha=0.25)


def _draw_distribution(panel: Any, values: Distribution | None, title: str, unit: str) -> None:
    if values is None:
        panel.set_title(f"{title}: the molecule has none", fontsize=11)
        panel.set_axis_off()
        return
    width = values.edges[1] - values.edges[0]
    true = [fraction / width for fraction in values.true]
    predicted = [fraction / width for fraction in values.predicted]
    panel.stairs(true, values.edges, fill=True, color="#bdbdbd", label="true")
    panel.stairs(predicted, values.edges, color=_COLOURS[MODEL], linewidth=2, label="GF-NODE")
    panel.set_xlim(values.edges[0], values.edges[-1])
    panel.set_xlabel(f"{title.lower()[:-1]} ({unit})")
    panel.set_ylabel(f"density (1/{unit})")
    numbers = (
        f"Wasserstein distance {values.wasserstein:.3g} {unit}, "
        f"Jensen-Shannon {values.jensen_shannon:.2f} bit"
    )
    panel.set_title(f"{title}, predicted and true\n{numbers}", fontsize=11)
    panel.legend(frameon=False, fontsize=9)
