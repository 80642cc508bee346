"""The figure of equivalence.py: loss curves, and distances in units of the seeds' spread."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.figure import GREY
from benchmarks.formatting import heading

# Okabe and Ito's colours, distinguishable by everyone.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#E69F00")
STYLES = ("-", "--", ":", "-.")


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels, PNG or any other format."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    reference, size = result["reference"], result["size"]
    steps = range(1, size["steps"] + 1)
    left.fill_between(
        steps, reference["min"], reference["max"], color="#999999", alpha=0.4, linewidth=0,
        label=f"reference, range of {size['seeds']} seeds",
    )  # fmt: skip
    left.plot(steps, reference["mean"], color=GREY, linewidth=2.5, label="its mean")
    for (name, found), colour, style in zip(
        result["variants"].items(), COLOURS, STYLES, strict=False
    ):
        left.plot(steps, found["mean"], style, color=colour, linewidth=1, label=f"ours, {name}")
        right.plot(steps, found["distance"], style, color=colour, linewidth=1)
    right.axhline(1, color=GREY, linewidth=1)
    right.annotate("spread: std over the seeds", (steps[-1], 1), (0, 3), textcoords="offset points",
                   ha="right", fontsize=8, color=GREY)  # fmt: skip
    left.set_yscale("log")
    right.set_yscale("log", nonpositive="mask")  # equal bits have no place on it
    left.set_ylabel("training loss, Å²")
    right.set_ylabel("distance from the same seed / spread")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(True, alpha=0.25)
    left.legend(frameon=False)
    figure.suptitle(
        f"{size['sample']}, {size['windows']} windows, B = {size['batch']}, lr {size['lr']:g}",
        weight="bold",
    )
    about = heading(result["about"]).split("; ")
    figure.supxlabel(
        "\n".join(["; ".join(about[:2]), "; ".join(about[2:])]), fontsize=6, color=GREY
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
