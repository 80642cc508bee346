"""What each PTX instruction that Triton writes for sm_80 does to a warp's state."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from ptx_state import TYPES, WARP, Fault, Mask, Run, State

LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE // 4, LANE % 4  # how fragments of matrices are dealt out
HALF = {"b64": "b32", "b32": "b16"}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _truncate_to_tf32(bits: np.ndarray) -> np.ndarray:
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def _round_bits(bits: np.ndarray, dropped: int, ties_to_even: bool) -> np.ndarray:
    """float32 bits rounded to fewer of them; NaN stays NaN."""
    wide = bits.astype(np.int64)
    last = (wide >> dropped) & 1 if ties_to_even else 1
    rounded = (wide + (1 << (dropped - 1)) - 1 + last) >> dropped << dropped
    nan = np.isnan(bits.view(np.float32))
    return np.where(nan, np.uint32(0x7FFF0000), rounded & 0xFFFFFFFF).astype(np.uint32)


def _to_bf16(bits: np.ndarray) -> np.ndarray:
    return _round_bits(bits, 16, ties_to_even=True) >> 16


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Integers, towards zero; anything for y = 0, as on hardware."""
    safe = np.where(y == 0, 1, y).astype(y.dtype)
    return (x - np.fmod(x, safe)) // safe


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    wide = np.float64 if x.dtype == np.float32 else np.longdouble
    return (x.astype(wide) * y + z).astype(x.dtype)


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fused, "sqrt": np.sqrt,
    "mad": lambda x, y, z: x * y + z,
    "rcp": lambda x: (1 / x).astype(x.dtype),
    "ex2": lambda x: np.exp2(x.astype(np.float64)).astype(x.dtype),
    "tanh": lambda x: np.tanh(x.astype(np.float64)).astype(x.dtype),
    "neg": np.negative, "abs": np.abs, "not": np.invert,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


def operands(text: str) -> list[str]:
    """Operands, those in braces or brackets together."""
    return [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text)]


def vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


class Instructions(State):
    """`_instruction` turns a statement into a function of the threads that take part."""

    # cp.async: groups of copies that are under way, the last one not yet committed
    copies: list[list[tuple[np.ndarray, np.ndarray, np.ndarray, Mask, Mask]]]

    def _instruction(self, op: str, parts: list[str], args: list[str]) -> Run:
        kind = parts[-1] if parts else ""
        special = getattr(self, f"_{op}", None)
        if special is not None:
            return special(parts, args)
        if op in ("mul", "mad") and "wide" in parts:
            wide = kind[0] + str(2 * int(kind[1:]))
            inputs = [self._operand(arg, kind) for arg in args[1:3]]
            inputs = inputs + [self._operand(arg, wide) for arg in args[3:]]
            return self._assign(
                args[0], wide, lambda: ARITHMETIC[op](*(x.astype(TYPES[wide]) for x in inputs))
            )
        if "hi" in parts or "sat" in parts:
            raise Fault(op)
        inputs = [self._operand(arg, kind) for arg in args[1:]]
        function = ARITHMETIC.get(op)
        if op in ("div", "rem"):
            if kind[0] == "f":
                function = np.divide
            else:
                function = _divide if op == "div" else lambda x, y: x - y * _divide(x, y)
        elif op in ("min", "max"):
            names = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}[op]
            function = names["NaN" in parts or kind[0] != "f"]
        if function is None:
            raise Fault(op)
        if kind == "pred" and op == "not":
            function = np.logical_not
        return self._assign(args[0], kind, lambda: function(*inputs))

    def _bar(self, parts: list[str], args: list[str]) -> Run:
        if parts[:2] != ["warp", "sync"]:
            raise Fault("barrier")
        return lambda act: None  # the threads of a warp run together

    def _mov(self, parts: list[str], args: list[str]) -> Run:
        kind = parts[-1]
        if args[0].startswith("{"):
            whole = self._operand(args[1], kind)
            targets = [
                None if part == "_" else self._operand(part, HALF[kind]) for part in vector(args[0])
            ]

            def split(act: Mask) -> None:
                halves = np.ascontiguousarray(whole).view(TYPES[HALF[kind]]).reshape(WARP, 2)
                for target, half in zip(targets, halves.copy().T, strict=True):
                    if target is not None:
                        np.copyto(target, half, where=act)

            return split
        if args[1].startswith("{"):
            halves = [self._operand(part, HALF[kind]) for part in vector(args[1])]
            return self._assign(args[0], kind, lambda: np.stack(halves, 1).view(TYPES[kind])[:, 0])
        value = self._operand(args[1], kind)
        return self._assign(args[0], kind, lambda: value)

    def _ld(self, parts: list[str], args: list[str]) -> Run:
        space, kind = parts[0], parts[-1]
        if space == "param":
            name = args[1].strip("[] ")
            wide = "s64" if args[0].startswith("%rd") and kind == "s32" else kind
            return self._assign(args[0], wide, lambda: self.parameters[name])
        held = "b16" if kind == "b8" else kind
        targets = [self._operand(part, held) for part in vector(args[0])]
        address, size = self._address(args[1]), np.dtype(TYPES[kind]).itemsize

        def run(act: Mask) -> None:
            loaded = self._load(space, address(), size * len(targets), act)
            values = loaded.view(TYPES[kind])
            for target, value in zip(targets, values.T, strict=True):
                np.copyto(target, value, where=act)

        return run

    def _st(self, parts: list[str], args: list[str]) -> Run:
        space, kind = parts[0], parts[-1]
        held = "b16" if kind == "b8" else kind
        values = [self._operand(part, held) for part in vector(args[1])]
        address = self._address(args[0])

        def run(act: Mask) -> None:
            stored = np.stack(values, 1).astype(TYPES[kind])
            self._store(space, address(), stored.view(np.uint8), act)

        return run

    def _cp(self, parts: list[str], args: list[str]) -> Run:
        """cp.async: read when issued, written when waited for; the source must not change."""
        if parts[1] == "commit_group":
            return lambda act: self.copies.append([])
        if parts[1] == "wait_group":
            allowed = int(args[0], 0)

            def wait(act: Mask) -> None:
                while len(self.copies) - 1 > allowed:
                    for to, source, values, full, issued in self.copies.pop(0):
                        again = self._load("global", source, values.shape[1], full)
                        if not np.array_equal(again, values):
                            raise Fault("memory changed while it was copied")
                        self._store("shared", to, values, issued)

            return wait
        to, source, size = self._address(args[0]), self._address(args[1]), int(args[2], 0)
        taken = self._operand(args[3] if len(args) > 3 else args[2], "s32")

        def run(act: Mask) -> None:
            if not np.isin(taken[act], (0, size)).all():
                raise Fault("copy of a part")
            full = act & (taken > 0)
            values = self._load("global", source(), size, full)
            self.copies[-1].append((to(), source(), values, full, act.copy()))

        return run

    def _together(self, act: Mask) -> None:
        if not act.all():
            raise Fault(f"{int(act.sum())} of {WARP} threads take part")

    def _ldmatrix(self, parts: list[str], args: list[str]) -> Run:
        targets = [self._operand(part, "b32") for part in vector(args[0])]
        address = self._address(args[1])
        if "trans" in parts:
            row, byte = np.stack([2 * IN_GROUP, 2 * IN_GROUP + 1]), 2 * GROUP
        else:
            row, byte = np.stack([GROUP, GROUP]), 4 * IN_GROUP

        def run(act: Mask) -> None:
            self._together(act)
            starts = address()
            for j, target in enumerate(targets):
                low, high = (starts[8 * j + r] + byte for r in row)
                if "trans" not in parts:
                    high = high + 2
                halves = [self._load("shared", at, 2, act) for at in (low, high)]
                target[:] = np.concatenate(halves, 1).view(np.uint32)[:, 0]

        return run

    def _shfl(self, parts: list[str], args: list[str]) -> Run:
        target, value, by = (self._operand(arg, "u32") for arg in args[:3])
        if int(args[3], 0) != 31 or parts[1] not in ("bfly", "idx"):
            raise Fault("shuffle")

        def run(act: Mask) -> None:
            self._together(act)
            target[:] = value[(LANE ^ by) & 31 if parts[1] == "bfly" else by & 31]

        return run

    def _redux(self, parts: list[str], args: list[str]) -> Run:
        value, function = self._operand(args[1], "s32"), getattr(np, parts[1])
        assign = self._assign(args[0], "s32", lambda: np.repeat(function(value), WARP))

        def run(act: Mask) -> None:
            self._together(act)
            assign(act)

        return run

    def _setp(self, parts: list[str], args: list[str]) -> Run:
        how, kind = parts[0], parts[-1]
        x, y = self._operand(args[1], kind), self._operand(args[2], kind)

        def unordered() -> np.ndarray:
            return np.isnan(x) | np.isnan(y)

        if how == "nan":
            return self._assign(args[0], "pred", unordered)
        if how == "num":
            return self._assign(args[0], "pred", lambda: ~unordered())
        if kind[0] == "f" and how.endswith("u"):
            compare = COMPARE[how[:-1]]
            return self._assign(args[0], "pred", lambda: compare(x, y) | unordered())
        if kind[0] == "f" and how == "ne":
            return self._assign(args[0], "pred", lambda: (x != y) & ~unordered())
        return self._assign(args[0], "pred", lambda: COMPARE[how](x, y))

    def _selp(self, parts: list[str], args: list[str]) -> Run:
        x, y = (self._operand(arg, parts[-1]) for arg in args[1:3])
        chosen = self._operand(args[3], "pred")
        return self._assign(args[0], parts[-1], lambda: np.where(chosen, x, y))

    def _prmt(self, parts: list[str], args: list[str]) -> Run:
        """Four bytes picked from eight."""
        low, high = (self._operand(arg, "b32") for arg in args[1:3])
        chosen = [int(args[3].rstrip("U"), 0) >> 4 * i & 15 for i in range(4)]
        if max(chosen) > 7:
            raise Fault("sign of a byte")

        def value() -> np.ndarray:
            eight = np.stack([low, high], 1).view(np.uint8)
            return np.ascontiguousarray(eight[:, chosen]).view(np.uint32)[:, 0]

        return self._assign(args[0], "b32", value)

    def _shl(self, parts: list[str], args: list[str]) -> Run:
        kind = parts[-1].replace("b", "u")
        x, by = self._operand(args[1], kind), self._operand(args[2], "u32")
        bits = x.dtype.itemsize * 8
        return self._assign(
            args[0], kind, lambda: np.where(by < bits, x << (by % bits).astype(x.dtype), 0)
        )

    def _shr(self, parts: list[str], args: list[str]) -> Run:
        kind = parts[-1].replace("b", "u")
        x, by = self._operand(args[1], kind), self._operand(args[2], "u32")
        most = x.dtype.itemsize * 8 - 1

        def value() -> np.ndarray:
            beyond = x >> np.array(most, x.dtype) if kind[0] == "s" else 0
            return np.where(by > most, beyond, x >> np.minimum(by, most).astype(x.dtype))

        return self._assign(args[0], kind, value)

    def _bfe(self, parts: list[str], args: list[str]) -> Run:
        x = self._operand(args[1], "u32")
        first, count = int(args[2]), int(args[3])

        def value() -> np.ndarray:
            field = (x.astype(np.int64) >> first) & ((1 << count) - 1)
            sign = 1 << (count - 1)
            return (field ^ sign) - sign if parts[-1] == "s32" else field

        return self._assign(args[0], parts[-1], value)

    def _cvt(self, parts: list[str], args: list[str]) -> Run:
        to, source = parts[-2], parts[-1]
        if to == "tf32":
            x = self._operand(args[1], "b32")
            return self._assign(args[0], "b32", lambda: _round_bits(x, 13, ties_to_even=False))
        if to == "bf16x2":
            high, low = (self._operand(arg, "b32") for arg in args[1:])
            return self._assign(
                args[0],
                "b32",
                lambda: _to_bf16(high) << 16 | _to_bf16(low),
            )
        if to == "bf16":
            x = self._operand(args[1], "b32")
            return self._assign(args[0], "b16", lambda: _to_bf16(x))
        if source == "bf16":
            x = self._operand(args[1], "b16")
            return self._assign(args[0], "b32", lambda: x.astype(np.uint32) << 16)
        x = self._operand(args[1], source)
        towards = {"rzi": np.trunc, "rpi": np.ceil, "rmi": np.floor, "rni": np.rint}
        rounding = next((towards[part] for part in parts if part in towards), None)

        def value() -> np.ndarray:
            rounded = x if rounding is None else rounding(x)
            if source[0] == "f" and to[0] != "f":
                limits = np.iinfo(TYPES[to])
                rounded = np.clip(np.nan_to_num(rounded.astype(np.float64)), limits.min, limits.max)
            return rounded.astype(TYPES[to])

        return self._assign(args[0], to, value)

    def _mma(self, parts: list[str], args: list[str]) -> Run:
        shape, of = parts[2], parts[-2]
        fragments = {  # element type, rows of a, depth, elements a register holds
            ("m16n8k8", "tf32"): ("b32", 16, 8, 1),
            ("m16n8k16", "bf16"): ("b32", 16, 16, 2),
            ("m8n8k4", "f64"): ("f64", 8, 4, 1),
        }
        held, rows, depth, packed = fragments[shape, of]
        sums = "f64" if of == "f64" else "f32"
        a, b = ([self._operand(part, held) for part in vector(args[i])] for i in (1, 2))
        d, c = ([self._operand(part, sums) for part in vector(args[i])] for i in (0, 3))
        half = depth // 2 if depth > 4 else depth  # depth that one register of b spans
        row_blocks = rows // 8

        def elements(register: np.ndarray) -> list[np.ndarray]:
            if of == "f64":
                return [register]
            if of == "tf32":
                return [_truncate_to_tf32(register)]
            return [(register << 16).view(np.float32), (register >> 16 << 16).view(np.float32)]

        def run(act: Mask) -> None:
            self._together(act)
            left, right = np.empty((rows, depth)), np.empty((depth, 8))
            for i, register in enumerate(a):
                for j, value in enumerate(elements(register)):
                    k = packed * IN_GROUP + j + half * (i // row_blocks)
                    left[GROUP + 8 * (i % row_blocks), k] = value
            for i, register in enumerate(b):
                for j, value in enumerate(elements(register)):
                    right[packed * IN_GROUP + j + half * i, GROUP] = value
            product = left @ right
            for i, (target, addend) in enumerate(zip(d, c, strict=True)):
                target[:] = product[GROUP + 8 * (i // 2), 2 * IN_GROUP + i % 2] + addend

        return run
