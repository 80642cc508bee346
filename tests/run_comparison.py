"""Whether two training runs are the same."""

from __future__ import annotations

from pathlib import Path

import torch

from gfnode_fast.training import read_metrics
from gfnode_fast.training.checkpoint import read_checkpoint


def assert_same_run(one: Path, two: Path) -> None:
    """Everything but times and places is equal, bit for bit."""
    for name in ("last.json", "best.json"):
        first, second = read_checkpoint(one / name), read_checkpoint(two / name)
        for part in ("model", "state"):
            left, right = getattr(first, part), getattr(second, part)
            assert left.keys() == right.keys()
            for key, tensor in left.items():
                assert torch.equal(tensor, right[key]), (name, part, key)
        left, right = dict(first.manifest), dict(second.manifest)
        for manifest in (left, right):
            del manifest["files"], manifest["config"]
            del manifest["position"]["seconds"]
        assert left == right
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(directory)]
        for directory in (one, two)
    ]
    assert rows[0] == rows[1]
