"""gfnode_fast.info(): plain data, and a reason wherever something is missing."""

from __future__ import annotations

import importlib
import importlib.util
import json

import pytest
import torch

import gfnode_fast
from gfnode_fast import info
from gfnode_fast._version import __version__


def test_info_survives_json() -> None:
    described = info()
    assert json.loads(json.dumps(described)) == described


def test_versions() -> None:
    described = info()
    assert described["version"] == __version__ == gfnode_fast.__version__
    assert described["packages"]["torch"] == torch.__version__
    assert described["packages"]["torchdiffeq"]


def test_whatever_is_absent_has_a_reason() -> None:
    described = info()
    entries = [
        described["devices"]["cuda"],
        described["extension"],
        *described["backends"].values(),
    ]
    for entry in entries:
        assert entry["available"] == (entry["why_not"] is None)


def test_reference_backend_is_always_available() -> None:
    assert info()["backends"]["reference"] == {"available": True, "why_not": None}


def test_what_auto_takes_is_said() -> None:
    described = info()
    assert set(described["backends"]) == {"torch", "compiled", "reference", "cpp", "triton"}
    for choice in described["auto"].values():
        assert choice["backend"] in {"auto", *described["backends"]}
        assert choice["reason"]
    assert described["auto"]["FourierMD"]["backend"] == "auto"


def test_environment_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFNODE_BACKEND", "torch")
    assert info()["auto"]["FourierMD"] == {
        "backend": "torch",
        "reason": "GFNODE_BACKEND in the environment",
    }
    monkeypatch.setenv("GFNODE_BACKEND", "fast")
    chosen = info()["auto"]["FourierMD"]
    assert chosen["backend"] == "fast"
    assert "`GFNODE_BACKEND` must be one of" in chosen["reason"]


def test_solvers_left_to_torchdiffeq_are_named() -> None:
    solvers = info()["solvers"]
    assert "dopri5" in solvers["own"]
    assert "implicit_adams" in solvers["torchdiffeq"]


def test_missing_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("gfnode_fast.info")  # the package's `info` is the function
    monkeypatch.setattr(module, "PACKAGES", ("a-package-nobody-installed",))
    assert info()["packages"] == {"a-package-nobody-installed": None}


def test_cuda_build_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda = info()["devices"]["cuda"]
    assert cuda["why_not"] == "torch sees no CUDA device"
    assert cuda["devices"] == []


def test_missing_triton_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in info()["backends"]["triton"]["why_not"]


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    first = info()["devices"]["cuda"]["devices"][0]
    assert first["name"] == torch.cuda.get_device_name(0)
    assert first["memory_bytes"] > 0
