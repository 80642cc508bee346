"""Graph layers of every backend against the reference's modules in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gfnode_fast
from graph_layer_cases import (
    BACKENDS,
    FAITHFUL,
    GRAPHS,
    LAYERS,
    NEEDS_CPP,
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
from op_checks import compiled_equals_eager, relative_error, strided


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
