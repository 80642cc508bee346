"""Which layers keep their edge intermediates for backward when the model chooses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gfnode_fast
from gfnode_fast._extension import why_no_extension
from gfnode_fast.nn import graph_layers
from gfnode_fast.nn.graph_layers import layers_kept
from graph_layer_cases import cast, make_inputs, make_layer, molecules, ours
from model_inputs import constructor, inputs
from op_checks import relative_error

NEEDS_CPP = pytest.mark.skipif(
    why_no_extension() is not None, reason="the compiled extension is not built"
)
BACKENDS = ["torch", pytest.param("cpp", marks=NEEDS_CPP)]


class Saved:
    """Bytes that autograd saves for backward inside the block."""

    def __enter__(self) -> Saved:
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["egnn", "sage"])
def test_counted_bytes_are_those_that_a_layer_saves(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By how much more is saved on twice the edges."""
    num_nodes, (row, col) = molecules(10)
    layer, copies = make_layer(name, 32).float(), 8
    saved = []
    for times in (1, 2):
        edges = (row.repeat(times), col.repeat(times))
        given = cast(make_inputs(num_nodes, edges, copies, width=32), torch.float32)
        with Saved() as kept:
            out = ours(layer, given, num_nodes, edges, backend=backend)
        saved.append(kept.nbytes)
        del out
    per_layer = saved[1] - saved[0]
    layers = nn.ModuleList([layer] * 3)
    for budget, count in ((0.9, 0), (1.1, 1), (2.2, 2)):
        monkeypatch.setattr(graph_layers, "KEPT_EDGE_BYTES", int(budget * per_layer))
        expected = (
            3 if (name, backend) == ("sage", "cpp") else count
        )  # which saves nothing per edge
        sizes = copies * num_nodes, copies * len(row)
        assert layers_kept(layers, *sizes, torch.float32, backend) == expected


@pytest.mark.parametrize(("name", "wide"), [("egnn", 8), ("gcn", 14)])
def test_triton_layers_keep_sums_over_neighbours_within_a_budget(
    name: str, wide: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = nn.ModuleList([make_layer(name, 8)] * 3)
    for rows, count in ((0, 3), (10, 3), (15, 2), (30, 1), (31, 0)):
        monkeypatch.setattr(graph_layers, "KEPT_SUM_BYTES", 30 * wide * 4)
        assert layers_kept(layers, rows, 7, torch.float32, "triton") == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layers_beyond_the_budget_are_computed_again(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kwargs = constructor(n_layers=3)
    torch.manual_seed(0)
    model = gfnode_fast.FourierMD(**kwargs, backend=backend)
    kept: dict[object, int] = {}
    outputs: dict[object, Tensor] = {}
    grads: dict[object, list[Tensor]] = {}

    def run(case: object, recompute: bool | None) -> None:
        model.recompute = recompute
        model.zero_grad()
        with Saved() as saved:
            x, v, h, _ = model(**inputs())
        (x.square().mean() + v.square().mean() + h.square().mean()).backward()
        kept[case], outputs[case] = saved.nbytes, h.detach()
        grads[case] = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    run("never", False)
    run("always", True)
    run("default", None)
    monkeypatch.setattr(graph_layers, "KEPT_EDGE_BYTES", 0)
    run("none fits", None)
    num_edges = 4 * len(inputs()["edge_fea"])
    widths = {"cpp": 2, "torch": 6}[backend] * (8 + 6)
    monkeypatch.setattr(graph_layers, "KEPT_EDGE_BYTES", num_edges * widths * 4)
    run("one fits", None)
    assert kept["default"] == kept["never"] > kept["one fits"] > kept["none fits"] == kept["always"]
    for case, h in outputs.items():
        if backend == "cpp":
            assert torch.equal(h, outputs["never"]), case
        for grad, expected in zip(grads[case], grads["never"], strict=True):
            assert relative_error(grad, expected) < 1e-5, case


def test_the_report_says_it() -> None:
    for recompute, word in ((None, "beyond a budget"), (True, "always"), (False, "never")):
        report = gfnode_fast.FourierMD(**constructor(), recompute=recompute).backend_report()
        assert report.recompute is recompute
        assert f"again in backward: {word}" in str(report)


def test_random_activations_draw_the_same_again_in_backward() -> None:
    num_nodes, edges = molecules(2)
    layer = make_layer("egnn", 8, activation=nn.RReLU()).float()
    given = cast(make_inputs(num_nodes, edges, 2, width=8), torch.float32)
    gradients = []
    for recompute in (False, True):
        layer.zero_grad()
        torch.manual_seed(0)
        out = ours(layer, given, num_nodes, edges, backend="torch", recompute=recompute)
        torch.manual_seed(1)
        sum(part.square().sum() for part in out).backward()
        gradients.append([p.grad for p in layer.parameters()])
    for again, kept in zip(*gradients, strict=True):
        assert relative_error(again, kept) < 1e-5


def test_others_leave_the_generator_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Tensor:
        raise AssertionError("a captured CUDA graph cannot read the generator's state")

    monkeypatch.setattr(torch, "get_rng_state", read)
    num_nodes, edges = molecules(2)
    layer = make_layer("egnn", 8).float()
    given = cast(make_inputs(num_nodes, edges, 2, width=8), torch.float32)
    out = ours(layer, given, num_nodes, edges, backend="torch", recompute=True)
    sum(part.square().sum() for part in out).backward()
