"""What "auto" takes: Triton on GPU families with a committed result, and a reason everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gfnode_fast.ops import dispatch

GPU = torch.device("cuda", 0)


@pytest.fixture
def on_sm_90(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def verified(monkeypatch: pytest.MonkeyPatch, families: dict[str, str]) -> None:
    monkeypatch.setattr(dispatch, "verified_gpus", lambda: families)


def test_cpu_is_torch() -> None:
    backend, reason = dispatch.choose_backend("op", "auto", torch.device("cpu"))
    assert backend == "torch"
    assert "cpu" in reason


@pytest.mark.usefixtures("on_sm_90")
def test_gpu_of_a_verified_family_is_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    verified(monkeypatch, {"sm_90": "benchmarks/results/h200.json"})
    backend, reason = dispatch.choose_backend("op", "auto", GPU)
    assert (backend, reason) == ("triton", "passed on sm_90, benchmarks/results/h200.json")
    backend, reason = dispatch.choose_backend("op", "auto", GPU, unserved="too wide")
    assert (backend, reason) == ("torch", "too wide")


@pytest.mark.usefixtures("on_sm_90")
def test_gpu_of_another_family_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    verified(monkeypatch, {"sm_100": "benchmarks/results/b200.json"})
    backend, reason = dispatch.choose_backend("op", "auto", GPU)
    assert backend == "torch"
    assert "not yet run on hardware of this family (sm_90)" in reason


def test_request_is_a_request() -> None:
    assert dispatch.choose_backend("op", "triton", unserved="x") == ("triton", "requested")
    with pytest.raises(ValueError, match=r"op: `backend` must be one of .* got 'cuda'"):
        dispatch.choose_backend("op", "cuda")


def test_every_entry_of_the_list_names_a_committed_result() -> None:
    text = (Path(dispatch.__file__).parent / "verified_gpus.json").read_text("utf-8")
    for entry in json.loads(text):
        assert entry.keys() == {"family", "result"}
        assert (Path(__file__).parents[2] / entry["result"]).is_file()
    assert dispatch.verified_gpus() == {e["family"]: e["result"] for e in json.loads(text)}
