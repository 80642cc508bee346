"""PART.md: what a part of the acceptance has found, as text."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks import training_part
from benchmarks.formatting import heading
from benchmarks.report import accuracy_table, table
from benchmarks.run import failures
from benchmarks.step_profile import profile_table

LISTED = 20  # tests that took longest


def summary(result: dict[str, Any]) -> str:
    """Everything that is there so far; failures last."""
    parts = [f"# {result['part']}", heading(result["about"])]
    if result["dry_run"]:
        parts.append("Dry run: tiny sizes, C1 as it stands, nothing compiled.")
    if result.get("restarts"):
        parts.append(f"Gone on {result['restarts']} times after the GPU was lost to a fault.")
    if "compiled beforehand" in result:
        parts.append(_beforehand(result["compiled beforehand"]))
    if "ceilings" in result:
        parts.append(_ceilings(result["ceilings"]))
    if "accuracy" in result:
        parts.append(accuracy_table(result["accuracy"]))
    for profiles in ("profiles", "profiles of Triton"):
        parts += [profile_table(profile) for profile in result.get(profiles, [])]
    for name, step in result.get("steps", {}).items():
        last = step["output"].strip().splitlines()[-1:] or [""]
        parts.append(f"- {name}: status {step['status']}, {step['seconds']} s: {last[0]}")
        if step["status"]:
            parts.append("```\n" + step["output"] + "\n```")
    if "tests" in result:
        parts.append(_tests(result["tests"]))
    if result["rows"]:
        parts.append(table(result))
    parts += training_part.summaries(result)
    parts += [f"skipped {name}: {why}" for name, why in result.get("skipped", {}).items()]
    parts += [f"FAILED {line}" for line in failed(result)]
    return "\n\n".join(parts)


def failed(result: dict[str, Any]) -> list[str]:
    """What failed, a line each: pieces, tests, contenders."""
    pieces = [f"{name}: {why}" for name, why in result.get("failed", {}).items()]
    tests = [
        f"{name}: {found['message'].strip()[-700:]}"
        for name, found in result.get("tests", {}).items()
        if found["outcome"] == "failed"
    ]
    return pieces + tests + failures(result)


def _beforehand(shares: list[dict[str, Any]]) -> str:
    """C1's compile times are those of a cache filled by these processes."""
    lines = ["Compiled beforehand, by processes of their own:", ""]
    for share in shares:
        last = share["output"].strip().splitlines()[-1:] or [""]
        lines.append(f"- status {share['status']}, {share['seconds']} s: {last[0]}")
    return "\n".join(lines)


def _ceilings(ceilings: dict[str, Any]) -> str:
    rates = ceilings["matrix_flops_per_s"].items()
    return (
        f"Ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.3f} TB/s; matrix products "
        + ", ".join(f"{name} {rate / 1e12:.3g} Tflop/s" for name, rate in rates)
    )


def _tests(tests: dict[str, dict[str, Any]]) -> str:
    """Counts, why some were expected to fail, and which took longest."""
    counts = Counter(found["outcome"] for found in tests.values())
    lines = ["Tests: " + ", ".join(f"{n} {what}" for what, n in counts.items()), ""]
    reasons = Counter(f["message"] for f in tests.values() if f["outcome"] == "xfailed")
    lines += [f"- xfailed {n} times: {reason}" for reason, n in reasons.items()]
    slowest = sorted(tests.items(), key=lambda item: -item[1]["seconds"])[:LISTED]
    lines += [f"- {found['seconds']:.1f} s: {name}" for name, found in slowest]
    return "\n".join(lines)
