"""The Triton graph layers, interpreted, against the reference's modules in float64."""

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
    edges_of,
    make_inputs,
    make_layer,
    molecules,
    ours,
    published,
    values,
)
from op_checks import compiled_equals_eager, opcheck, relative_error, strided

pytest.importorskip("triton", reason="triton is not installed on this platform")

# Kernel in a reduced mode against the same layer in float64 with rounded operands; measured beside
# it. An operand that the two round to different sides differs by one unit of the mode.
ROUNDED = {"tf32": 1e-3, "bf16": 3e-3}  # 4e-4, 2e-3
# On a GPU against float64; the reduced modes take SiLU with tanh.approx. Not yet measured.
REDUCED = {"fp32": 2e-5, "tf32": 1e-2, "bf16": 5e-2}


def odd() -> tuple[int, Edges]:
    """Duplicates, a loop, isolated nodes, edges in disorder."""
    pair = torch.tensor([(5, 1), (0, 1), (0, 1), (1, 0), (2, 2), (1, 6), (0, 1)])
    return 7, (pair[:, 0].contiguous(), pair[:, 1].contiguous())


def ragged(sizes: tuple[int, ...] = (1, 5, 12, 2)) -> tuple[int, Edges]:
    """Molecules of these sizes, chains and a ring, more nodes than a tile has."""
    pairs, first = [], 0
    for size in sizes:
        for atom in range(size - 1):
            pairs += [(first + atom, first + atom + 1), (first + atom + 1, first + atom)]
        if size > 10:
            pairs += [(first, first + size - 1), (first + size - 1, first)]
        first += size
    pair = torch.tensor(pairs)[
        torch.randperm(len(pairs), generator=torch.Generator().manual_seed(5))
    ]
    return first, (pair[:, 0].contiguous(), pair[:, 1].contiguous())


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
    compare(variant, odd(), torch.float32)


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
    compare(variant, ragged(), torch.float32, width=width, whole=whole)


def test_blocks_hold_whole_molecules() -> None:
    """Found from the edges alone, as `max_nodes` is only believed for the choice of a form."""
    for num_nodes, edges in (ragged(), edges_of("crossing molecules"), odd(), edges_of("empty")):
        built = topology(*edges, num_nodes)
        start = built.neighbours.block_start
        assert start[-1] == num_nodes
        assert (start.diff() >= 0).all()
        block = torch.searchsorted(start, torch.arange(num_nodes), right=True)
        assert torch.equal(block[built.row], block[built.col])
    assert topology(*ragged()[1], 20).neighbours.block_start.tolist() == [0, 18, 20]
    num_nodes, edges = ragged(LARGE)  # a molecule that ends where the fourth tile begins
    assert topology(*edges, num_nodes).neighbours.block_start.tolist() == [
        0,
        70,
        89,
        91,
        91,
        91,
        91,
    ]


LARGE = (2, 68, 1, 18, 2)


@pytest.mark.parametrize(
    ("variant", "launches"),
    [
        ("egnn", ["_row_linear_kernel", "_egnn_layer_fwd_kernel"]),
        ("sage", ["_row_linear_kernel", "_mean_layer_fwd_kernel"]),
    ],
)
def test_both_forms_give_the_same_bits(
    variant: str, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a molecule's answer does not depend on its batch, which decides on the form."""
    launched = record_launches(monkeypatch)
    num_nodes, edges = ragged(LARGE)
    layer = make_layer(width=5, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 5), torch.float32)
    with torch.no_grad():
        whole = ours(layer, given, num_nodes, edges, backend="triton", max_nodes=68)
        assert launched == launches[1:]
        tiles = ours(layer, given, num_nodes, edges, backend="triton", max_nodes=None)
        assert launched == launches[1:] + launches
        assert torch.equal(whole, tiles)
        launched.clear()
        alone = {key: value[2:70] for key, value in given.items()}
        own = (edges[0] >= 2) & (edges[0] < 70)
        alone["edge_fea"] = given["edge_fea"][own]
        ends = tuple(end[own] - 2 for end in edges)
        large = ours(layer, alone, 68, ends, backend="triton", max_nodes=68)
    assert launched == launches  # one molecule does not fill two programs
    assert torch.equal(large, whole[2:70])


def record_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the entry kernels of the graph layers, as they are launched."""
    from gfnode_fast.kernels import egnn_layer_launch, mean_layer_launch, row_products_launch
    from gfnode_fast.kernels.registry import unwrap

    launched: list[str] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.name = kernel, unwrap(kernel).__name__

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for module in (egnn_layer_launch, mean_layer_launch, row_products_launch):
        for name, value in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorded(value))
    return launched


@pytest.mark.parametrize(
    ("num_atoms", "batch", "copies", "whole"),
    [
        (13, 1, 1, True),  # a block is as small as a tile
        (13, 4096, 8, True),
        (400, 33, 8, True),
        (370, 50, 8, True),
        (370, 16, 8, False),  # 128 programs, where 264 run at once
        (148, 50, 1, False),
        (148, 264, 1, True),
    ],
)
def test_molecules_are_taken_whole_where_they_fill_the_gpu(
    num_atoms: int, batch: int, copies: int, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """132 multiprocessors, as an H200 has."""
    from gfnode_fast.kernels import row_products_launch

    monkeypatch.setattr(row_products_launch, "INTERPRETED_PROGRAMS", 2 * 132)
    num_nodes = num_atoms * batch
    blocks = -(-num_nodes // 16)
    starts = torch.empty(blocks + 1)
    given = starts, starts, num_nodes, copies
    assert row_products_launch.forward_items(*given, num_atoms, 16) == (whole, blocks)
    assert row_products_launch.forward_items(*given, None, 32) == (False, -(-num_nodes // 32))


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
    assert relative_error(got["output"], exact["output"]) <= 1.5 * error
    assert error > 1e-5  # rounding there was


@pytest.mark.parametrize("variant", ["egnn", "gcn"])
def test_strides_cotangents_and_determinism(variant: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(width=4, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, 1, 4), torch.float32)

    def run(inputs: dict[str, Tensor], expanded: bool) -> list[Tensor]:
        leaves = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        out = ours(layer, leaves, num_nodes, edges, backend="triton")
        ones = torch.ones(()).expand(out.shape) if expanded else torch.ones(out.shape)
        return [out, *torch.autograd.grad(out, list(leaves.values()), ones)]

    plain = run(given, False)
    spread = run({key: strided(value) for key, value in given.items()}, True)
    for a, b in zip(plain, spread, strict=True):
        assert torch.equal(a, b)


def test_independent_of_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    from gfnode_fast.kernels import egnn_layer_launch

    num_nodes, edges = edges_of("duplicates and a loop")
    layer = make_layer("egnn", 4).float()
    given = cast(make_inputs(num_nodes, edges, 2, 4), torch.float32)
    once = values(ours, layer, given, num_nodes, edges, backend="triton")
    monkeypatch.setattr(egnn_layer_launch, "EDGE_BUFFER_BYTES", 1)  # a copy at a time
    by_copy = values(ours, layer, given, num_nodes, edges, backend="triton")
    for key, value in once.items():
        assert relative_error(by_copy[key], value) < 1e-5, key


@pytest.mark.parametrize("variant", ["egnn", "sage"])
def test_nan_stays_with_its_neighbours(variant: str) -> None:
    num_nodes, edges = molecules(2)
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
        opcheck(op, *state, neighbours, weights, False, True, 1, "fp32")


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
        return MLPWeights(*(torch.zeros(*shape, dtype=dtype) for shape in shapes))

    ends = (12, 4), (4, 1), (4, 1), (8, 4)
    weights = EGNNWeights(*(mlp(a, width, b) for (a, b), width in zip(ends, hidden, strict=True)))
    num_nodes, edges = edges_of("unsorted")
    x, h, fea = (torch.zeros(*shape, dtype=dtype) for shape in ((5, 3), (5, 4), (8, 3)))
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
    with torch.autocast("cpu"), pytest.raises(TypeError, match="leave autocast"):
        refused()


def test_without_interpreter_the_cpu_is_refused() -> None:
    """Triton reads the variable when it is imported, so in a process of its own."""
    code = "import test_graph_layers_triton as t; t.refused(precision='tf32')"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    here = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join([here, os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert "RuntimeError: egnn_layer: `backend` must be 'torch' or 'auto' here" in done.stderr


def on_gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.cuda() for key, value in tensors.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("num_atoms", [5, 13, 400])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("variant", VARIANTS)
def test_production_size(variant: str, width: int, num_atoms: int, precision: str) -> None:
    """64 molecules (8 of the largest) times 8 copies, values and every gradient, twice the same."""
    num_nodes, edges = molecules(64 if num_atoms < 100 else 8, num_atoms)
    edges = tuple(end.cuda() for end in edges)
    layer = make_layer(width=width, **VARIANTS[variant]).cuda()
    given = on_gpu(make_inputs(num_nodes, tuple(end.cpu() for end in edges), 8, width))
    expected = on_gpu_values(published, layer, given, num_nodes, edges)
    layer, given = layer.float(), cast(given, torch.float32)
    options = {"backend": "triton", "precision": precision, "max_nodes": num_atoms}
    once, again = (on_gpu_values(ours, layer, given, num_nodes, edges, **options) for _ in range(2))
    for key, value in expected.items():
        assert torch.equal(once[key], again[key]), key
        scale = max(value.norm().item(), 1e-2)
        error = (once[key].double() - value).norm().item() / scale
        assert error <= REDUCED[precision], (key, error)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("num_atoms", [13, 148, 370])
@pytest.mark.parametrize("variant", ["egnn", "sage", "gcn"])
def test_both_forms_on_a_gpu(variant: str, num_atoms: int, precision: str) -> None:
    """The same bits, whichever form the batch leads to; 1: taken whole, None: in tiles."""
    num_nodes, edges = molecules(4, num_atoms)
    layer = make_layer(width=96, **VARIANTS[variant]).float().cuda()
    given = on_gpu(cast(make_inputs(num_nodes, edges, 2, 96), torch.float32))
    edges = tuple(end.cuda() for end in edges)
    options = {"backend": "triton", "precision": precision}
    with torch.no_grad():
        whole, tiles = (
            ours(layer, given, num_nodes, edges, max_nodes=size, **options) for size in (1, None)
        )
    assert torch.equal(whole, tiles)


def on_gpu_values(run: Any, layer: nn.Module, given: dict[str, Tensor], *args: Any, **options: Any):
    """`values` with a cotangent on the device."""
    layer.zero_grad()
    leaves = {key: value.detach().requires_grad_() for key, value in given.items()}
    out = run(layer, leaves, *args, **options)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    out.backward(cotangent.to(out))
    found = {"output": out.detach()}
    for key, leaf in (leaves | dict(layer.named_parameters())).items():
        found[key] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()
    return found
