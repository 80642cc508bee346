"""What the committed CPU results have to show, and why where they do not.

A target is met, or says why it is missed: tests/benchmarks/test_targets.py holds the files to that,
and `report.py` prints the missed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.formatting import factor, is_timed
from benchmarks.registry import CACHED, EAGER_LOOP, MODELS, TWO_THREAD_ROWS, TWO_THREADS, Row

CPU = "cpu.json"
Results = Mapping[str, Mapping[str, Any]]  # by file name
NOT_MEASURED = "not measured yet"


class NotMeasured(LookupError):
    """The committed files do not have what a target asks for."""


@dataclass(frozen=True)
class Target:
    """A bound on a number of the committed results.

    Attributes:
        name: what is claimed, without the bound.
        measured: the number, from the result files; raises NotMeasured.
        bound: the least it may be, or with `at_most` the largest.
        unit: of the number, for the report.
        missed: why it is not met, or not known; empty where it is.
    """

    name: str
    measured: Callable[[Results], float]
    bound: float
    at_most: bool = False
    unit: str = "×"
    missed: str = ""

    @property
    def wanted(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}{self.unit}"

    def met(self, results: Results) -> bool | None:
        """None where it has not been measured."""
        try:
            value = self.measured(results)
        except NotMeasured:
            return None
        return value <= self.bound if self.at_most else value >= self.bound


def _found(results: Results, row: Row, contender: str) -> Mapping[str, Any]:
    for entry in results[CPU]["rows"]:
        if entry["row"]["name"] == row.name and contender in entry["contenders"]:
            found: Mapping[str, Any] = entry["contenders"][contender]
            if is_timed(found):
                return found
    raise NotMeasured(f"{CPU} has no time of {contender} in {row.name}")


def _faster(row: Row, contender: str, than: str) -> Callable[[Results], float]:
    """The ratio of the row where samples were paired, that of medians where it keeps none."""

    def measured(results: Results) -> float:
        baseline, found = _found(results, row, than), _found(results, row, contender)
        [entry] = [e for e in results[CPU]["rows"] if e["row"]["name"] == row.name]
        paired: float | None = entry["ratios"].get(f"{contender} / {than}")
        return paired or float(baseline["median_s"] / found["median_s"])

    return measured


def _peak(row: Row, contender: str, against: str | None = None) -> Callable[[Results], float]:
    """GB, or the share of another contender's peak."""

    def measured(results: Results) -> float:
        peaks = [
            _found(results, row, name).get("peak_bytes")
            for name in (contender, against) if name is not None
        ]  # fmt: skip
        if None in peaks:
            raise NotMeasured(f"{CPU} has no memory of {contender} or {against} in {row.name}")
        return float(peaks[0] / (peaks[1] if against else 2**30))

    return measured


def _growth(contender: str) -> Callable[[Results], float]:
    """Propagation's largest cost per molecule from B = 100 on, against that at B = 50."""

    def measured(results: Results) -> float:
        costs = {
            batch: _found(results, _propagation(batch), contender)["median_s"] / batch
            for batch in (50, 100, 200, 400, 1600, 6400)
        }
        return float(max(costs.values()) / costs[50])

    return measured


def _propagation(batch: int) -> Row:
    return Row("propagation", "backward", batch)


def _step(batch: int, model: str = "egnn") -> Row:
    return Row("model", "step", batch, model=model)


def _eigh(n: int, precision: str, batch: int = 4096) -> Row:
    return Row("eigh", "forward", batch, precision=precision, molecule=f"random {n}")


PRODUCTS = (
    "the products are the same compiled or not, and with interaction of modes most of the time"
)
SECOND_CORE = (
    "a call takes less than 4 ms, and what the second core of this shared machine adds varies from "
    "run to run"
)


def _propagation_targets() -> list[Target]:
    targets = []
    for contender, ratios, seconds in (
        ("ours", {50: 30, 200: 2000}, 0.030),
        ("ours exact", {50: 120, 200: 8000}, 0.0075),
    ):
        for batch, least in ratios.items():
            targets.append(
                Target(
                    f"propagation B={batch}, {contender} against U0",
                    _faster(_propagation(batch), contender, "U0"),
                    least,
                )
            )
        targets.append(
            Target(
                f"propagation B=200, {contender}, time",
                lambda results, name=contender: _found(results, _propagation(200), name)[
                    "median_s"
                ],
                seconds,
                at_most=True,
                unit=" s",
            )
        )
        targets.append(
            Target(
                f"propagation, {contender}, a molecule's cost up to B=6400 against B=50",
                _growth(contender),
                1.2,
                at_most=True,
            )
        )
    for batch, model, missed in (
        (50, "egnn", ""),
        (200, "egnn", ""),
        (50, "sage_attention_concat", PRODUCTS),
        (200, "sage_attention_concat", PRODUCTS),
    ):
        row = Row("solve", "backward", batch, model=model)
        name = f"solve {model} B={batch}, compiled against the eager loop"
        targets.append(Target(name, _faster(row, "ours compiled", EAGER_LOOP), 3, missed=missed))
    return targets


def _model_targets() -> list[Target]:
    forward = Row("model", "forward", 50)
    sage = _step(50, "sage_attention_concat")
    return [
        *(
            Target(
                f"{phase} {model} B=1 against U1",
                _faster(Row("model", phase, 1, model=model), "ours", "U1"),
                1,
            )
            for phase in ("step", "forward")
            for model in MODELS
        ),
        Target("step B=50 against U0", _faster(_step(50), "ours", "U0"), 2.5),
        Target("step B=50 against U1", _faster(_step(50), "ours", "U1"), 1.7),
        Target("step B=200 against U0", _faster(_step(200), "ours", "U0"), 40),
        Target("forward B=50 against U0", _faster(forward, "ours", "U0"), 2.2),
        Target("step sage_attention_concat B=50 against U0", _faster(sage, "ours", "U0"), 2.5),
        Target(
            "step B=100 with recompute against U0", _faster(_step(100), "ours recompute", "U0"), 1.7
        ),
        Target(
            "memory of a step B=100 with recompute against U0's",
            _peak(_step(100), "ours recompute", "U0"),
            1 / 8,
            at_most=True,
        ),
        Target("memory of a step B=800", _peak(_step(800), "ours"), 2, at_most=True, unit=" GB"),
    ]


def _spectra_targets() -> list[Target]:
    targets = []
    for precision in ("fp32", "fp64"):
        sizes = [(n, 4096, 5 if 6 <= n <= 32 else 2 if 32 < n <= 64 else 1)
                 for n in (2, 3, 4, 5, 6, 13, 21, 32, 48, 64)]  # fmt: skip
        sizes += [(n, batch, 1) for n in (96, 128) for batch in (512, 42)]
        for n, batch, least in sizes:
            targets.append(
                Target(
                    f"eigh n={n} B={batch} {precision} against torch.linalg.eigh",
                    _faster(_eigh(n, precision, batch), "ours", "torch"),
                    least,
                )
            )
    for row in (row for row in TWO_THREAD_ROWS if row.op == "eigh"):
        name = f"eigh {row.molecule} B={row.batch}, two threads against one"
        missed = SECOND_CORE if row.molecule in ("random 6", "random 13") else ""
        targets.append(Target(name, _faster(row, TWO_THREADS, "ours"), 1.7, missed=missed))
    cached = _faster(Row("spectrum", "forward", 4096), CACHED[0], "ours")
    name = "spectra B=4096 found in the cache against solving"
    return [*targets, Target(name, cached, 100)]


def _training(file: str, *path: str) -> Callable[[Results], float]:
    """A number in a file of training runs; of its batches, the one that the path names."""

    def measured(results: Results) -> float:
        found: Any = results[file]
        try:
            for key in path:
                if isinstance(found, list):
                    found = next(entry for entry in found if str(entry["batch"]) == key)
                else:
                    found = found[key]
        except (KeyError, StopIteration) as error:
            raise NotMeasured(f"{file} has no {' '.join(path)}") from error
        return float(found)

    return measured


def _training_targets() -> list[Target]:
    faster = ("ratios", "train / published")
    targets = [
        Target(
            f"training B={batch}, data loading included, against the published recipe",
            _training("end-to-end-cpu.json", "batches", str(batch), *faster),
            least,
        )
        for batch, least in ((50, 2.5), (200, 40))
    ]
    for variant in ("fp32", "tf32 emulated", "bf16 emulated"):
        distance = ("variants", variant, "largest_distance")
        targets.append(
            Target(
                f"loss curve {variant}, distance from the reference's in its own spread",
                _training("equivalence-cpu.json", *distance),
                1,
                at_most=True,
                unit=" standard deviations",
            )
        )
    for what in ("time", "memory"):
        targets.append(
            Target(
                f"{what} of 13 to 370 atoms, last exponent in the edges",
                _training("large-systems-cpu.json", what, "last_exponent"),
                1.1,
                at_most=True,
                unit="",
            )
        )
    return targets


TARGETS = [*_propagation_targets(), *_model_targets(), *_spectra_targets(), *_training_targets()]


def complaint(target: Target, results: Results) -> str | None:
    """What is wrong with a target's entry here, or None."""
    met = target.met(results)
    if met and target.missed:
        return f"{target.name} is met; delete its reason, {target.missed!r}"
    if met is None and target.missed != NOT_MEASURED:
        return f"{target.name} is in no committed file; measure it, or say NOT_MEASURED"
    if met is False and target.missed in ("", NOT_MEASURED):
        return f"{target.name} must be {target.wanted}, got {target.measured(results):.3g}; say why"
    return None


def missed_table(results: Results) -> str:
    """How many targets are met, and the others with their reasons."""
    met = {target: target.met(results) for target in TARGETS}
    lines = [
        f"{sum(map(bool, met.values()))} of the {len(TARGETS)} targets for the CPU in "
        "`benchmarks/targets.py` are met. Missed:",
        "",
        "| target | wanted | measured | why |",
        "|" + " --- |" * 4,
    ]
    for target, found in met.items():
        if found is False:
            value = _written(target.measured(results), target.unit)
            cells = (target.name, target.wanted, value, target.missed)
            lines.append("| " + " | ".join(cells) + " |")
    unknown = [target.name for target, found in met.items() if found is None]
    return "\n".join([*lines, "", f"Not measured yet: {'; '.join(unknown) or 'none'}."])


def _written(value: float, unit: str) -> str:
    return factor(value) if unit == "×" else f"{value:.3g}{unit}"
