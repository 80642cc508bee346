"""torch.compile(model): one graph, few compilations, the eager model's values and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize

import gfnode_fast
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.ops.propagate_registered import propagate_opaque
from golden_files import relative_error
from model_inputs import constructor, inputs
from spectral import outputs_and_gradients, propagator, published, signals

# Measured: 2e-7 and 4e-6 in fp32, whose sums the compiler orders anew.
VALUES, GRADIENTS = 1e-5, 1e-4
CASES: list[dict[str, Any]] = [
    {},
    {"backend": "torch", "flat": True, "norm": True},
    {"gnn_ablation_mode": "sage", "mode_interaction": "attention", "recompute": True},
    {"gnn_ablation_mode": "gcn", "mode_interaction": "concat", "time_mode": "mlp"},
    {"solver_mode": "exact", "time_mode": "concat"},
    {"solver": "rk4", "solver_mode": gfnode_fast.solvers.fixed(0.1)},
    {"fourier_basis": "linear"},
    {"no_ode": True},
    {"backend": "reference"},
    {"backend": "triton", "num_modes": 2, "propagate_x": False},
]
FAST = (0, 2, 6)  # the others for `make test-slow`: each takes seconds to trace


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(**changes: Any) -> gfnode_fast.FourierMD:
    torch.manual_seed(0)
    return gfnode_fast.FourierMD(**constructor(**changes))


def outcome(
    model: Any, given: dict[str, Any]
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Outputs, and the gradient of every parameter and of x, v, h, edge_fea and U_batch."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in given.items()
        if name in ("x", "v", "h", "edge_fea", "U_batch", "loc_mean")
    }
    outputs = model(**(given | leaves))
    model.zero_grad()
    loss = sum((o.square().mean() for o in outputs[:3]), start=outputs[3])
    loss.backward()
    named = [(name, p) for name, p in model.named_parameters()] + list(leaves.items())
    gradients = {
        name.removeprefix("_orig_mod."): tensor.grad.clone()
        for name, tensor in named
        if tensor.grad is not None
    }
    return tuple(o.detach() for o in outputs), gradients


def assert_same(actual: Any, expected: Any) -> None:
    for ours, theirs in zip(actual[0], expected[0], strict=True):
        assert relative_error(ours, theirs) < VALUES
    floor = 1e-3 * max(g.norm().item() for g in expected[1].values())
    assert all(g.norm() == 0 for name, g in expected[1].items() if name not in actual[1])
    for name, gradient in actual[1].items():
        theirs = expected[1].get(name, torch.zeros_like(gradient))
        assert relative_error(gradient, theirs, floor) < GRADIENTS, name


@pytest.mark.parametrize(
    "changes",
    [pytest.param(c, marks=[] if i in FAST else pytest.mark.slow) for i, c in enumerate(CASES)],
    ids=str,
)
def test_one_graph_with_the_right_gradients(changes: dict[str, Any]) -> None:
    """Through the compiler's tracing and its automatic differentiation; no code is generated."""
    model = build(**changes)
    expected = outcome(model, inputs())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(outcome(compiled, inputs()), expected)


FEW = [(2, 4), (3, 6), (1, 5), (5, 3), (4, 4), (1, 2), (7, 6)]
MANY = [*FEW, (4, 1), (3, 1), (6, 2), (2, 2), (1, 7), (5, 1), (8, 5), (2, 1), (1, 3)]


@pytest.mark.parametrize(
    ("backend", "sizes", "graphs"),
    [
        ("eager", FEW, 3),  # the first sizes, others, one molecule
        pytest.param("aot_eager", MANY, 4, marks=pytest.mark.slow),  # one time
    ],
    ids=["eager", "aot_eager"],
)
def test_few_compilations_over_batch_sizes_and_times(
    backend: str, sizes: list[tuple[int, int]], graphs: int
) -> None:
    model = build()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch, num_times in sizes:
        given = inputs(batch, num_timesteps=num_times)
        actual = outcome(compiled, given)
        model.num_timesteps = num_times  # which graphs do not read
        assert_same(actual, outcome(model, given))
    assert counter.frame_count == graphs


def test_bad_times_are_refused_where_they_are_used() -> None:
    compiled = torch.compile(build(), backend="aot_eager", fullgraph=True)
    given = inputs()
    compiled(**given)
    given["timeframes"] = given["timeframes"].clone()
    given["timeframes"][0, 0] = 0
    with pytest.raises(ValueError, match="`times` must be positive"):
        compiled(**given)


class Doubled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


@pytest.mark.parametrize("interaction", ["no_interaction", "attention", "concat"])
def test_parametrised_weights_are_those_of_the_dynamics(interaction: str) -> None:
    """Inside and outside of graphs: what the module computes with, not what it keeps."""
    model = propagator(mode_interaction=interaction, time_mode="mlp")
    rhs = model.t_conv.ode_func
    parametrize.register_parametrization(rhs, "weights1", Doubled())
    parametrize.register_parametrization(rhs.time_mlp[2], "weight", Doubled())
    given = signals()
    expected = outputs_and_gradients(published, model, *given)
    opaque = partial(propagate_opaque, solver_mode="joint", backend="torch", transforms="auto")
    for function in (propagate, opaque):
        actual = outputs_and_gradients(function, model, *given)
        for name, value in expected.items():  # measured: 2e-13
            assert relative_error(actual[name], value, 1e-3) < 1e-9, name


def test_propagation_operator() -> None:
    """Registered as the compiler needs it: schema, shapes, autograd."""
    model = build()
    propagator, given = model.freq_conv, inputs()
    signal = torch.randn(2, 5, 1, 8, requires_grad=True)
    eigvecs = given["U_batch"].requires_grad_()
    arguments = (
        signal,
        given["timeframes"] / 100,
        eigvecs,
        list(propagator.parameters()),
        "graph",
        "no_interaction",
        "none",
        0,
        "dopri5",
        1e-3,
        1e-4,
        False,
        "joint",
        0.0,
        "torch",
        "auto",
    )
    torch.library.opcheck(
        torch.ops.gfnode_fast.propagate.default,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [CASES[0], CASES[2], {"backend": "torch", "n_layers": 2, "propagate_x": False}],
    ids=str,
)
def test_generated_code(changes: dict[str, Any]) -> None:
    """The last one loses half of the gradient of x where the compiler sees `edge_differences`."""
    model = build(**changes)
    expected = outcome(model, inputs())
    assert_same(outcome(torch.compile(model, fullgraph=True), inputs()), expected)
