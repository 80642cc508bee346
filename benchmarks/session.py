"""What a part of the acceptance has found so far: on disk after every piece, so that a cut loses
one piece alone, and gone on with by another process after a kernel's fault, which takes the GPU
from the process it happens in.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.acceptance_report import summary
from benchmarks.agreement import Checker
from benchmarks.clock import Clock
from benchmarks.measure import Effort, measure, predict_u0_seconds
from benchmarks.registry import Row, contenders
from benchmarks.run import put, write


class DeviceLost(RuntimeError):
    """This process can no longer use the GPU."""


def is_lost(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def estimated_seconds(row: Row, device: torch.device) -> float:
    """With what is compiled beforehand compiled; U0 at B = 4096 is one step of half a minute."""
    names = contenders(row, "cuda")
    union = predict_u0_seconds(row, device) if "U0" in names else 0.0
    return 3.0 + 0.7 * len(names) + (20.0 if "C1" in names else 0.0) + 1.2 * union


@dataclass
class Session:
    """One part: its result, where it is written, its time, and what it leaves out."""

    result: dict[str, Any]
    folder: Path
    clock: Clock
    device: torch.device
    dry: bool = False
    without: Collection[str] = ()
    checker: Checker = field(init=False)

    def __post_init__(self) -> None:
        self.checker = Checker(self.device)

    def save(self) -> str:
        """Write PART.json and PART.md, and return the latter's text."""
        text = summary(self.result)
        write(self.result, self.folder / f"{self.result['part']}.json")
        (self.folder / f"{self.result['part']}.md").write_text(text + "\n")
        return text

    def say(self, what: str) -> None:
        print(f"[{self.clock.left:4.0f} s left] {what}", file=sys.stderr, flush=True)

    def piece(self, name: str, estimate: float, run: Callable[[], Any]) -> None:
        """Store what `run` returns, or why it failed or did not run, under `name`; once.

        Raises:
            DeviceLost: another process has to go on.
        """
        failed = self.result.setdefault("failed", {})
        if name in self.result or name in failed:
            return
        if not self.clock.fits(estimate):
            self.result.setdefault("skipped", {})[name] = self.clock.no_time(estimate)
            self.save()
            return
        self.say(name)
        try:
            with self.clock.piece(estimate):
                self.result[name] = run()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error)[:500]}"
        self.save()
        if is_lost(self.device):
            raise DeviceLost(name)

    def row(self, row: Row, effort: Effort) -> None:
        """Measure a row, once; one in which the GPU was lost again, without who lost it.

        Raises:
            DeviceLost: another process has to go on, with this row.
        """
        known = {entry["row"]["name"]: entry for entry in self.result["rows"]}
        earlier = known.get(row.name, {})
        if earlier and not earlier.get("unfinished"):
            return
        guilty: dict[str, Any] = earlier.get("guilty", {})
        estimate = estimated_seconds(row, self.device)
        if self.clock.fits(estimate):
            self.say(row.name)
            entry = self._measured(row, effort, estimate, guilty)
        else:
            entry = self._of_all(row, "skipped", self.clock.no_time(estimate))
        entry["contenders"] |= guilty
        lost = is_lost(self.device)
        if lost:
            found = entry["contenders"].items()
            new = [n for n, c in found if "CUDA" in c.get("reason", "") and n not in guilty]
            entry["unfinished"] = bool(new)  # those after the first had no GPU any more
            entry["guilty"] = guilty | {name: entry["contenders"][name] for name in new[:1]}
        put(self.result, entry)
        self.save()
        if lost:
            raise DeviceLost(row.name)

    def _measured(
        self, row: Row, effort: Effort, estimate: float, guilty: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            with self.clock.piece(estimate):
                # In a dry run, what needs a GPU is reported as unavailable.
                without = {*self.without, *guilty}
                return measure(row, self.device, self.checker, effort, without, kind="cuda")
        except Exception as error:
            return self._of_all(row, "failed", f"{type(error).__name__}: {str(error)[:300]}")

    def _of_all(self, row: Row, status: str, reason: str) -> dict[str, Any]:
        names = [name for name in contenders(row, "cuda") if name not in self.without]
        found = {"status": status, "reason": reason}
        return {"row": row.as_dict(), "contenders": dict.fromkeys(names, found), "ratios": {}}
