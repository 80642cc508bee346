"""Data-parallel training: which process this is, and what the processes tell each other.

Each rank runs its share of every batch; gradients and loss are summed in one all-reduce before
the update, which is then the same everywhere. Not torch's DistributedDataParallel: that takes
the mean of gradients, equal to the gradient of the whole batch only if all shares have equal size.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class PeerLostError(RuntimeError):
    """Another process of the same run has ended; the error that matters is that one's."""


class Ranks:
    """The processes of one run; of one process, every method does nothing.

    Attributes:
        rank, count: this process's number, from 0, and how many there are.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, index: Tensor) -> Tensor:
        """This rank's part of (B,) windows: disjoint, in order, together all; maybe empty."""
        return index.tensor_split(self.count)[self.rank]

    def sum(self, tensors: list[Tensor]) -> None:
        """Add up each tensor over the ranks, in place, the same bits everywhere.

        Raises:
            PeerLostError: another rank ended.
        """
        if self.count == 1:
            return
        joined = torch.cat([tensor.flatten() for tensor in tensors])
        self._collect(joined, dist.ReduceOp.SUM)
        for tensor, part in zip(
            tensors, joined.split([tensor.numel() for tensor in tensors]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is true on any rank; waits for the device where there are several."""
        if self.count == 1:
            return flag
        found = torch.tensor(float(flag), device=device)
        self._collect(found, dist.ReduceOp.MAX)
        return bool(found)

    def wait(self, device: torch.device) -> None:
        """Until every rank is here."""
        self.any(False, device)

    def _collect(self, values: Tensor, how: dist.ReduceOp.RedOpType) -> None:
        try:
            dist.all_reduce(values, op=how)
        except RuntimeError as error:
            raise PeerLostError(
                f"train: rank {self.rank} lost another rank of its {self.count}; the message of "
                "the one that ended first says why"
            ) from error


@contextlib.contextmanager
def joined_ranks(device: torch.device) -> Iterator[Ranks]:
    """The processes that torchrun started (RANK and WORLD_SIZE in the environment), connected.

    NCCL connects GPUs, gloo CPUs. A process group of the caller's own is used as it is.

    Raises:
        RuntimeError: torch was built without the means of communication.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_available() and dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if count == 1:
        yield Ranks()
        return
    if not dist.is_available():
        raise RuntimeError(
            f"train: `WORLD_SIZE` must be 1 with a torch built without torch.distributed, got "
            f"{count}; start one process"
        )
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(name: str) -> str:
    """The device that a configuration means in this process: one GPU for each of torchrun's."""
    local = os.environ.get("LOCAL_RANK")
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if many and local is not None and torch.cuda.is_available() and name in ("auto", "cuda"):
        return f"cuda:{local}"
    return name


def is_first_process() -> bool:
    """Whether this process speaks for the run."""
    return int(os.environ.get("RANK", "0")) == 0
