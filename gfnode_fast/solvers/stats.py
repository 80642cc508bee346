"""What a solve did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gfnode_fast.solvers.transfers import DeviceReport

Outcome = Callable[[list[float]], tuple[int, int, int]]
"""A report's numbers → evaluations, accepted and rejected steps; raises what went wrong."""


class _Count:
    """A count that waits for what a device has yet to report."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_{name}"

    def __get__(self, stats: SolveStats | None, owner: type) -> int:
        if stats is None:
            return 0  # the default of the field
        stats.wait()
        count: int = getattr(stats, self.slot)
        return count

    def __set__(self, stats: SolveStats, value: int) -> None:
        setattr(stats, self.slot, value)


@dataclass
class SolveStats:
    """Counts of one solve; evaluations include the two of an adaptive method's initial step.

    They are the method's, whatever computes them: linear dynamics needs fewer products.

    A solve that runs on a GPU without the host reports its counts and its failure later. Reading a
    count or `wait()` waits for that and raises the failure; `reset()`, at the next solve, raises
    one that has arrived and waits for nothing.

    Attributes:
        launches: how many step attempts of a joint solve a GPU is given, from what earlier solves
            took; 0 as long as none has reported. It grows, and no reset changes it.
    """

    evaluations: _Count = _Count()
    accepted: _Count = _Count()
    rejected: _Count = _Count()
    _pending: list[tuple[DeviceReport, Outcome, int]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    launches: int = field(default=0, init=False, compare=False)
    _solve: int = field(default=0, init=False, repr=False, compare=False)

    def reset(self) -> None:
        """Set all counts to 0; raises the failure of an earlier solve that has been reported."""
        if self._pending:
            self._settle(wait=False)
        self._solve += 1
        self._evaluations = self._accepted = self._rejected = 0

    def wait(self) -> None:
        """Wait for all reports.

        Raises:
            ValueError, SolverError: what went wrong in a solve on the device.
        """
        if self._pending:
            self._settle(wait=True)

    def expect(self, report: Tensor, outcome: Outcome) -> None:
        """Take the counts of a solve from a report (n,) float64 that a device is computing.

        Raises:
            ValueError, SolverError: on the CPU, what `outcome` raises.

        Notes:
            Nothing is expected while a CUDA graph is captured: its solves say by NaN that they
            failed.
        """
        if report.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._pending.append((DeviceReport(report), outcome, self._solve))
        if not report.is_cuda:
            self.wait()

    def _settle(self, *, wait: bool) -> None:
        """Take reports in their order, all of them or those that have arrived."""
        while self._pending and (wait or self._pending[0][0].has_arrived()):
            report, outcome, solve = self._pending.pop(0)
            evaluations, accepted, rejected = outcome(report.read())
            if solve == self._solve:
                self._evaluations += evaluations
                self._accepted += accepted
                self._rejected += rejected
