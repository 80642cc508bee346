"""Small numbers to a GPU and back, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; from the host through pinned memory, so that nothing waits.

    Raises:
        RuntimeError: host numbers where a CUDA graph is captured, whose replays would not see
            later ones.
    """
    if numbers.device.type != "cpu" or device.type != "cuda":
        return numbers.to(device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"CUDA graph: inputs must be on {device} while it is captured, got a tensor of shape "
            f"{tuple(numbers.shape)} on the host; move it there first"
        )
    return numbers.pin_memory().to(device, non_blocking=True)


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
        """Whether `read` would return at once; does not wait, nor ask while a graph is captured,
        which would end the capture.
        """
        if self._arrived is None:
            return True
        return not torch.cuda.is_current_stream_capturing() and self._arrived.query()

    def read(self) -> list[float]:
        """The numbers; waits for them if need be."""
        if self._arrived is not None:
            self._arrived.synchronize()
        numbers: list[float] = self._values.tolist()
        return numbers
