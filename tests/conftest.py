"""What holds for every test: where kernels run, the `gpu` marker, poisoned memory, one thread.

And a small training run, for the tests of several directories.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

# For `benchmarks`, which is not installed; last, so that an installed gfnode_fast still wins.
sys.path.append(str(Path(__file__).parents[1]))

REQUIRE_GPU = os.environ.get("GFNODE_REQUIRE_GPU", "0") == "1"

# Triton reads this when a kernel is decorated, so it has to be set before anything imports Triton.
if not REQUIRE_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
elif os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise pytest.UsageError(
        "GFNODE_REQUIRE_GPU=1 asks for kernels on the GPU and TRITON_INTERPRET=1 for the "
        "interpreter; unset one of them"
    )

import torch  # noqa: E402 - torch may import Triton

torch.set_num_threads(1)  # xdist workers share the cores, and timings stay comparable


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with NaN where the type has one, else its largest value (torch's own convention)."""
    if torch.compiler.is_compiling() or type(tensor) is not torch.Tensor:
        return tensor  # being traced: a fill would enter the graph, and a fake tensor has no memory
    with torch.no_grad():
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            return tensor.fill_(float("nan"))
        if tensor.dtype is torch.bool:
            return tensor.fill_(True)
        return tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _poison(allocate(*args, **kwargs))

    return allocate_poisoned


# Written through torch.empty because torch.compile cannot trace a saved unbound method.
def _new_empty(self: torch.Tensor, *size: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty(*size, **{"dtype": self.dtype, "device": self.device, **kwargs})


def _new_empty_strided(self: torch.Tensor, *layout: Any, **kwargs: Any) -> torch.Tensor:
    return torch.empty_strided(*layout, **{"dtype": self.dtype, "device": self.device, **kwargs})


@pytest.fixture(scope="session", autouse=True)
def poison_fresh_memory() -> Iterator[None]:
    """Every uninitialised tensor made from Python holds NaN, so that a value never written shows.

    torch's own switch for this needs `use_deterministic_algorithms`, under which tests would run
    other code than users do; `poison_all_memory` uses it where C++ allocates.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
            patch.setattr(torch, name, _poisoned(getattr(torch, name)))
        patch.setattr(torch.Tensor, "new_empty", _new_empty)
        patch.setattr(torch.Tensor, "new_empty_strided", _new_empty_strided)
        yield


@pytest.fixture
def poison_all_memory() -> Iterator[None]:
    """Also poisons what C++ allocates through the dispatcher, under deterministic algorithms."""
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = was_filling
    torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if not REQUIRE_GPU:
        return "kernels are interpreted in this run; GFNODE_REQUIRE_GPU=1 runs the GPU tests"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := _why_no_gpu()):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def trajectory_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from small_run import small_trajectory  # not above: it imports the package

    path = tmp_path_factory.mktemp("trajectory") / "small.npz"
    small_trajectory().save(path)
    return path


@pytest.fixture(scope="session")
def finished_run(trajectory_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A completed run; tests must not write into it."""
    from gfnode_fast.training import train
    from small_run import small_config

    output = tmp_path_factory.mktemp("run") / "finished"
    train(small_config(trajectory_file, output))
    return output


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    expected_failure = hasattr(report, "wasxfail")
    if REQUIRE_GPU and report.skipped and not expected_failure and item.get_closest_marker("gpu"):
        report.outcome = "failed"
        report.longrepr = f"skipped under GFNODE_REQUIRE_GPU=1: {report.longrepr}"
    return report
