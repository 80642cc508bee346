"""Registers and memory of one warp of an emulated GPU."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

WARP = 32
TYPES = {
    "b8": np.uint8, "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
BANKS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}

Mask = np.ndarray
Run = Callable[[Mask], None]


class Fault(RuntimeError):
    """What hardware would not forgive, or what is not emulated."""


class Memory:
    """Bytes from an address on."""

    def __init__(self, data: np.ndarray, base: int) -> None:
        self.data, self.base = data, base

    def holds(self, address: np.ndarray, size: int) -> np.ndarray:
        return (address >= self.base) & (address + size <= self.base + self.data.size)


class State:
    """Of 32 threads: a row of registers each, the arguments' bytes, the block's shared ones."""

    def __init__(self, registers: dict[str, int], number: int) -> None:
        self.registers = {b: np.zeros((n, WARP), BANKS[b]) for b, n in registers.items()}
        self.special: dict[str, np.ndarray] = {"tmp": np.zeros(WARP, np.uint32)}
        self.set_special("%tid.x", number * WARP + np.arange(WARP))
        self.parameters: dict[str, Any] = {}
        self.arguments: list[Memory] = []
        self.shared = Memory(np.zeros(0, np.uint8), 0)

    def set_special(self, name: str, value: Any) -> None:
        self.special.setdefault(name, np.zeros(WARP, np.uint32))[:] = value

    def _operand(self, token: str, kind: str) -> np.ndarray:
        """A view of a register as this type, or a constant."""
        dtype = np.dtype(TYPES[kind])
        if register := re.match(r"%(rs|rd|r|p)(\d+)$", token):
            row = self.registers[register[1]][int(register[2])]
            if row.dtype == dtype:
                return row
            views = row.view(dtype)
            return views[:: len(views) // WARP]  # its low part
        if token.startswith("%") or token == "tmp":
            return self.special.setdefault(token, np.zeros(WARP, np.uint32)).view(dtype)
        if kind == "pred":
            return np.full(WARP, int(token, 0) != 0)
        if token == "global_smem":
            value = 0
        else:
            value = int(token[2:], 16) if token[:2] in ("0f", "0d") else int(token, 0)
        bits = np.array([value % (1 << 8 * dtype.itemsize)], f"u{dtype.itemsize}")
        return np.repeat(bits.view(dtype), WARP)

    def _address(self, text: str) -> Callable[[], np.ndarray]:
        base, offset = re.match(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]$", text).groups()
        row = self._operand(base, "s64" if base.startswith("%rd") else "u32")
        return lambda: row.astype(np.int64) + int(offset or 0)

    def _places(
        self, space: str, address: np.ndarray, size: int, act: Mask
    ) -> Iterator[tuple[Memory, np.ndarray]]:
        """Memory by memory, which threads touch it; every byte must lie in one."""
        if (address[act] % size).any():
            raise Fault(f"misaligned access of {size} bytes")
        left = act.copy()
        for memory in [self.shared] if space == "shared" else self.arguments:
            if (here := left & memory.holds(address, size)).any():
                left &= ~here
                yield memory, np.flatnonzero(here)
        if left.any():
            raise Fault(f"access outside {space} memory by lane {np.flatnonzero(left)[0]}")

    def _load(self, space: str, address: np.ndarray, size: int, act: Mask) -> np.ndarray:
        """(32, size) bytes; zeros where a thread takes no part."""
        loaded = np.zeros((WARP, size), np.uint8)
        for memory, lanes in self._places(space, address, size, act):
            at = address[lanes, None] - memory.base + np.arange(size)
            loaded[lanes] = memory.data[at]
        return loaded

    def _store(self, space: str, address: np.ndarray, values: np.ndarray, act: Mask) -> None:
        size = values.shape[1]
        for memory, lanes in self._places(space, address, size, act):
            at = address[lanes, None] - memory.base + np.arange(size)
            memory.data[at] = values[lanes]

    def _assign(self, to: str, kind: str, value: Callable[[], np.ndarray]) -> Run:
        target = self._operand(to, kind)

        def run(act: Mask) -> None:
            np.copyto(target, value(), where=act, casting="unsafe")

        return run
