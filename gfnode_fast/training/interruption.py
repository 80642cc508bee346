"""Signals that end a run in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def interruptions() -> Iterator[threading.Event]:
    """An event set by the first SIGINT or SIGTERM; the second gets the previous handler."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        event.set()
        signal.signal(number, previous[signal.Signals(number)])

    for number in signals:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number in signals:
            signal.signal(number, previous[number])
