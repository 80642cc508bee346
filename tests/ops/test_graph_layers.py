"""Graph layers of every backend against the reference's modules in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfnode_fast
from gfnode_fast._extension import why_no_extension
from gfnode_fast.ops.graph_layers import egnn_layer, gcn_layer, sage_layer
from gfnode_fast.ops.graph_layers_cpp import why_not_compiled
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights
from gfnode_fast.ops.topology import MAX_CACHED, _cache, topology
from graph_layer_cases import (
    FAITHFUL,
    GRAPHS,
    LAYERS,
    TOLERANCES,
    VARIANTS,
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
from model_inputs import constructor, inputs
from op_checks import compiled_equals_eager, opcheck, relative_error, strided

# The compiled kernels are part of any installation with a compiler; tests of a pure-Python one say
# so here, and only here.
NEEDS_CPP = pytest.mark.skipif(
    why_no_extension() is not None, reason="the compiled extension is not built"
)
BACKENDS = ["torch", pytest.param("cpp", marks=NEEDS_CPP)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("graph", GRAPHS)
def test_values_and_every_gradient(
    graph: str, variant: str, dtype: torch.dtype, recompute: bool
) -> None:
    """With the backend that `auto` takes: compiled in float32, PyTorch in float64."""
    num_nodes, edges = edges_of(graph)
    layer = make_layer(width=5, **VARIANTS[variant])
    given = make_inputs(num_nodes, edges, copies=3, width=5)
    expected = values(published, layer, given, num_nodes, edges)
    got = values(ours, layer.to(dtype), cast(given, dtype), num_nodes, edges, recompute=recompute)
    assert got["output"].dtype == dtype
    assert_close(got, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("width", [1, 16, 33, 96])
@pytest.mark.parametrize("variant", ["egnn", "gcn"])
def test_widths_and_copies(variant: str, width: int, copies: int, backend: str) -> None:
    num_nodes, edges = edges_of("many")
    layer = make_layer(width=width, **VARIANTS[variant])
    given = make_inputs(num_nodes, edges, copies, width)
    expected = values(published, layer, given, num_nodes, edges)
    layer, given = layer.float(), cast(given, torch.float32)
    got = values(ours, layer, given, num_nodes, edges, backend=backend)
    assert_close(got, expected, TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_is_as_faithful_as_the_reference(variant: str, backend: str) -> None:
    num_nodes, edges = molecules(40)
    layer = make_layer(width=32, **VARIANTS[variant])
    given = make_inputs(num_nodes, edges, copies=4, width=32)
    exact = values(published, layer, given, num_nodes, edges)
    layer, given = layer.float(), cast(given, torch.float32)
    theirs = values(published, layer, given, num_nodes, edges)
    got = values(ours, layer, given, num_nodes, edges, backend=backend)

    # As in the golden files' gradients: one number that nearly cancels sets no standard.
    floor = 1e-3 * max(value.norm().item() for value in exact.values())

    def error(found: dict[str, Tensor], key: str) -> float:
        difference = (found[key].double() - exact[key]).norm().item()
        return difference / max(exact[key].norm().item(), floor)

    for key in exact:
        assert error(got, key) <= FAITHFUL * error(theirs, key), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_displacements_are_clamped(backend: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer("egnn", 5)
    given = make_inputs(num_nodes, edges, copies=2, width=5)
    given["x"] *= 1e4
    expected = values(published, layer, given, num_nodes, edges)
    assert ((expected["output"][:, :3] - given["x"]).abs() >= 99).any()
    layer, given = layer.float(), cast(given, torch.float32)
    got = values(ours, layer, given, num_nodes, edges, backend=backend)
    assert relative_error(got["output"], expected["output"]) < TOLERANCES[torch.float32]
    assert relative_error(got["x"], expected["x"]) < TOLERANCES[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-8, 1e-4, 1.0, 30.0, 200.0])
@pytest.mark.parametrize("variant", ["sage", "sage flat"])
def test_activations_over_the_whole_range(variant: str, size: float, backend: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(width=10, **VARIANTS[variant])
    with torch.no_grad():
        for parameter in layer.edge_mlp.mlp[0].parameters():
            parameter *= size
    given = make_inputs(num_nodes, edges, copies=1, width=10)
    expected = values(published, layer, given, num_nodes, edges)
    layer, given = layer.float(), cast(given, torch.float32)
    theirs = values(published, layer, given, num_nodes, edges)
    got = values(ours, layer, given, num_nodes, edges, backend=backend)
    for key, value in expected.items():
        bound = max(FAITHFUL * relative_error(theirs[key], value), TOLERANCES[torch.float32])
        assert relative_error(got[key], value) <= bound, key


@pytest.mark.parametrize("activation", [nn.GELU(), nn.PReLU(), nn.SiLU(inplace=True)])
@pytest.mark.parametrize("recompute", [False, True])
def test_any_activation_module(activation: nn.Module, recompute: bool) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer("egnn", 5, activation)
    given = make_inputs(num_nodes, edges, copies=3, width=5)
    expected = values(published, layer, given, num_nodes, edges)
    got = values(ours, layer, given, num_nodes, edges, recompute=recompute)
    assert_close(got, expected, TOLERANCES[torch.float64])


@pytest.mark.parametrize("name", LAYERS)
def test_gradcheck(name: str) -> None:
    num_nodes, edges = edges_of("duplicates and a loop")
    layer = make_layer(name, 2)
    given = make_inputs(num_nodes, edges, copies=2, width=2)
    leaves = [value.requires_grad_() for value in given.values()]

    def run(*tensors: Tensor) -> Tensor:
        return ours(layer, dict(zip(given, tensors, strict=True)), num_nodes, edges)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@NEEDS_CPP
@pytest.mark.parametrize("name", LAYERS)
def test_second_derivative_of_compiled_kernels_is_refused(name: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(name, 4).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=4), torch.float32)
    x = given["x"].requires_grad_()
    out = ours(layer, given, num_nodes, edges, backend="cpp")
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.sum().backward()


@NEEDS_CPP
@pytest.mark.parametrize("keep", [False, True])
def test_registered_operators(keep: bool) -> None:
    assert why_not_compiled() is None
    num_nodes, edges = edges_of("unsorted")
    built = topology(*edges, num_nodes)

    def randn(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape).requires_grad_(grad)

    x, node, edge = randn(2, 5, 3), randn(2, 5, 32), randn(8, 16)
    weights = [randn(*s) for s in ((16,), (16, 16), (16,), (16, 16), (16,), (16,), (1,))]
    ops = torch.ops.gfnode_fast
    egnn = (x, node, edge, built.row, built.col, *weights)
    mlp = (randn(6, 3), randn(6, 2), randn(4, 5), randn(4), randn(1, 4), randn(1))
    if keep:
        opcheck(ops.egnn_edges, *egnn, 0, False, True)
        opcheck(ops.row_mlp, *mlp, 1, True)
        opcheck(ops.sum_edges, node, edge, built.row, built.col, 0)
        opcheck(ops.row_linear, randn(6, 3), randn(5, 3))
    detached = [tensor.detach() for tensor in egnn]
    plain = [tensor.detach() for tensor in mlp]
    sums, shift, z2, z3 = ops.egnn_edges(*detached, 0, True, keep)
    opcheck(ops.egnn_edges_backward, sums, shift, *detached, z2, z3, 0, True)
    _, z = ops.row_mlp(*plain, 0, True)
    opcheck(ops.row_mlp_backward, randn(6, 1, grad=False), *plain, z, 0)
    total = ops.sum_edges(*detached[1:5], 1)
    opcheck(ops.sum_edges_backward, total, *detached[1:5], 1)
    if keep:
        linear = [randn(*shape, grad=False) for shape in ((6, 5), (6, 3), (5, 3))]
        opcheck(ops.row_linear_backward, *linear)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_traced_whole(name: str, backend: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(name, 4).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=4), torch.float32)

    def run(*tensors: Tensor) -> Tensor:
        return ours(
            layer, dict(zip(given, tensors, strict=True)), num_nodes, edges, backend=backend
        )

    compiled_equals_eager(run, list(given.values()), TOLERANCES[torch.float32])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_strides(name: str, backend: str) -> None:
    num_nodes, edges = edges_of("unsorted")
    layer = make_layer(name, 4).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=4), torch.float32)
    row, col = (end.repeat_interleave(2)[::2] for end in edges)
    expected = ours(layer, given, num_nodes, edges, backend=backend)
    spread = {key: strided(value) for key, value in given.items()}
    assert torch.equal(ours(layer, spread, num_nodes, (row, col), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic(variant: str, backend: str) -> None:
    num_nodes, edges = molecules(50)
    layer = make_layer(width=16, **VARIANTS[variant]).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=16), torch.float32)
    once, again = (values(ours, layer, given, num_nodes, edges, backend=backend) for _ in range(2))
    for key, value in once.items():
        assert torch.equal(again[key], value), key


@NEEDS_CPP
def test_kernels_give_the_same_bits_for_any_number_of_threads() -> None:
    assert why_not_compiled() is None
    num_nodes, edges = molecules(600)
    built = topology(*edges, num_nodes)
    ops, generator = torch.ops.gfnode_fast, torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, node, edge = randn(2, num_nodes, 3), randn(2, num_nodes, 32), randn(built.num_edges, 16)
    weights = [randn(*s) for s in ((16,), (16, 16), (16,), (16, 16), (16,), (16,), (1,))]
    egnn = (x, node, edge, built.row, built.col, *weights)
    mlp = (randn(9000, 20), randn(9000, 3), randn(16, 23), randn(16), randn(5, 16), randn(5))
    grad, linear_weight = randn(9000, 5), randn(5, 20)

    def everything() -> list[Tensor]:
        sums, shift, z2, z3 = ops.egnn_edges(*egnn, 0, False, True)
        out, z = ops.row_mlp(*mlp, 0, True)
        total = ops.sum_edges(*egnn[1:5], 1)
        return [
            *(sums, shift, z2, z3, out, total),
            *ops.egnn_edges_backward(sums, shift, *egnn, z2, z3, 0, False),
            *ops.row_mlp_backward(grad, *mlp, z, 0),
            *ops.sum_edges_backward(total, *egnn[1:5], 1),
            ops.row_linear(mlp[0], linear_weight),
            *ops.row_linear_backward(grad, mlp[0], linear_weight),
        ]

    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for got, expected in zip(other, runs[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_left_unwritten(recompute: bool, backend: str, poison_all_memory: None) -> None:
    for name in LAYERS:
        for graph in GRAPHS:
            num_nodes, edges = edges_of(graph)
            layer = make_layer(name, 5).float()
            given = cast(make_inputs(num_nodes, edges, copies=2, width=5), torch.float32)
            found = values(
                ours, layer, given, num_nodes, edges, backend=backend, recompute=recompute
            )
            assert all(torch.isfinite(value).all() for value in found.values()), (name, graph)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_nan_stays_with_its_neighbours(name: str, backend: str) -> None:
    num_nodes, edges = molecules(3)
    layer = make_layer(name, 16).float()
    given = cast(make_inputs(num_nodes, edges, copies=2, width=16), torch.float32)
    given["x"][0] = float("nan")
    out = ours(layer, given, num_nodes, edges, backend=backend)
    touched = torch.isnan(out).any(dim=1).nonzero().flatten().tolist()
    assert touched == [0, 1, 5]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [False, True])
def test_egnn_is_equivariant(norm: bool, backend: str) -> None:
    num_nodes, edges = molecules(4)
    layer = make_layer("egnn", 8, norm=norm)
    given = make_inputs(num_nodes, edges, copies=2, width=8)
    turn = torch.linalg.qr(make_inputs(1, edges, 3, 1)["x"])[0]
    shift = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    moved = given | {"x": given["x"] @ turn.T + shift, "v": given["v"] @ turn.T}
    dtype = torch.float64 if backend == "torch" else torch.float32
    layer = layer.to(dtype)
    plain, turned = (
        ours(layer, cast(g, dtype), num_nodes, edges, backend=backend).double()
        for g in (given, moved)
    )
    bound = TOLERANCES[dtype]
    assert relative_error(turned[:, :3], plain[:, :3] @ turn.T + shift) < bound
    assert relative_error(turned[:, 6:], plain[:, 6:]) < bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LAYERS)
def test_permutation_of_edges_and_nodes(name: str, backend: str) -> None:
    num_nodes, (row, col) = molecules(4)
    layer = make_layer(name, 8).float()
    given = cast(make_inputs(num_nodes, (row, col), copies=1, width=8), torch.float32)
    generator = torch.Generator().manual_seed(3)
    nodes = torch.randperm(num_nodes, generator=generator)
    order = torch.randperm(row.shape[0], generator=generator)
    number = torch.empty_like(nodes).scatter_(0, nodes, torch.arange(num_nodes))
    renumbered = {key: given[key][nodes] for key in ("x", "v", "h")}
    renumbered["edge_fea"] = given["edge_fea"][order]
    expected = ours(layer, given, num_nodes, (row, col), backend=backend)
    got = ours(
        layer, renumbered, num_nodes, (number[row][order], number[col][order]), backend=backend
    )
    assert relative_error(got, expected[nodes]) < TOLERANCES[torch.float32]


def test_recompute_keeps_no_edge_intermediates() -> None:
    num_nodes, edges = molecules(50)
    layer = make_layer("egnn", 32).float()
    given = cast(make_inputs(num_nodes, edges, copies=8, width=32), torch.float32)
    saved: dict[bool, int] = {}
    for recompute in (False, True):
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, storages: dict[int, int] = storages) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ours(layer, given, num_nodes, edges, recompute=recompute)
        saved[recompute] = sum(storages.values())
    node_state = sum(given[key].nbytes for key in ("x", "v", "h"))
    assert saved[True] < 2 * node_state
    assert saved[False] > 6 * node_state


def test_topology_is_sorted_stably_and_cached_by_content() -> None:
    row, col = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 1, 2])
    built = topology(row, col, 4)
    assert built.order.tolist() == [1, 3, 0, 2]
    assert built.row_start.tolist() == [0, 1, 2, 4, 4]
    assert topology(row.clone(), col.int(), 4) is built
    row[0] = 0  # in place: found by identity this would be stale
    changed = topology(row, col, 4)
    assert changed.row.tolist() == [0, 0, 1, 2]
    assert topology(row, col, 5) is not changed
    for extra in range(2 * MAX_CACHED):
        topology(row, col, 10 + extra)
    assert len(_cache) == MAX_CACHED


def test_a_topology_built_for_inference_serves_training() -> None:
    ends = torch.tensor([4, 1, 0]), torch.tensor([1, 0, 4])
    with torch.inference_mode():
        topology(*ends, 5).neighbours  # noqa: B018 - it is kept
    built = topology(*ends, 5)
    weight = torch.zeros(5, 1, requires_grad=True)
    for index in (built.row, built.col, built.neighbours.source_edge):
        weight.index_select(0, index).sum().backward()


def weights_of(width: int, hidden: int = 8) -> EGNNWeights:
    def mlp(fan_in: int, fan_out: int) -> MLPWeights:
        return MLPWeights(
            torch.zeros(hidden, fan_in),
            torch.zeros(hidden),
            torch.zeros(fan_out, hidden),
            torch.zeros(fan_out),
        )

    return EGNNWeights(
        mlp(2 * width + 4, width), mlp(width, 1), mlp(width, 1), mlp(2 * width, width)
    )


def good_arguments() -> dict[str, Any]:
    num_nodes, edges = edges_of("unsorted")
    return {
        "x": torch.zeros(10, 3),
        "v": torch.zeros(10, 3),
        "h": torch.zeros(10, 4),
        "edges": topology(*edges, num_nodes),
        "edge_fea": torch.zeros(8, 3),
        "weights": weights_of(4),
        "activation": nn.SiLU(),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(10, 2)}, ValueError, "`x` must be (10, 3)"),
        ({"v": torch.zeros(5, 3)}, ValueError, "`v` must be (10, 3)"),
        ({"v": torch.zeros(10, 3).double()}, TypeError, "`v` must be torch.float32 like h"),
        ({"h": torch.zeros(9, 4)}, ValueError, "`h` must be (T*5, K)"),
        ({"h": torch.zeros(4)}, ValueError, "`h` must be (T*5, K)"),
        ({"x": torch.zeros(10, 3, device="meta")}, ValueError, "`x` must be on cpu like h"),
        ({"edge_fea": torch.zeros(7, 3)}, ValueError, "`edge_fea` must be (8, 3)"),
        ({"edge_fea": torch.zeros(8)}, ValueError, "`edge_fea` must be (E, D)"),
        ({"weights": weights_of(5)}, ValueError, "`message.weight0` must be (8, 12)"),
        (
            {"weights": weights_of(4)._replace(node=MLPWeights(*[torch.zeros(3)] * 4))},
            ValueError,
            "`node.weight0` must be (hidden, 8)",
        ),
        ({"backend": "gpu"}, ValueError, "`backend` must be one of auto, torch, cpp, triton"),
        ({"precision": "fp16"}, ValueError, "`precision` must be one of fp32, tf32, bf16"),
        ({"precision": "tf32"}, ValueError, "served by backend='triton' alone"),
        ({"backend": "cpp", "activation": nn.GELU()}, TypeError, "the activation is GELU"),
    ],
)
def test_every_message(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    egnn_layer(**good_arguments())
    with pytest.raises(error) as caught:
        egnn_layer(**(good_arguments() | changes))
    assert str(caught.value).startswith("egnn_layer: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("op", [sage_layer, gcn_layer])
def test_messages_of_mean_layers(op: Callable[..., Any]) -> None:
    mlp = MLPWeights(torch.zeros(8, 23), torch.zeros(8), torch.zeros(10, 8), torch.zeros(10))
    given = good_arguments() | {"weights": MeanWeights(mlp, mlp)}
    with pytest.raises(ValueError, match=rf"{op.__name__}: `node.weight0` must be"):
        op(**given)


@pytest.mark.parametrize(
    ("row", "col", "num_nodes", "error", "message"),
    [
        ([0.0], [0], 1, TypeError, "`row` must be torch.int64"),
        ([0], [0, 1], 2, ValueError, "`col` must be (E,)"),
        ([0], [2], 2, ValueError, "`col` must be between 0 and 1, got 2 ... 2"),
        ([-1], [0], 2, ValueError, "`row` must be between 0 and 1"),
        ([], [], -1, ValueError, "`num_nodes` must be at least 0"),
    ],
)
def test_messages_of_the_topology(
    row: list[Any], col: list[int], num_nodes: int, error: type[Exception], message: str
) -> None:
    rows = torch.tensor(row) if row else torch.zeros(0, dtype=torch.long)
    with pytest.raises(error) as caught:
        topology(rows, torch.tensor(col, dtype=torch.long), num_nodes)
    assert message in str(caught.value)


@NEEDS_CPP
@pytest.mark.parametrize("instruction_set", ["default", "avx2"])
def test_older_instruction_sets(instruction_set: str) -> None:
    """The choice is made once per process, so in one of its own."""
    selected = "cpp and (test_widths_and_copies or faithful)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", selected],
        env=os.environ | {"ATEN_CPU_CAPABILITY": instruction_set},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout


@NEEDS_CPP
def test_explicit_request_never_falls_back() -> None:
    double = {
        key: value.double() if isinstance(value, Tensor) else value
        for key, value in good_arguments().items()
    }
    double["weights"] = EGNNWeights(
        *(MLPWeights(*(w.double() for w in mlp)) for mlp in weights_of(4))
    )
    egnn_layer(**double)
    with pytest.raises(TypeError, match=r"got 'cpp'; the tensors are torch\.float64"):
        egnn_layer(**double, backend="cpp")
    with torch.autocast("cpu"), pytest.raises(TypeError, match="autocast is on"):
        egnn_layer(**good_arguments(), backend="cpp")


@NEEDS_CPP
def test_operators_check_their_own_arguments() -> None:
    assert why_not_compiled() is None
    node, edge = torch.zeros(1, 3, 32), torch.zeros(2, 16)
    row, col = torch.tensor([0, 2]), torch.tensor([1, 0])
    sum_edges = torch.ops.gfnode_fast.sum_edges
    sum_edges(node, edge, row, col, 0)
    for bad, message in (
        ((node, edge, row.flip(0), col, 0), "sorted by row"),
        ((node, edge, row, col + 2, 0), "within the 3 nodes"),
        ((node, edge, row, col, 7), "`activation` must be 0 or 1"),
        ((node, edge.double(), row, col, 0), "wrong dtype"),
        ((node, torch.zeros(2, 15), row, col, 0), "multiples of 16"),
        ((torch.zeros(1, 32, 3).mT, edge, row, col, 0), "`node` must be contiguous"),
        ((node[..., :16], edge, row, col, 0), "`node`"),
    ):
        with pytest.raises(RuntimeError, match=message):
            sum_edges(*bad)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_model_with_recomputation_equals_without(name: str, recompute: bool) -> None:
    kwargs = constructor(gnn_ablation_mode=name, n_layers=2)
    torch.manual_seed(0)
    model = gfnode_fast.reference.FourierMD(**kwargs)
    fast = gfnode_fast.FourierMD(**kwargs, recompute=recompute)
    fast.load_state_dict(model.state_dict())
    for each in (model, fast):
        x, v, h, _ = each(**inputs())
        (x.square().mean() + v.square().mean() + h.square().mean()).backward()
    for key, parameter in model.named_parameters():
        actual = fast.get_parameter(key).grad
        assert relative_error(actual, parameter.grad) < 1e-4, key


def test_recompute_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="`recompute` must be a bool or None"):
        gfnode_fast.FourierMD(**constructor(), recompute=1)
