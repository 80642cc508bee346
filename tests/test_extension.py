"""gfnode_fast._C: built, loaded on first need, and what is said when it is absent or unfit."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from gfnode_fast import _extension
from gfnode_fast._version import __version__


@pytest.fixture
def load_afresh() -> Iterator[None]:
    _extension.why_no_extension.cache_clear()
    yield
    _extension.why_no_extension.cache_clear()


def reason() -> str:
    found = _extension.why_no_extension()
    assert found is not None
    return found


def test_extension_loads() -> None:
    assert _extension.why_no_extension() is None


def test_binary_says_what_it_is() -> None:
    assert _extension.why_no_extension() is None
    binary = _extension.binary_info()
    assert binary["version"] == __version__
    assert binary["torch_abi"] == "2.11"
    assert binary["compiler"].startswith(("gcc ", "clang "))
    assert (binary["cuda"] is None) == (binary["cuda_architectures"] == [])
    record = _extension.build_record()
    if record is not None:  # `setup.py build_ext --inplace` alone leaves none
        assert record["extension"] == ("cuda" if binary["cuda"] else "cpu")


def test_operator_goes_through_torch() -> None:
    assert _extension.why_no_extension() is None
    torch.library.opcheck(torch.ops.gfnode_fast.build_info.default, (), test_utils="test_schema")


def test_nothing_is_loaded_at_import() -> None:
    code = (
        "import sys, gfnode_fast, torch\n"
        "assert 'gfnode_fast._C' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("load_afresh")
def test_absent_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gfnode_fast._C", None)
    monkeypatch.setattr(_extension, "build_record", lambda: {"reason": "no C++ compiler"})
    assert reason().startswith("it was not built: no C++ compiler; reinstall")
    assert "GFNODE_BUILD" in reason()


@pytest.mark.usefixtures("load_afresh")
def test_package_that_was_never_installed_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gfnode_fast._C", None)
    monkeypatch.setattr(_extension, "build_record", lambda: None)
    assert "without being installed" in reason()


@pytest.mark.usefixtures("load_afresh")
def test_binary_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError("undefined symbol: aoti_torch_x")

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert reason().startswith(f"it does not load with torch {torch.__version__} (undefined symbol")


@pytest.mark.usefixtures("load_afresh")
def test_stale_binary_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "__version__", "9.9.9")
    assert reason().startswith(f"it was built for version {__version__}, this is 9.9.9; reinstall")
