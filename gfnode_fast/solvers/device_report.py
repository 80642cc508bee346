"""A few numbers that a GPU will report, without a synchronisation of their own."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceReport:
    """Numbers on their way to the host.

    On a GPU they are copied to pinned memory on the current stream, and an event behind the copy
    says when they have arrived. On the CPU they are there at once.

    Args:
        values: (n,) float64.
    """

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            with torch.cuda.device(values.device):
                self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
                self._values.copy_(values, non_blocking=True)
                self._arrived = torch.cuda.Event()
                self._arrived.record()

    def has_arrived(self) -> bool:
        """Whether `read` would return at once; does not wait."""
        return self._arrived is None or self._arrived.query()

    def read(self) -> list[float]:
        """The numbers; waits for them if need be."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
