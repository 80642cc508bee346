"""FourierMD(backend=, precision=): what runs, that it is said, that a request never falls back."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gfnode_fast
from gfnode_fast.nn import backends, fourier_md
from gfnode_fast.ops import dispatch, graph_layers
from golden_files import relative_error
from model_inputs import constructor, inputs, moved

LAYERS = ("encoder layers", "decoder layers")
propagate_module = importlib.import_module("gfnode_fast.ops.propagate")
SOLVES = ("solve of features", "solve of coordinates")


def build(**changes: Any) -> gfnode_fast.FourierMD:
    torch.manual_seed(0)
    return gfnode_fast.FourierMD(**constructor(), **changes)


def running(model: gfnode_fast.FourierMD) -> dict[str, str]:
    return {name: part.backend for name, part in model.backend_report().parts.items()}


def of_any_size(backend: str) -> tuple[gfnode_fast.GFNODE, dict[str, Any]]:
    """The same for molecules of different size, and the same molecules for it."""
    arguments, given = constructor(), inputs()
    del arguments["num_atoms"], given["loc_mean"]
    given["eigvecs"] = given.pop("U_batch").flatten()
    given["ptr"] = torch.tensor([0, 5, 10])
    return gfnode_fast.GFNODE(**arguments, backend=backend), given


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends with which layers and propagation are called."""
    seen: list[str] = []
    for name in ("apply_layer", "propagate"):
        original = getattr(fourier_md, name)

        def spy(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            seen.append(f"{name} {kwargs['backend']}")
            return original(*args, **kwargs)

        monkeypatch.setattr(fourier_md, name, spy)
    return seen


@pytest.mark.parametrize(
    ("backend", "layers", "inverse"),
    [("auto", "cpp", "cpp"), ("torch", "torch", "torch"), ("cpp", "cpp", "cpp")],
)
def test_what_is_reported_is_what_runs(
    backend: str,
    layers: str,
    inverse: str,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = propagate_module.synthesise_solved
    monkeypatch.setattr(
        propagate_module,
        "synthesise_solved",
        lambda *args: calls.append("synthesis cpp") or original(*args),
    )
    model = build(backend=backend)
    model(**inputs())
    parts = running(model)
    assert {parts[name] for name in LAYERS} == {layers}
    assert {parts[name] for name in SOLVES} == {layers}
    assert (parts["graph Fourier transform"], parts["inverse transform"]) == ("torch", inverse)
    expected = {f"apply_layer {layers}", f"propagate {layers}"}
    assert set(calls) == expected | ({"synthesis cpp"} if inverse == "cpp" else set())
    calls.clear()
    flat_model, given = of_any_size(backend)
    flat_model(**given)
    assert running(flat_model)["inverse transform"] == inverse
    assert ("synthesis cpp" in calls) == (inverse == "cpp")


class Joined(TorchDispatchMode):
    """Shapes of what `cat` puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default:
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_decoder_gets_its_first_input_in_one_piece(backend: str) -> None:
    model, given = build(backend=backend), inputs()
    with Joined() as joined:
        model(**given)
        mixed, flat = of_any_size(backend)
        mixed(**flat)
    width = model.hidden_nf + model.time_emb_dim
    assert not [s for s in joined.shapes if s[-1] == width and math.prod(s[:-1]) == 4 * 10]


def test_reference_runs_nothing_of_ours(calls: list[str]) -> None:
    model = build(backend="reference")
    expected = gfnode_fast.reference.FourierMD(**constructor())
    expected.load_state_dict(model.state_dict())
    assert torch.equal(model(**inputs())[0], expected(**inputs())[0])
    assert not calls
    assert set(running(model).values()) == {"reference"}


@pytest.mark.parametrize("backend", ["torch", "cpp", "reference"])
def test_backends_agree(backend: str) -> None:
    expected = build()(**inputs())
    for ours, theirs in zip(build(backend=backend)(**inputs()), expected, strict=True):
        assert relative_error(ours, theirs) < 1e-5  # measured 3e-7


def test_auto_follows_the_dtype_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gfnode_fast"):
        model = build()
        assert "encoder layers" in caplog.text
        logged = len(caplog.records)
        model(**inputs())
        assert len(caplog.records) == logged
        model.double()(**inputs(dtype=torch.float64))
    assert "float64" in caplog.records[-1].getMessage()
    assert running(model)["decoder layers"] == "torch"
    assert "float64" in model.backend_report().parts["decoder layers"].reason


def test_report_is_plain_and_readable() -> None:
    report = build().backend_report()
    assert json.loads(json.dumps(dataclasses.asdict(report)))["requested"]["backend"] == "auto"
    lines = str(report).splitlines()
    assert lines[0].startswith("backend auto (per part what measured best), fp32")
    assert len(lines) == 1 + len(report.parts) == 7
    assert all(part.reason for part in report.parts.values())


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"propagate_x": False}, "solve of coordinates", "not propagated"),
        ({"no_ode": True}, "solve of features", "one application"),
        ({"solver": "implicit_adams"}, "solve of features", "torchdiffeq"),
        ({"solver_mode": "exact"}, "solve of features", "exponentials"),
        ({"time_mode": "posenc"}, "encoder layers", "rounding"),
        ({"activation": nn.ReLU()}, "decoder layers", "ReLU"),
        (
            {"fourier_basis": None, "no_fourier": True, "num_modes": 5},
            "inverse transform",
            "no_fourier",
        ),
    ],
)
def test_reasons(changes: dict[str, Any], name: str, reason: str) -> None:
    model = gfnode_fast.FourierMD(**constructor(**changes))
    assert reason in model.backend_report().parts[name].reason


def test_autocast_is_said() -> None:
    model = build()
    with torch.autocast("cpu", torch.bfloat16):
        assert running(model)["decoder layers"] == "reference"
    assert running(model)["decoder layers"] == "cpp"


def test_auto_takes_triton_on_verified_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    request = build()._request()
    gpu = torch.device("cuda", 0)
    parts = backends.choose_parts(request, gpu, torch.float32, False)
    assert parts["decoder layers"].backend == "torch"
    assert "not yet run on hardware" in parts["decoder layers"].reason
    monkeypatch.setattr(dispatch, "verified_gpus", lambda: {"sm_90": "a row"})
    parts = backends.choose_parts(request, gpu, torch.float32, False)
    assert set(parts.values()) == {backends.Part("triton", "passed on sm_90, a row")}
    attention = gfnode_fast.FourierMD(**constructor(mode_interaction="attention", time_mode="rope"))
    parts = backends.choose_parts(attention._request(), gpu, torch.float32, False)
    assert parts["solve of features"].backend == "torch"
    assert "no Triton: time_mode='rope'" in parts["solve of features"].reason
    assert parts["decoder layers"].backend == "triton"
    many = gfnode_fast.FourierMD(**constructor(num_modes=129, num_atoms=129))
    parts = backends.choose_parts(many._request(), gpu, torch.float32, False)
    for name in ("graph Fourier transform", "solve of features", "inverse transform"):
        assert parts[name].backend == "torch"
        assert "at most 128 modes, not 129" in parts[name].reason


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GFNODE_BACKEND", "reference")
    for model in (build(), build(backend=None)):
        assert (model.backend, model.backend_reason) == (
            "reference",
            "GFNODE_BACKEND in the environment",
        )
    assert (build(backend="cpp").backend, build(backend="cpp").backend_reason) == (
        "cpp",
        "requested",
    )
    monkeypatch.setenv("GFNODE_BACKEND", "")
    assert build().backend == "auto"
    monkeypatch.setenv("GFNODE_BACKEND", "fastest")
    with pytest.raises(ValueError, match=r"`GFNODE_BACKEND` must be one of .* got 'fastest'"):
        build()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"precision": "fp16"}, ValueError, "`precision` must be one of"),
        ({"precision": None}, TypeError, "`precision` must be one of"),
        ({"precision": "tf32", "backend": "torch"}, ValueError, "use backend='triton'"),
        ({"precision": "bf16", "backend": "cpp"}, ValueError, "use backend='triton'"),
        ({"backend": "cpp", "activation": nn.ReLU()}, TypeError, "`activation` must be nn.SiLU"),
        ({"backend": "cpp", "time_mode": "posenc"}, ValueError, "posenc"),
        ({"backend": "compiled", "fourier_basis": "linear"}, RuntimeError, "linear"),
        ({"backend": "triton", "mode_interaction": "concat"}, RuntimeError, "concat"),
        ({"backend": "triton", "no_ode": True}, RuntimeError, "no_ode"),
        ({"backend": "triton", "activation": nn.ReLU()}, TypeError, "Triton graph layers"),
        ({"precision": "tf32", "activation": nn.ReLU()}, TypeError, "Triton graph layers"),
        ({"recompute": 1}, TypeError, "`recompute`"),
        ({"max_attempts": 0}, ValueError, "`max_attempts` must be at least 1, got 0"),
    ],
)
def test_refused_at_construction(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gfnode_fast.FourierMD(**constructor(**changes))


def test_cpp_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "why_not_compiled", lambda: "it was not built")
    with pytest.raises(RuntimeError, match=r"got 'cpp'; it was not built"):
        build(backend="cpp")
    assert running(build())["decoder layers"] == "torch"


def test_cpp_of_another_dtype_is_refused_at_the_first_use() -> None:
    model = build(backend="cpp").double()
    with pytest.raises(TypeError, match="got 'cpp'.*float64"):
        model(**inputs(dtype=torch.float64))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(TypeError, match="autocast"),
    ):
        build(backend="cpp")(**inputs())


def test_triton_and_reduced_precision_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="got 'triton'; it needs a GPU"):
        build(backend="triton")
    for precision in ("tf32", "bf16"):
        with pytest.raises(RuntimeError, match=f"got '{precision}'; it needs a GPU"):
            build(precision=precision)


def test_triton_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="install triton"):
        build(backend="triton")


def test_precision_is_handed_to_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def refuse(op: str, backend: str, precision: str, *_: Any) -> Any:
        asked.append((backend, precision))
        raise RuntimeError("seen")

    monkeypatch.setattr(graph_layers, "_kernels", refuse)
    with pytest.raises(RuntimeError, match="seen"):
        build(precision="bf16")(**inputs())
    assert asked == [("triton", "bf16")]


def test_a_precision_of_its_own_overrides_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def layer(module: nn.Module, state: Any, edges: Any, edge_fea: Any, **options: Any) -> Any:
        asked.append((options["backend"], options["precision"]))
        assert not torch.is_autocast_enabled("cpu")
        assert {part.dtype for part in (*state, edge_fea)} == {torch.float32}
        return state

    monkeypatch.setattr(fourier_md, "apply_layer", layer)
    model = build(precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        x = model(**inputs())[0]
    assert x.dtype == torch.float32
    assert set(asked) == {("triton", "bf16")}


@pytest.mark.gpu
@pytest.mark.parametrize("solver_mode", ["joint", "exact"])
def test_a_step_on_triton_waits_for_nothing(solver_mode: str) -> None:
    model = build(backend="triton", solver_mode=solver_mode).cuda()
    given = moved(inputs(), "cuda")
    model(**given)[0].square().mean().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**given)[0].square().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_copies_and_pickles() -> None:
    model = build(backend="torch", recompute=True)
    expected = model(**inputs())[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs())[0], expected)
        assert other.backend_report() == model.backend_report()


def test_what_is_set_later_is_served_or_refused() -> None:
    given = inputs()
    torch.manual_seed(0)
    model = gfnode_fast.FourierMD(**constructor(propagate_x=False))
    model(**given)
    model.propagate_x, model.backend = True, "torch"
    assert running(model)["decoder layers"] == running(model)["solve of coordinates"] == "torch"
    for mine, expected in zip(model(**given), build(backend="torch")(**given), strict=True):
        torch.testing.assert_close(mine, expected)
    model.backend, model.solver_mode = "reference", "exact"
    with pytest.raises(ValueError, match="`solver_mode` must be 'joint'"):
        model(**given)
