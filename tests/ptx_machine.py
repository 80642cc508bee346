"""One warp of an emulated GPU: PTX as Triton writes it for sm_80, 32 threads at a time.

`Warp.steps` runs to each barrier of the block, so that whoever drives several warps chooses their
order between barriers. Threads that part are run one place in the program after another, the
earliest first, until they meet. Memory is bytes at their real addresses; whatever touches another
byte than an argument's, or a misaligned one, is a `Fault`. Registers and shared memory begin as
ones in every bit, NaN as numbers.

Rounding is the hardware's but where PTX leaves it open: `ex2.approx`, `tanh.approx`, `div.full` are
exact here, and a product of matrices sums in float64.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from ptx_instructions import Instructions, operands
from ptx_state import WARP, Fault, Memory, Run


def statements(ptx: str) -> tuple[list[str], dict[str, int]]:
    """The program's instructions, and where its labels stand."""
    body = ptx[re.search(r"\.visible \.entry \w+\(.*?\)\n", ptx, re.DOTALL).end() :]
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        if line.startswith(".section"):
            break
        if label := re.match(r"(\$\w+):$", line):
            labels[label[1]] = len(found)
        elif line.startswith("{ .reg"):  # a register of one line
            found.append(line.split(";")[1].strip())
        elif line and not line.startswith("."):
            found += [s for part in line.split(";") if (s := part.strip()) and s not in "{}"]
    return found, labels


class Warp(Instructions):
    """Registers and program of 32 threads, the `number`-th such of a block."""

    def __init__(self, ptx: str, number: int) -> None:
        declared = re.findall(r"\.reg \.\w+\s+%(\w+?)<(\d+)>;", ptx)
        super().__init__({bank: int(count) for bank, count in declared}, number)
        text, self.labels = statements(ptx)
        self.program = [self._decode(statement) for statement in text]

    def begin(self, program: tuple[int, int, int], shared: Memory) -> None:
        """Before a block's first instruction."""
        for axis, index in zip("xyz", program, strict=True):
            self.set_special(f"%ctaid.{axis}", index)
        for rows in self.registers.values():
            rows[...] = True if rows.dtype == np.bool_ else np.iinfo(rows.dtype).max
        self.shared, self.copies = shared, [[]]

    def steps(self) -> Iterator[int]:
        """Run; yields where it waits at a barrier."""
        place = np.zeros(WARP, np.int64)
        while True:
            here = int(place.min())
            mask = place == here
            name, run, guard, negated, text = self.program[here]
            act = mask if guard is None else mask & (guard ^ negated)
            try:
                if name == "bra":
                    place[mask] = here + 1
                    place[act] = self.labels[text]
                    continue
                if name in ("bar", "ret"):
                    if not act.all():
                        raise Fault(f"reached by {int(act.sum())} of {WARP} threads")
                    if name == "ret":
                        return
                    yield here
                elif act.any():
                    run(act)
            except Fault as fault:
                raise Fault(f"{fault}, at `{text}`") from fault
            place[mask] = here + 1

    def _decode(self, statement: str) -> tuple[str, Run | None, np.ndarray | None, bool, str]:
        guard, negated = None, False
        if guarded := re.match(r"@(!?)(%p\d+)\s+(.*)$", statement):
            negated, guard = bool(guarded[1]), self._operand(guarded[2], "pred")
            statement = guarded[3]
        name, _, rest = statement.replace("\t", " ").partition(" ")
        first, *parts = name.split(".")
        if first == "bra":
            return "bra", None, guard, negated, rest.strip()
        if name == "bar.sync":
            return "bar", None, guard, negated, statement
        if first == "ret":
            return "ret", None, guard, negated, statement
        try:
            run = self._instruction(first, parts, operands(rest))
        except (Fault, KeyError, AttributeError, TypeError, ValueError) as error:
            raise Fault(f"not emulated: `{statement}` ({error!r})") from error
        return "do", run, guard, negated, statement
