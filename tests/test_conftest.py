"""The test session itself: poisoned memory, and what GFNODE_REQUIRE_GPU=1 makes of a skip."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

GPU_TEST = """
import pytest

@pytest.mark.gpu
def test_on_gpu():
    pytest.skip("not today")

def test_elsewhere():
    pytest.skip("not today")
"""

ALLOCATIONS: dict[str, Callable[[], torch.Tensor]] = {
    "empty": lambda: torch.empty(1000),
    "empty_like": lambda: torch.empty_like(torch.zeros(1000)),
    "empty_strided": lambda: torch.empty_strided((10, 100), (1, 10)),
    "empty_permuted": lambda: torch.empty_permuted((10, 100), (1, 0)),
    "new_empty": lambda: torch.zeros(1).new_empty((10, 100)),
    "new_empty_varargs": lambda: torch.zeros(1, dtype=torch.float64).new_empty(10, 100),
    "new_empty_strided": lambda: torch.zeros(1).new_empty_strided((10, 100), (1, 10)),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_fresh_memory_is_nan(name: str) -> None:
    tensor = ALLOCATIONS[name]()
    assert tensor.numel() == 1000
    assert tensor.isnan().all()


def test_new_empty_keeps_its_meaning() -> None:
    base = torch.zeros(2, dtype=torch.float64)
    assert base.new_empty((3,)).dtype == torch.float64
    assert base.new_empty((3,), dtype=torch.int32).dtype == torch.int32
    assert base.new_empty_strided((2, 3), (1, 2)).stride() == (1, 2)


def test_types_without_nan_hold_their_largest_value() -> None:
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty(3, dtype=torch.bool).all()


def test_poison_leaves_parameters_usable() -> None:
    assert torch.empty(3, requires_grad=True).is_leaf


def test_compiled_code_is_left_alone() -> None:
    def double(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x) + x.new_empty(x.shape).copy_(x)

    x = torch.arange(3.0)
    torch.testing.assert_close(torch.compile(double, fullgraph=True, backend="eager")(x), 2 * x)


def test_memory_allocated_below_python_is_nan(poison_all_memory: None) -> None:
    assert torch.ops.aten.empty.memory_format([1000]).isnan().all()


def run_session(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    (folder / "test_gpu.py").write_text(GPU_TEST)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: on a GPU\n")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "GFNODE_", "TRITON_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)],
        cwd=folder,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


def test_gpu_tests_are_skipped_by_default(tmp_path: Path) -> None:
    session = run_session(tmp_path)
    assert session.returncode == 0, session.stdout
    assert "2 skipped" in session.stdout


def test_gpu_skip_is_a_failure_when_required(tmp_path: Path) -> None:
    session = run_session(tmp_path, GFNODE_REQUIRE_GPU="1")
    assert session.returncode == 1, session.stdout
    assert "test_on_gpu" in session.stdout
    assert "skipped under GFNODE_REQUIRE_GPU=1" in session.stdout
    assert "1 skipped" in session.stdout


def test_interpreter_on_the_gpu_is_refused(tmp_path: Path) -> None:
    session = run_session(tmp_path, GFNODE_REQUIRE_GPU="1", TRITON_INTERPRET="1")
    assert session.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unset one of them" in session.stdout + session.stderr
