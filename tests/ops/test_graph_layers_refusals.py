"""What the graph layers refuse, in which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gfnode_fast
from gfnode_fast.ops.graph_layers import egnn_layer, gcn_layer, sage_layer
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights
from gfnode_fast.ops.topology import topology
from graph_layer_cases import NEEDS_CPP, edges_of
from model_inputs import constructor


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


def test_recompute_must_be_a_bool() -> None:
    with pytest.raises(TypeError, match="`recompute` must be a bool or None"):
        gfnode_fast.FourierMD(**constructor(), recompute=1)
