"""Where the time of one training step goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.operations import make_task
from benchmarks.registry import Row
from benchmarks.task import Unavailable

PROFILE_ROWS = 40


def profile_step(
    row: Row, device: torch.device, candidates: Sequence[str] = ("ours", "U1")
) -> dict[str, Any]:
    """Device time per kernel (per operation on a CPU) of one training step of the first candidate
    that is there.
    """
    for contender in candidates:
        try:
            task = make_task(contender, row, device)
            break
        except Unavailable:
            continue
    else:
        raise Unavailable(f"none of {', '.join(candidates)}")
    for _ in range(3):
        task.run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        task.run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    on_device = device.type == "cuda"
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    kernels = [
        {
            "name": event.key,
            "calls": event.count,
            "us": event.self_device_time_total if on_device else event.self_cpu_time_total,
        }
        for event in profiler.key_averages()
        if event.device_type == kind  # an operation on the host carries its kernels' time again
    ]
    kernels = sorted((k for k in kernels if k["us"] > 0), key=lambda k: -k["us"])
    return {
        "row": row.name,
        "contender": contender,
        "launches": sum(k["calls"] for k in kernels),
        "total_us": sum(k["us"] for k in kernels),
        "kernels": kernels[:PROFILE_ROWS],
    }


def profile_table(profile: dict[str, Any]) -> str:
    total = profile["total_us"]
    lines = [
        f"Profile of {profile['row']}, {profile['contender']}: {total / 1e3:.3f} ms in "
        f"{profile['launches']} calls",
        "",
        "| kernel | calls | µs | share |",
        "|" + " --- |" * 4,
    ]
    for kernel in profile["kernels"]:
        name = kernel["name"].replace("|", "\\|")[:100]
        share = kernel["us"] / total
        lines.append(f"| {name} | {kernel['calls']} | {kernel['us']:.1f} | {share:.1%} |")
    return "\n".join(lines)
