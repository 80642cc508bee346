"""The time that a part of an acceptance may take."""

from __future__ import annotations

import time


class Clock:
    """Time left in this part, and how far the estimates have been off so far."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.estimated = self.taken = 0.0

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def fits(self, estimate: float) -> bool:
        correction = max(1.0, self.taken / self.estimated) if self.estimated else 1.0
        return estimate * correction <= self.left

    def note(self, estimate: float, taken: float) -> None:
        self.estimated += estimate
        self.taken += taken

    def no_time(self, estimate: float) -> str:
        return f"no time: about {estimate:.0f} s, {max(self.left, 0):.0f} s left"
