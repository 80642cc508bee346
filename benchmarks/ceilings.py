"""What this machine can do at best: copy bandwidth and matrix rates, measured in the same run."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.task import numerics
from benchmarks.timing import interleaved


def measure_ceilings(device: torch.device, *, tiny: bool = False) -> dict[str, Any]:
    """Bytes per second of a large copy (read + write), flops per second of a large product."""
    on_gpu = device.type == "cuda"
    copied = 2**20 if tiny else (2**30 if on_gpu else 2**27)
    side = 256 if tiny else (8192 if on_gpu else 1024)
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    half = a.bfloat16(), b.bfloat16()
    effort = {"rounds": 3 if tiny else 10, "seconds_each": 0.2 if tiny else 1.0}

    def best(run: Any) -> float:
        return min(interleaved({"run": run}, device, **effort)["run"].samples)

    rates = {}
    for precision in ("fp32", "tf32", "bf16") if on_gpu else ("fp32",):
        # The products themselves are bfloat16: autocast would convert at every call.
        operands, switch = (half, "fp32") if precision == "bf16" else ((a, b), precision)
        with numerics(switch, device):
            rates[precision] = 2 * side**3 / best(lambda o=operands: o[0] @ o[1])
    return {
        "copy_bytes_per_s": 2 * copied / best(lambda: target.copy_(source)),
        "matrix_flops_per_s": rates,
    }


def higher(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The higher of two measurements: other work on the machine only ever lowers one."""
    rates = first["matrix_flops_per_s"]
    return {
        "copy_bytes_per_s": max(first["copy_bytes_per_s"], second["copy_bytes_per_s"]),
        "matrix_flops_per_s": {
            name: max(rate, second["matrix_flops_per_s"][name]) for name, rate in rates.items()
        },
    }
