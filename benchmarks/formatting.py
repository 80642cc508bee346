"""How numbers, and where they were measured, are written in every table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SCHEMA = 1  # of result files


def seconds(value: float) -> str:
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= scale or unit == "µs":
            return f"{value / scale:.3g} {unit}"
    raise AssertionError


def size(value: int) -> str:
    return f"{value / 2**30:.2f} GB" if value >= 2**30 else f"{value / 2**20:.1f} MB"


def factor(value: float) -> str:
    return f"{value:.0f}×" if value >= 100 else f"{value:.3g}×"


def is_timed(found: dict[str, Any]) -> bool:
    return "median_s" in found


def heading(about: dict[str, Any], rows: Iterable[dict[str, Any]] = ()) -> str:
    """Hardware, versions, commit and load of a result; rows may come from further commits."""
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items() if v)
    commit = (about["commit"] or "unknown")[:12]
    if about["modified_files"]:
        commit += f" + {about['modified_files']} modified files"
    where = f"{about['hardware']}"
    if about["device"] == "cpu":
        where += f", {about['threads']} thread(s) of {about['cores']} cores"
        if about.get("pinned"):
            where += f", pinned to core {', '.join(map(str, about['pinned']))}"
    rows = list(rows)
    others = {row["commit"] for row in rows if row.get("commit")} - {about["commit"]}
    if others:
        commit += ", some rows " + ", ".join(sorted(other[:12] for other in others))
    loads = [row["load_average"][0] for row in rows if "load_average" in row]
    loads = loads or [about["load_average"][0]]
    return (
        f"{where}; Python {about['python']}, {versions}; commit {commit}; load average "
        f"{min(loads)} to {max(loads)}"
    )
