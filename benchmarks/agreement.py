"""No row is timed before this: values and gradients of a contender against the reference, in the
same process.

U1 is compared with U0, the reference itself, on up to CHECK_BATCH molecules in the row's dtype;
everyone else with U1 at the row's own size, where U0 may not fit. Rows of single operations are
compared with their first contender, which is the reference's own code.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.operations import make_task
from benchmarks.registry import Row
from benchmarks.task import Task

CHECK_BATCH = 10
GRADIENT_FLOOR = 1e-3  # of the largest gradient's norm, the scale for smaller ones

# (outputs, gradients), relative error in the 2-norm. tests/golden/README.md sets fp64 and fp32.
TOLERANCES = {
    "fp64": (1e-9, 1e-8),
    "fp32": (1e-5, 1e-3),
    "tf32": (3e-3, 5e-2),
    "bf16": (3e-2, 3e-1),
}
# Not the published steps: they agree within the solver's own tolerance, rtol 1e-3.
SOLVER_TOLERANCE = (5e-3, 2e-2)
OTHER_STEPS = ("ours exact", "ours exact triton", "ours exact captured", "torchode")


class Disagreement(RuntimeError):
    """A contender that does not compute what the reference computes; it is not timed."""


def relative_error(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """‖a - b‖ / max(‖b‖, floor), 0 when both vanish; infinite for non-finite values."""
    actual, expected = actual.double(), expected.double()
    if not torch.isfinite(actual).all():
        return float("inf")
    scale = max(expected.norm().item(), floor)
    difference = (actual - expected).norm().item()
    return difference if scale == 0 else difference / scale


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest relative error of outputs and of gradients.

    Raises:
        Disagreement: different names or shapes.
    """
    shapes = {name: tuple(value.shape) for name, value in expected.items()}
    if {name: tuple(value.shape) for name, value in actual.items()} != shapes:
        raise Disagreement("outputs or gradients have other names or shapes than the reference's")
    norms = [value.norm().item() for name, value in expected.items() if name.startswith("grad")]
    floor = GRADIENT_FLOOR * max(norms, default=0.0)
    errors = {"outputs": 0.0, "gradients": 0.0}
    for name, value in expected.items():
        kind = "gradients" if name.startswith("grad") else "outputs"
        error = relative_error(actual[name], value, floor if kind == "gradients" else 0.0)
        errors[kind] = max(errors[kind], error)
    return errors


def tolerance(contender: str, row: Row) -> tuple[float, float]:
    own = TOLERANCES[row.precision]
    if contender not in OTHER_STEPS:
        return own
    return max(own[0], SOLVER_TOLERANCE[0]), max(own[1], SOLVER_TOLERANCE[1])


def require(contender: str, row: Row, errors: dict[str, float]) -> None:
    """Raises Disagreement where an error exceeds the contender's tolerance in this row."""
    for kind, bound in zip(("outputs", "gradients"), tolerance(contender, row), strict=True):
        if not errors[kind] <= bound:
            raise Disagreement(f"{kind} differ by {errors[kind]:.1e}, allowed {bound:.0e}")


class Checker:
    """Checks the contenders of rows on one device; remembers which configurations of U1 equal
    U0.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._proven: dict[Row, dict[str, float]] = {}

    def check_u1(self, row: Row) -> dict[str, float]:
        """U1 against U0 on a small batch of the row's configuration, in its base dtype."""
        base = "fp64" if row.precision == "fp64" else "fp32"
        small = replace(row, batch=min(row.batch, CHECK_BATCH), precision=base)
        if small not in self._proven:
            expected = make_task("U0", small, self.device).values()
            errors = compare(make_task("U1", small, self.device).values(), expected)
            require("U1", small, errors)
            self._proven[small] = errors
        return self._proven[small]

    def yardstick(self, row: Row, first: str) -> dict[str, Tensor]:
        """Values of the row's first trustworthy contender at the row's own size, in its base
        dtype.
        """
        base = "fp64" if row.precision == "fp64" else "fp32"
        return make_task(first, replace(row, precision=base), self.device).values()

    def check(
        self, contender: str, row: Row, task: Task, expected: dict[str, Tensor]
    ) -> dict[str, float]:
        errors = compare(task.values(), expected)
        require(contender, row, errors)
        return errors
