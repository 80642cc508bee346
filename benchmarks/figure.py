"""The figure of a result: times against batch, ratios, memory, place under the roofline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from benchmarks.formatting import heading, is_timed

# Okabe and Ito's colours, distinguishable by everyone.
COLOURS = {
    "U0": "#999999", "U1": "#0072B2", "C1": "#E69F00", "ours": "#D55E00", "ours exact": "#009E73",
}  # fmt: skip
# Curves that lie on each other stay visible.
STYLES = {"U0": "o-", "U1": "s-", "C1": "^--", "ours": "D-", "ours exact": "v--"}
GREY = "#444444"


STEP = {"op": "model", "phase": "step", "model": "egnn", "times": "irregular", "num_modes": 2,
        "precision": "fp32"}  # fmt: skip
SAGE = STEP | {"model": "sage_attention_concat"}
PROPAGATION = STEP | {"op": "propagation", "phase": "backward"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Six panels: the training step of the default model, its propagation alone, and a second
    model; PNG or any other format.
    """
    step, sage, propagation = (select(result, wanted) for wanted in (STEP, SAGE, PROPAGATION))
    if not step:
        raise ValueError("draw: `result` must hold training steps of the egnn model, got none")
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.6), layout="constrained")
    draw_times(axes[0, 0], step, "training step, EGNN")
    draw_ratios(axes[0, 1], step)
    draw_memory(axes[0, 2], step)
    draw_times(axes[1, 0], propagation, "propagation alone, forward + backward")
    draw_law(axes[1, 0], propagation)
    draw_times(axes[1, 1], sage, "training step, GraphSAGE, attention, concat")
    draw_roofline(axes[1, 2], step, result.get("ceilings"))
    figure.suptitle("M = 2, fp32, irregular times", fontsize=11, weight="bold")
    about = heading(result["about"], result["rows"]).split("; ")
    figure.supxlabel(
        "\n".join(["; ".join(about[:2]), "; ".join(about[2:])]), fontsize=6, color=GREY
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def select(result: dict[str, Any], wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with these properties, by batch."""
    found = [
        entry
        for entry in result["rows"]
        if all(entry["row"][key] == value for key, value in wanted.items())
    ]
    return sorted(found, key=lambda entry: entry["row"]["batch"])


def _series(
    entries: list[dict[str, Any]], name: str, key: str
) -> tuple[list[int], list[dict[str, Any]]]:
    found = [
        (entry["row"]["batch"], entry["contenders"][name])
        for entry in entries
        if entry["contenders"].get(name, {}).get(key) is not None
    ]
    return [batch for batch, _ in found], [contender for _, contender in found]


def _log_batch_axis(axis: Axes, entries: list[dict[str, Any]]) -> None:
    batches = sorted({entry["row"]["batch"] for entry in entries})
    axis.set_xscale("log")
    axis.set_xticks(batches, [str(batch) for batch in batches])
    axis.minorticks_off()
    axis.set_xlabel("molecules per batch")
    axis.grid(True, alpha=0.25)


def draw_times(axis: Axes, entries: list[dict[str, Any]], title: str) -> None:
    axis.set_visible(bool(entries))
    for name, colour in COLOURS.items():
        batches, found = _series(entries, name, "median_s")
        if not found:
            continue
        medians = [1e3 * f["median_s"] for f in found]
        axis.plot(batches, medians, STYLES[name], color=colour, label=name, markersize=4)
        axis.fill_between(
            batches,
            [1e3 * f["q1_s"] for f in found],
            [1e3 * f["q3_s"] for f in found],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    _log_batch_axis(axis, entries)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("ms, median and quartiles")
    axis.set_title(title)
    if entries:
        axis.legend(frameon=False)


def draw_law(axis: Axes, entries: list[dict[str, Any]]) -> None:
    """The cubic law of U0, through its first batch at which the union's writes prevail."""
    batches, found = _series([e for e in entries if e["row"]["batch"] >= 50], "U0", "median_s")
    if len(batches) < 2:
        return
    cubes = [1e3 * found[0]["median_s"] * (batch / batches[0]) ** 3 for batch in batches]
    axis.plot(batches, cubes, ":", color=GREY, linewidth=1)
    axis.annotate("batch³", (batches[-1], cubes[-1]), (0, -10), textcoords="offset points",
                  ha="right", fontsize=8, color=GREY)  # fmt: skip


def draw_ratios(axis: Axes, entries: list[dict[str, Any]]) -> None:
    """How many times faster than U1 each contender is; U0's bars point down."""
    names = [n for n in COLOURS if n != "U1" and any(f"{n} / U1" in e["ratios"] for e in entries)]
    width = 0.8 / max(1, len(names))
    for k, name in enumerate(names):
        for i, entry in enumerate(entries):
            value = entry["ratios"].get(f"{name} / U1")
            if value is None:
                continue
            place = i + (k - (len(names) - 1) / 2) * width
            axis.bar(place, value - 1, width * 0.92, bottom=1, color=COLOURS[name],
                     label=name if i == 0 else None)  # fmt: skip
            offset, align = (2, "bottom") if value >= 1 else (-2, "top")
            axis.annotate(f"{value:.2g}×", (place, value), (0, offset), textcoords="offset points",
                          ha="center", va=align, fontsize=6.5)  # fmt: skip
    axis.axhline(1, color=COLOURS["U1"], linewidth=1)
    axis.set_yscale("log")
    axis.margins(y=0.15)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axis.set_xticks(range(len(entries)), [str(entry["row"]["batch"]) for entry in entries])
    axis.set_xlabel("molecules per batch")
    axis.set_title("its speed against U1 (line)")
    axis.legend(frameon=False)


def draw_memory(axis: Axes, entries: list[dict[str, Any]]) -> None:
    for name, colour in COLOURS.items():
        batches, found = _series(entries, name, "peak_bytes")
        if found:
            mega = [f["peak_bytes"] / 2**20 for f in found]
            axis.plot(batches, mega, STYLES[name], color=colour, label=name, markersize=4)
    _log_batch_axis(axis, entries)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_ylabel("MB")
    axis.set_title("its peak memory")
    axis.legend(frameon=False)


def draw_roofline(
    axis: Axes, entries: list[dict[str, Any]], ceilings: dict[str, Any] | None
) -> None:
    """Attained matrix flops per second over the intensity of U1's counted flops and bytes."""
    for entry in entries:
        work = entry.get("work", {})
        if not work.get("flops") or work["counted_on"] != "U1":
            continue
        intensity = work["flops"] / work["bytes"]
        for name, colour in COLOURS.items():
            found = entry["contenders"].get(name, {})
            if is_timed(found):
                axis.plot(intensity, work["flops"] / found["median_s"] / 1e9, "o", color=colour,
                          markersize=3 + entry["row"]["batch"] ** 0.25)  # fmt: skip
    if ceilings:
        _draw_ceilings(axis, ceilings)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    axis.set_xlabel("flops per byte, both counted on U1 (larger dots: larger batches)")
    axis.set_ylabel("Gflop/s")
    axis.set_title("its place under the roofline")
    axis.grid(True, alpha=0.25)


def _draw_ceilings(axis: Axes, ceilings: dict[str, Any]) -> None:
    bandwidth = ceilings["copy_bytes_per_s"]
    intensity = [1, 2, 5, 10, 20, 50, 100, 200]
    for name, rate in ceilings["matrix_flops_per_s"].items():
        roof = [min(rate, bandwidth * x) / 1e9 for x in intensity]
        axis.plot(intensity, roof, "-", color=GREY, linewidth=0.8)
        axis.annotate(f"{name} matrix rate", (intensity[-1], rate / 1e9), (0, 2),
                      textcoords="offset points", ha="right", fontsize=7, color=GREY)  # fmt: skip
