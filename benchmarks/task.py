"""Something to run, check and time; the numerics it runs under; why a contender may be missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import normal
from benchmarks.registry import Row


class Unavailable(RuntimeError):
    """A contender that cannot take part here; the message says why."""


@dataclass
class Task:
    """`run` is what is timed; `values` are its outputs and gradients."""

    run: Callable[[], Any]
    values: Callable[[], dict[str, Tensor]]
    min_bytes: int | None = (
        None  # inputs read once and outputs written once, where that is the limit
    )


def require_device(precision: str, device: torch.device) -> None:
    """Raises Unavailable where a precision needs a GPU."""
    if precision in ("tf32", "bf16") and device.type != "cuda":
        raise Unavailable(f"{precision} needs a CUDA device, this is {device}")


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[None]:
    """torch's own switches for tf32, and autocast for bf16."""
    require_device(precision, device)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def named_outputs(outputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)}


def named_gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    # A parameter that takes no part has no gradient in one contender and zeros in another.
    return {
        f"grad {name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.detach().clone()
        for name, leaf in leaves.items()
    }


def _clear(leaves: dict[str, Tensor]) -> None:
    for leaf in leaves.values():
        leaf.grad = None


def function_task(
    row: Row,
    call: Callable[[], tuple[Tensor, ...]],
    leaves: dict[str, Tensor],
    parameters: dict[str, Tensor] | None = None,
    min_bytes: int | None = None,
) -> Task:
    """A function of tensors: forward alone, or forward and backward from fixed cotangents.

    No loss is timed: one of the outputs' size would be fresh memory of several times what the
    function itself takes, and for large batches page faults would be most of the time.
    """
    leaves = leaves | (parameters or {})
    cotangents: list[Tensor] = []

    def forward() -> tuple[Tensor, ...]:
        begin()
        with torch.no_grad(), numerics(row.precision, _device(leaves)):
            return call()

    def backward() -> tuple[Tensor, ...]:
        begin()
        _clear(leaves)
        with numerics(row.precision, _device(leaves)):
            outputs = call()
            if not cotangents:
                cotangents.extend(normal(out.shape, out) for out in outputs)
            torch.autograd.backward(outputs, cotangents)
        return outputs

    def values() -> dict[str, Tensor]:
        if row.phase == "forward":
            return named_outputs(forward())
        return named_outputs(backward()) | named_gradients(leaves)

    return Task(forward if row.phase == "forward" else backward, values, min_bytes)


def on_two_threads(task: Task) -> Task:
    """The task on two threads, in the process in which other contenders have as many as it has.

    Raises:
        Unavailable: there is one core for them.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("the process is pinned to one core")

    def threaded(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            before = torch.get_num_threads()
            torch.set_num_threads(2)
            try:
                return call()
            finally:
                torch.set_num_threads(before)

        return run

    return Task(threaded(task.run), threaded(task.values), task.min_bytes)


def begin() -> None:
    # CUDA graphs of one iteration may overwrite the outputs of the last one, not each other's.
    torch.compiler.cudagraph_mark_step_begin()


def _device(leaves: dict[str, Tensor]) -> torch.device:
    return next(iter(leaves.values())).device
