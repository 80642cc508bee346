"""A pytest plugin: Triton kernels compiled for sm_80 and run on an emulated GPU, not interpreted.

    python -m pytest -p on_ptx tests/ops/test_mode_rhs.py -k triton

with `tests/` on PYTHONPATH. What the interpreter cannot show is seen here: products and reductions
as hardware takes them, which thread reads and writes what, barriers. Every launch is run twice,
once with the warps of a program in order between barriers and the programs in order, once both in
reverse order; two accesses that nothing separates change places between the two, and other bits
are a `Fault`. (Copies of a sum in several threads of a warp may differ in rounding where multiply
and add are fused; which copy a store keeps, CUDA leaves open.)
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel

from ptx_machine import Warp
from ptx_state import Fault, Memory

LAUNCHES: collections.Counter[str] = collections.Counter()


class Driver:
    """What Triton asks of a GPU before it compiles and launches."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 80, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Block:
    """A compiled kernel's program, run warp by warp."""

    def __init__(self, kernel: CompiledKernel) -> None:
        self.name, self.shared = kernel.name, kernel.metadata.shared
        self.kinds = list(kernel.src.signature.values())
        self.warps = [Warp(kernel.asm["ptx"], i) for i in range(kernel.metadata.num_warps)]
        header = kernel.asm["ptx"].split(".visible .entry")[1].split(")\n")[0]
        self.parameters = [line.split()[-1].strip(",") for line in header.splitlines()[1:]]

    def launch(self, grid: tuple[int, int, int], given: list[Any]) -> None:
        tensors = [value for value in given if isinstance(value, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
        memories = [
            Memory(np.frombuffer((ctypes.c_uint8 * s.nbytes()).from_address(at), np.uint8), at)
            for at, s in storages.items()
            if s.nbytes()
        ]
        values = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in given]
        values += [0] * (len(self.parameters) - len(values))  # Triton's scratch, unused
        for warp in self.warps:
            warp.arguments = memories
            warp.parameters = dict(zip(self.parameters, values, strict=True))
            for axis, size in zip("xyz", grid, strict=True):
                warp.set_special(f"%nctaid.{axis}", size)
        programs = list(np.ndindex(*grid))
        before = [memory.data.copy() for memory in memories]
        self.run(programs, self.warps)
        after = [memory.data.copy() for memory in memories]
        for memory, bytes_before in zip(memories, before, strict=True):
            memory.data[:] = bytes_before
        self.run(programs[::-1], self.warps[::-1])
        for memory, expected in zip(memories, after, strict=True):
            if not np.array_equal(memory.data, expected):
                raise Fault(f"{self.name}: bits depend on the order of warps or of programs")
        LAUNCHES[self.name] += 1

    def run(self, programs: list[tuple[int, ...]], warps: list[Warp]) -> None:
        with np.errstate(all="ignore"):
            for program in programs:
                shared = Memory(np.full(self.shared, 0xFF, np.uint8), 0)
                running = []
                for warp in warps:
                    warp.begin(program, shared)
                    running.append(warp.steps())
                try:
                    self.together(running)
                except Fault as fault:
                    raise Fault(f"{self.name}: {fault}, program {program}") from fault

    @staticmethod
    def together(running: list[Iterator[int]]) -> None:
        """All warps from barrier to barrier, one after the other."""
        while True:
            places = {next(warp, None) for warp in running}
            if places == {None}:
                return
            if len(places) > 1:
                raise Fault("warps wait at different barriers")


def _flat(values: Any, kinds: Any) -> Iterator[Any]:
    for value, kind in zip(values, kinds, strict=True):
        if isinstance(kind, (tuple, list)):
            yield from _flat(value, kind)
        elif kind != "constexpr":
            yield value


def _load(kernel: CompiledKernel) -> None:
    """In place of handing the compiled kernel to a GPU."""
    if kernel.module is not None:
        return
    kernel.module = kernel.function = block = Block(kernel)

    def run(x: int, y: int, z: int, *rest: Any) -> None:
        # after stream, function, metadata (2) and hooks (2) come the kernel's arguments
        block.launch((x, y, z), list(_flat(rest[6:], block.kinds)))

    kernel._run = run


triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.interpret = False  # also once conftest.py has asked for the interpreter
CompiledKernel._init_handles = _load


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, count in sorted(LAUNCHES.items()):
        terminalreporter.write_line(f"{name}: {count} launches, emulated")
    if path := os.environ.get("GFNODE_EMULATED_LAUNCHES"):
        Path(path).write_text(json.dumps(LAUNCHES))
