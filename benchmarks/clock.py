"""The time that a part of an acceptance, and each of its pieces, may take."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class OutOfTime(RuntimeError):
    """A piece that took longer than it may."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Interrupt the main thread by OutOfTime after that long, and again after each quarter of it:
    whoever goes on with something else has that long for it.
    """

    def ring(*_: object) -> NoReturn:
        raise OutOfTime(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, max(seconds / 4, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Clock:
    """Time left in this part, and how far the estimates have been off so far."""

    def __init__(self, minutes: float) -> None:
        self.end = time.perf_counter() + 60 * minutes
        self.estimated = self.taken = 0.0

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def within(self, seconds: float) -> Clock:
        """That long, or what is left of this one."""
        return Clock(min(seconds, self.left) / 60)

    def fits(self, estimate: float) -> bool:
        correction = max(1.0, self.taken / self.estimated) if self.estimated else 1.0
        return estimate * correction <= self.left

    @contextmanager
    def piece(self, estimate: float) -> Iterator[None]:
        """Interrupt what takes three times as long as estimated, and learn from what it took."""
        began = time.perf_counter()
        try:
            with at_most(max(1.0, min(3 * estimate + 10, self.left))):
                yield
        finally:
            self.estimated += estimate
            self.taken += time.perf_counter() - began

    def no_time(self, estimate: float) -> str:
        return f"no time: about {estimate:.0f} s, {max(self.left, 0):.0f} s left"
