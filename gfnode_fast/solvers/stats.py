"""What a solve did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class SolveStats:
    """Counts of one solve; evaluations include the two of an adaptive method's initial step.

    They are the method's, whatever computes them: linear dynamics needs fewer products.
    """

    evaluations: int = 0
    accepted: int = 0
    rejected: int = 0

    def reset(self) -> None:
        """Set all counts to 0."""
        self.evaluations = self.accepted = self.rejected = 0
