"""The committed CPU results against what was wanted of them."""

from __future__ import annotations

from copy import deepcopy

import pytest

from benchmarks import report
from benchmarks.registry import Row, contenders, cpu_rows
from benchmarks.targets import (
    NOT_MEASURED,
    TARGETS,
    Results,
    Target,
    complaint,
    missed_table,
)


@pytest.fixture(scope="module")
def committed() -> Results:
    return report.committed_results()


@pytest.mark.parametrize("target", TARGETS, ids=[target.name for target in TARGETS])
def test_a_target_is_met_or_says_why_not(target: Target, committed: Results) -> None:
    assert (problem := complaint(target, committed)) is None, problem


def test_targets_have_names_of_their_own() -> None:
    assert len({target.name for target in TARGETS}) == len(TARGETS)


def test_a_row_that_gets_worse_is_seen(committed: Results) -> None:
    worse = deepcopy(committed)
    name = Row("model", "step", 50).name
    [entry] = [entry for entry in worse["cpu.json"]["rows"] if entry["row"]["name"] == name]
    entry["ratios"]["ours / U0"] = 2.4
    found = [problem for target in TARGETS if (problem := complaint(target, worse))]
    assert found == ["step B=50 against U0 must be ≥ 2.5×, got 2.4; say why"]
    del entry["contenders"]["ours"]
    found = [problem for target in TARGETS if (problem := complaint(target, worse))]
    assert len(found) == 2
    assert all("is in no committed file; measure it" in problem for problem in found)


def test_reasons_that_no_longer_hold_are_seen(committed: Results) -> None:
    for reason in ("too slow", NOT_MEASURED):
        met = Target("met", lambda results: 2.0, 1.0, missed=reason)
        assert complaint(met, committed) == f"met is met; delete its reason, {reason!r}"
    measured = Target("slow", lambda results: 0.5, 1.0, missed=NOT_MEASURED)
    assert complaint(measured, committed) == "slow must be ≥ 1×, got 0.5; say why"


def test_what_is_not_measured_yet_is_registered(committed: Results) -> None:
    """Every row that a target looks at is one of the set that a command measures."""
    rows = [
        {
            "row": row.as_dict(),
            "contenders": {
                name: {"status": "ok", "median_s": 1.0, "peak_bytes": 1} for name in contenders(row)
            },
            "ratios": {},
        }
        for row in cpu_rows()
    ]
    everything = {**committed, "cpu.json": {"rows": rows}}
    assert all(target.met(everything) is not None for target in TARGETS)


def test_the_readme_says_what_is_missed(committed: Results) -> None:
    text = missed_table(committed)
    for target in TARGETS:
        assert (target.name in text) == bool(target.missed)
