"""Files shared by the tests of this directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gfnode_fast.training import train
from small_run import small_config, small_trajectory


@pytest.fixture(scope="session")
def trajectory_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trajectory") / "small.npz"
    small_trajectory().save(path)
    return path


@pytest.fixture(scope="session")
def finished_run(trajectory_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run; tests must not write into it."""
    output = tmp_path_factory.mktemp("run") / "finished"
    train(small_config(trajectory_file, output))
    return output
