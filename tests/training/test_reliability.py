"""Kills at random moments, and memory over many steps."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gfnode_fast.training import TrainEvent, train
from run_comparison import assert_same_run
from small_run import small_config

KILLS = int(os.environ.get("GFNODE_KILLS", "5"))
STEPS = int(os.environ.get("GFNODE_STEPS", "1000"))

_RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {helpers!r})
from small_run import small_config
import torch
torch.set_num_threads(1)
from gfnode_fast.training import train
output = Path({output!r})
print("ready", flush=True)
train(
    small_config(Path({trajectory!r}), output, checkpoint_every=1, optim={{"epochs": 40}}),
    resume=(output / "last.json").exists(),
)
"""


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_the_same(trajectory_file, tmp_path) -> None:
    """Anywhere: between steps, in a validation, while a checkpoint is written."""
    config = small_config(
        trajectory_file, tmp_path / "whole", checkpoint_every=1, optim={"epochs": 40}
    )
    began = time.monotonic()
    train(config)
    duration = time.monotonic() - began
    script = _RUN.format(
        helpers=str(Path(__file__).parents[1]),
        output=str(tmp_path / "killed"),
        trajectory=str(trajectory_file),
    )
    moments, killed = random.Random(0), 0
    while killed < KILLS:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moments.uniform(0, duration / 3))
        process.kill()
        killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:  # it was faster: from the start again
            killed += 1
    assert subprocess.run([sys.executable, "-c", script], timeout=300).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
def test_memory_stays_flat(trajectory_file, tmp_path) -> None:
    seen: dict[int, int] = {}

    def watch(event: TrainEvent) -> None:
        if event.kind == "train":
            seen[event.step] = _resident_bytes()

    epochs = STEPS // 2
    config = small_config(
        trajectory_file, tmp_path / "run", optim={"epochs": epochs, "validate_every": 50}
    )
    train(config, progress=watch)
    assert max(seen) == STEPS
    half = [memory for step, memory in seen.items() if step <= STEPS // 2]
    assert max(seen.values()) - max(half) < 2 << 20
