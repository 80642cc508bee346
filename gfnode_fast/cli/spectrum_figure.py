"""A molecule's spectrum as a picture: eigenvalues, and its first modes on the molecule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gfnode_fast.data import MolecularGraph
from gfnode_fast.data.files import atomic_write
from gfnode_fast.data.trajectory import Array
from gfnode_fast.spectra import spectral_gap_report

_DRAWN_MODES = 8


def draw_spectrum(graph: MolecularGraph, positions: Array, path: str | Path) -> None:
    """Draw a graph's eigenvalues and first modes to a PNG, atomically.

    Args:
        graph: of the molecule.
        positions: (N, 3) Å, of one frame; drawn in the plane in which it extends most.
        path: of the PNG.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(
            "data spectrum: `matplotlib` must be installed to draw, got an ImportError; do pip "
            "install matplotlib"
        ) from error
    figure = Figure(figsize=(12, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 2.2))
    levels, modes = halves
    _draw_levels(levels.subplots(), graph)
    plane = _main_plane(positions)
    count = min(_DRAWN_MODES, graph.num_atoms)
    panels = np.atleast_1d(modes.subplots(2, -(-count // 2), squeeze=False)).flat
    for k, panel in enumerate(panels):
        panel.set_axis_off()
        if k < count:
            _draw_mode(panel, graph, plane, k)
    with atomic_write(path) as stream:
        figure.savefig(stream, format="png")


def _draw_levels(panel: Any, graph: MolecularGraph) -> None:
    """Eigenvalues in order, repeated ones joined and marked."""
    values = graph.eigenvalues.tolist()
    panel.plot(range(len(values)), values, "o", color="#0b6fa4", markersize=4)
    for value, first, count in spectral_gap_report(graph.eigenvalues, 1).spaces:
        if count > 1:
            panel.plot([first, first + count - 1], [value, value], color="#D55E00", linewidth=2)
            panel.annotate(f"×{count}", (first + count - 1, value), (4, -3),
                           textcoords="offset points", fontsize=8, color="#D55E00")  # fmt: skip
    panel.set_xlabel("mode")
    panel.set_ylabel("eigenvalue of the Laplacian")
    panel.set_title("repeated eigenvalues joined: do not cut there", fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)


def _draw_mode(panel: Any, graph: MolecularGraph, plane: Array, mode: int) -> None:
    """One eigenvector: colour and size of the atoms, over the bonds."""
    bonded = graph.hops == 1
    for i, j in zip(graph.row[bonded].tolist(), graph.col[bonded].tolist(), strict=True):
        if i < j:
            panel.plot(*plane[[i, j]].T, color="#999999", linewidth=1, zorder=1)
    amplitude = graph.eigvecs[:, mode].numpy()
    strongest = np.abs(amplitude).max()
    panel.scatter(*plane.T, c=amplitude, s=20 + 160 * np.abs(amplitude) / strongest, zorder=2,
                  cmap="RdBu_r", vmin=-strongest, vmax=strongest, edgecolors="#444444",
                  linewidths=0.5)  # fmt: skip
    panel.set_title(f"mode {mode}: {float(graph.eigenvalues[mode]):.3f}", fontsize=9)
    panel.set_aspect("equal")
    panel.margins(0.15)


def _main_plane(positions: Array) -> Array:
    """(N, 2): coordinates along the two longest principal axes."""
    centred = positions.astype(np.float64) - positions.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    plane: Array = centred @ axes[:2].T
    return plane if plane.shape[1] == 2 else np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
