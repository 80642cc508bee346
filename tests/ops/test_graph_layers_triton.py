"""The Triton graph layers, interpreted or on a GPU, against the reference's modules in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.rounded import rounded_graph_layers
from gfnode_fast.nn.graph_layers import apply_layer
from gfnode_fast.ops import graph_layers_triton as on_triton
from gfnode_fast.ops.graph_layers import egnn_layer
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MLPWeights
from gfnode_fast.ops.topology import topology
from graph_layer_cases import (
    TOLERANCES,
    VARIANTS,
    Edges,
    assert_close,
    cast,
    make_inputs,
    odd,
    ours,
    published,
    ragged,
    values,
)
from graph_layer_cases import edges_of as edges_on_cpu
from graph_layer_cases import make_layer as layer_on_cpu
from graph_layer_cases import molecules as molecules_on_cpu
from op_checks import (
    DEVICE,
    OF_KERNELS,
    REQUIRE_GPU,
    compiled_equals_eager,
    opcheck,
    relative_error,
    strided,
)

pytest.importorskip("triton", reason="triton is not installed on this platform")
pytestmark = OF_KERNELS

# Kernel in a reduced mode against the same layer in float64 with rounded operands; measured beside
# it. An operand that the two round to different sides differs by one unit of the mode.
ROUNDED = {"tf32": 1e-3, "bf16": 3e-3}  # 4e-4, 2e-3
ALLOWED_ERROR = 1.5  # against float64, over that of rounded operands
if REQUIRE_GPU:  # whose tf32 may cut operands off, and whose SiLU is tanh.approx; not yet measured
    ROUNDED, ALLOWED_ERROR = {"tf32": 4e-3, "bf16": 9e-3}, 3.0


def placed(graph: tuple[int, Edges]) -> tuple[int, Edges]:
    num_nodes, (row, col) = graph
    return num_nodes, (row.to(DEVICE), col.to(DEVICE))


def edges_of(graph: str) -> tuple[int, Edges]:
    return placed(edges_on_cpu(graph))


def make_layer(*args: Any, **options: Any) -> nn.Module:
    return layer_on_cpu(*args, **options).to(DEVICE)


def compare(
    variant: str,
    graph: tuple[int, Edges],
    dtype: torch.dtype,
    *,
    width: int = 5,
    copies: int = 2,
    whole: bool = True,
) -> None:
    num_nodes, edges = graph
    layer = make_layer(width=width, **VARIANTS[variant])
    given = make_inputs(num_nodes, edges, copies, width)
    expected = values(published, layer, given, num_nodes, edges)
    layer, given = layer.to(dtype), cast(given, dtype)
    max_nodes = 1 if whole else None
    got = values(ours, layer, given, num_nodes, edges, backend="triton", max_nodes=max_nodes)
    assert got["output"].dtype == dtype
    assert_close(got, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_every_gradient(variant: str) -> None:
    compare(variant, placed(odd()), torch.float32)


@pytest.mark.parametrize("graph", ["no edges", "empty"])
@pytest.mark.parametrize("variant", ["egnn", "sage", "gcn"])
def test_without_edges(variant: str, graph: str) -> None:
    compare(variant, edges_of(graph), torch.float32, copies=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_and_tiles_of_nodes(variant: str) -> None:
    compare(variant, edges_of("unsorted"), torch.float64, whole=False)


@pytest.mark.parametrize(
    ("variant", "whole", "width"), [("egnn", True, 33), ("sage", True, 27), ("gcn", False, 27)]
)
def test_molecules_of_different_size(
    variant: str, whole: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several items a program, tiles a block, chunks of edges a tile, and columns past a tile."""
    from gfnode_fast.kernels import egnn_layer_launch

    monkeypatch.setattr(egnn_layer_launch, "CHUNK", 16)
    compare(variant, placed(ragged()), torch.float32, width=width, whole=whole)


def test_displacements_are_clamped() -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer("egnn", 5)
    given = make_inputs(num_nodes, edges, copies=1, width=5)
    given["x"] *= 1e4
    expected = values(published, layer, given, num_nodes, edges)
    layer, given = layer.float(), cast(given, torch.float32)
    got = values(ours, layer, given, num_nodes, edges, backend="triton")
    for key in ("output", "x"):
        assert relative_error(got[key], expected[key]) < TOLERANCES[torch.float32], key


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_reduced_precision_rounds_operands(variant: str, precision: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(width=16, **VARIANTS[variant])
    given = make_inputs(num_nodes, edges, 1, 16)
    # operands that float32 holds, so that both round the same numbers in the first product
    layer, given = layer.float().double(), cast(cast(given, torch.float32), torch.float64)
    exact = values(published, layer, given, num_nodes, edges)
    with rounded_graph_layers(precision):
        expected = values(ours, layer, given, num_nodes, edges, backend="torch")
    layer, given = layer.float(), cast(given, torch.float32)
    options = {"backend": "triton", "precision": precision}
    got = values(ours, layer, given, num_nodes, edges, **options)
    for key, value in expected.items():
        scale = max(value.norm().item(), 1e-2)
        assert (got[key].double() - value).norm().item() / scale <= ROUNDED[precision], key
    error = relative_error(expected["output"], exact["output"])
    assert relative_error(got["output"], exact["output"]) <= ALLOWED_ERROR * error
    assert error > 1e-5  # rounding there was


@pytest.mark.parametrize("variant", ["egnn", "gcn"])
def test_strides_cotangents_and_determinism(variant: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(width=4, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)

    def run(inputs: dict[str, Tensor], expanded: bool) -> list[Tensor]:
        leaves = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        out = ours(layer, leaves, num_nodes, edges, backend="triton")
        ones = out.new_ones(()).expand(out.shape) if expanded else out.new_ones(out.shape)
        return [out, *torch.autograd.grad(out, list(leaves.values()), ones)]

    plain = run(given, False)
    spread = run({key: strided(value) for key, value in given.items()}, True)
    for a, b in zip(plain, spread, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_independent_of_the_buffer(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from gfnode_fast.kernels import row_products_launch

    num_nodes, edges = edges_of("duplicates and a loop")
    layer = make_layer(variant, 4).float()
    given = cast(make_inputs(num_nodes, edges, 3, 4), torch.float32)
    once = values(ours, layer, given, num_nodes, edges, backend="triton")
    monkeypatch.setattr(row_products_launch, "BUFFER_BYTES", 1)  # a copy at a time
    by_copy = values(ours, layer, given, num_nodes, edges, backend="triton")
    for key, value in once.items():
        if key in ("output", "x", "v", "h"):  # the others are sums over copies
            assert torch.equal(by_copy[key], value), key
        assert relative_error(by_copy[key], value) < 1e-5, key


@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_sums_taken_again_in_backward_are_the_same(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of copies from the second on too, with chunks of edges, and after either form of forward."""
    from gfnode_fast.kernels import egnn_layer_launch, row_products_launch

    monkeypatch.setattr(egnn_layer_launch, "CHUNK", 16)
    monkeypatch.setattr(row_products_launch, "BUFFER_BYTES", 1)
    num_nodes, edges = placed(ragged((3, 14)))
    layer = make_layer(variant, 4).float()
    given = cast(make_inputs(num_nodes, edges, 2, 4), torch.float32)
    kept, again = (
        values(ours, layer, given, num_nodes, edges, backend="triton", **options)
        for options in ({"max_nodes": 14}, {"max_nodes": None, "recompute": True})
    )
    for key, value in kept.items():
        assert torch.equal(again[key], value), key


@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_nan_stays_with_its_neighbours(variant: str) -> None:
    num_nodes, edges = placed(molecules_on_cpu(2))
    layer = make_layer(width=4, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)
    given["x"][0] = float("nan")
    out = ours(layer, given, num_nodes, edges, backend="triton", max_nodes=6)
    assert torch.isnan(out).any(dim=1).nonzero().flatten().tolist() == [0, 1, 5]


def test_registered_operators() -> None:
    num_nodes, edges = edges_of("one node")  # tests have edges where operators are traced
    built = topology(*edges, num_nodes)
    given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)
    leaves = {key: value.requires_grad_() for key, value in given.items()}
    neighbours = list(built.neighbours)
    state = (leaves["x"], leaves["v"], leaves["h"], leaves["edge_fea"])
    for name, op in (("egnn", on_triton.triton_egnn_layer), ("gcn", on_triton.triton_mean_layer)):
        weights = list(make_layer(name, 4).float().parameters())
        opcheck(op, *state, neighbours, weights, False, True, 1, "fp32", name == "gcn")


@pytest.mark.parametrize("variant", ["egnn", "gcn"])
def test_traced_whole(variant: str) -> None:
    num_nodes, edges = edges_of("duplicates and a loop")
    layer = make_layer(width=4, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(given, tensors, strict=True))
        return ours(layer, inputs, num_nodes, edges, backend="triton", max_nodes=3)

    compiled_equals_eager(run, list(given.values()), TOLERANCES[torch.float32])


@pytest.mark.parametrize("variant", ["egnn", "gcn"])
def test_what_takes_no_part_has_no_gradient(variant: str) -> None:
    """As in the reference: None, not zeros, where only positions or only features are used."""
    num_nodes, edges = edges_of("duplicates and a loop")
    layer = make_layer(width=4, **VARIANTS[variant]).float()
    built = topology(*edges, num_nodes)
    for used in (0, 2):
        without: list[set[str]] = []
        for backend in ("torch", "triton"):
            layer.zero_grad()
            given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)
            leaves = {key: value.requires_grad_() for key, value in given.items()}
            state = leaves["x"], leaves["v"], leaves["h"]
            out = apply_layer(
                layer, state, built, leaves["edge_fea"], recompute=False, backend=backend
            )
            out[used].square().sum().backward()
            every = leaves | dict(layer.named_parameters())
            without.append({name for name, leaf in every.items() if leaf.grad is None})
        assert without[0] == without[1]
        assert (variant == "egnn") == bool(without[0])


def test_second_derivative_is_refused() -> None:
    num_nodes, edges = edges_of("duplicates and a loop")
    for variant in ("egnn", "gcn"):
        layer = make_layer(width=4, **VARIANTS[variant]).float()
        given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)
        x = given["x"].requires_grad_()
        out = ours(layer, given, num_nodes, edges, backend="triton")
        (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.sum().backward()


def refused(**changes: Any) -> None:
    dtype, hidden = changes.pop("dtype", torch.float32), changes.pop("hidden", (8, 8, 8, 8))

    def mlp(fan_in: int, width: int, fan_out: int) -> MLPWeights:
        shapes = (width, fan_in), (width,), (fan_out, width), (fan_out,)
        return MLPWeights(*(torch.zeros(*s, dtype=dtype, device=DEVICE) for s in shapes))

    ends = (12, 4), (4, 1), (4, 1), (8, 4)
    weights = EGNNWeights(*(mlp(a, width, b) for (a, b), width in zip(ends, hidden, strict=True)))
    num_nodes, edges = edges_of("unsorted")
    shapes = (5, 3), (5, 4), (8, 3)
    x, h, fea = (torch.zeros(*shape, dtype=dtype, device=DEVICE) for shape in shapes)
    options = {"activation": nn.SiLU(), "backend": "triton"} | changes
    egnn_layer(x, x, h, topology(*edges, num_nodes), fea, weights, **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activation": nn.GELU()}, TypeError, "`activation` must be nn.SiLU or nn.Tanh"),
        ({"dtype": torch.float16}, TypeError, "`h` must be torch.float32 with backend='triton'"),
        ({"dtype": torch.float64, "precision": "tf32"}, TypeError, "got torch.float64 with 'tf32'"),
        ({"hidden": (8, 8, 4, 8)}, ValueError, "one hidden width in all MLPs"),
        ({"precision": "fp16"}, ValueError, "`precision` must be one of fp32, tf32, bf16"),
    ],
)
def test_every_message(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        refused(**changes)
    assert str(caught.value).startswith("egnn_layer: ")
    assert message in str(caught.value)


def test_autocast_is_refused() -> None:
    with (
        torch.autocast(DEVICE.type, torch.bfloat16),
        pytest.raises(TypeError, match="leave autocast"),
    ):
        refused()


def test_without_interpreter_the_cpu_is_refused() -> None:
    """Triton reads the variable when it is imported, so in a process of its own."""
    code = "import test_graph_layers_triton as t; t.refused(precision='tf32')"
    unset = "TRITON_INTERPRET", "GFNODE_REQUIRE_GPU"
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    here = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "RuntimeError: egnn_layer: `backend` must be 'torch' or 'auto' here" in done.stderr
