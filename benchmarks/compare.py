"""Compare two result files: python benchmarks/compare.py OLD NEW [--absolute] [--threshold 0.1]

Times are compared relative to U1 (or to the row's first contender) of the same run, because a
machine's speed drifts between runs; --absolute compares seconds. A contender regressed when its
median rose by more than the threshold and its lower quartile now lies above the old upper one. The
exit status is then 1; it is 2 when the files cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.formatting import factor, is_timed
from benchmarks.report import load

SAME_MACHINE = ("device", "hardware", "threads")


@dataclass(frozen=True)
class Change:
    """Quartiles of one contender in one row, old and new, in the unit of comparison."""

    row: str
    contender: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]

    @property
    def slowdown(self) -> float:
        return self.new[1] / self.old[1]

    def is_regression(self, threshold: float) -> bool:
        return self.slowdown > 1 + threshold and self.new[0] > self.old[2]


def _quartiles(
    entry: dict[str, Any], name: str, absolute: bool
) -> tuple[float, float, float] | None:
    found = entry["contenders"].get(name, {})
    if not is_timed(found):
        return None
    unit = 1.0
    if not absolute:
        timed = [n for n, other in entry["contenders"].items() if is_timed(other)]
        base = "U1" if "U1" in timed else timed[0]
        unit = entry["contenders"][base]["median_s"]
    return found["q1_s"] / unit, found["median_s"] / unit, found["q3_s"] / unit


def changes(old: dict[str, Any], new: dict[str, Any], absolute: bool = False) -> list[Change]:
    """All contenders timed in both.

    Raises:
        ValueError: other hardware, nothing in common, or files without rows.
    """
    for name, result in (("OLD", old), ("NEW", new)):
        if "rows" not in result:
            raise ValueError(
                f"compare: {name} must be a result of run.py, got one without rows "
                f"({result.get('kind', 'accuracy')}); compare its tables by eye"
            )
    for key in SAME_MACHINE:
        if old["about"].get(key) != new["about"].get(key):
            raise ValueError(
                f"compare: NEW must be measured on OLD's {key}, got {new['about'].get(key)!r} for "
                f"{old['about'].get(key)!r}; measure both on one machine"
            )
    before = {entry["row"]["name"]: entry for entry in old["rows"]}
    found = []
    for entry in new["rows"]:
        row = entry["row"]["name"]
        for name in entry["contenders"]:
            now = _quartiles(entry, name, absolute)
            then = _quartiles(before[row], name, absolute) if row in before else None
            if now and then:
                found.append(Change(row, name, then, now))
    if not found:
        raise ValueError("compare: NEW must share a timed row with OLD, got none")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--absolute", action="store_true", help="compare seconds")
    parser.add_argument("--threshold", type=float, default=0.1, help="relative slowdown allowed")
    options = parser.parse_args(arguments)
    try:
        found = changes(load(options.old), load(options.new), options.absolute)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    worse = [change for change in found if change.is_regression(options.threshold)]
    for change in sorted(found, key=lambda c: -c.slowdown):
        mark = "REGRESSION" if change in worse else "ok"
        print(f"{mark:10s} {factor(change.slowdown):>7s} {change.row}: {change.contender}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
