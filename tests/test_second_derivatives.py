"""Second derivatives of the propagation: refused, however autograd is asked for them."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast import FourierMD, reference
from gfnode_fast.ops import inverse_graph_fourier
from gfnode_fast.ops.propagate import propagate
from gfnode_fast.solvers import compiled, fixed
from model_inputs import constructor, inputs
from spectral import propagator, signals

SOLVES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"time_mode": "mlp"}, {}),
    ({"mode_interaction": "attention"}, {}),
    ({"basis": "linear"}, {}),
    ({"solver": "rk4"}, {}),
    ({}, {"solver_mode": "exact"}),
    ({"time_mode": "concat", "scale": 40.0}, {"solver_mode": "exact"}),
    ({}, {"solver_mode": "per_molecule"}),
    ({"solver": "rk4"}, {"solver_mode": fixed(0.25)}),
    ({"solver": "midpoint"}, {"backend": "compiled"}),
    ({"solver": "bosh3"}, {"backend": "compiled"}),
    ({"solver": "bosh3"}, {"backend": "compiled", "solver_mode": "per_molecule"}),
    ({}, {"backend": "compiled", "solver_mode": "exact"}),
]
REFUSED = "`backend` must be 'reference' for a second derivative"


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "_GRAPHS", {})


def first(out: Tensor, inputs: list[Tensor], is_linear: bool) -> list[Tensor]:
    """Gradients of a functional that is linear in the output or not."""
    loss = out.sum() if is_linear else out.square().sum()
    return list(torch.autograd.grad(loss, inputs, create_graph=True))


@pytest.mark.parametrize("is_linear", [False, True])
@pytest.mark.parametrize(("dynamics", "options"), SOLVES, ids=str)
def test_a_solve_refuses_them(
    dynamics: dict[str, Any], options: dict[str, Any], is_linear: bool
) -> None:
    """`torch.autograd.grad` too, which visits only what lies on the way to its inputs."""
    model = propagator(**dynamics)
    weight = model.t_conv.ode_func.weights1
    signal, times, eigvecs = signals(batch=2)
    signal.requires_grad_()
    for given in ([signal], [weight]):
        for wanted in (signal, weight):
            out = propagate(model, signal, times, eigvecs, **options)
            (gradient,) = first(out, given, is_linear)
            with pytest.raises(RuntimeError, match=REFUSED):
                torch.autograd.grad(gradient.square().sum(), wanted)


def test_what_only_the_cotangent_depends_on() -> None:
    """A decoder's weight, which no solve has seen."""
    signal, times, eigvecs = signals(batch=2)
    decoder = torch.ones((), dtype=signal.dtype, requires_grad=True)
    out = propagate(propagator(), signal.requires_grad_(), times, eigvecs)
    (gradient,) = first(decoder * out, [signal], True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(gradient.sum(), decoder)


def test_the_inverse_transform_refuses_them() -> None:
    modes = torch.randn(2, 2, 3, 4, requires_grad=True)
    eigvecs = torch.randn(2, 5, 5, requires_grad=True)
    for wanted in (modes, eigvecs):
        (gradient,) = first(inverse_graph_fourier(modes, eigvecs), [modes], False)
        with pytest.raises(RuntimeError, match=REFUSED):
            torch.autograd.grad(gradient.square().sum(), wanted)


def second(model: reference.FourierMD) -> Tensor:
    given = inputs(dtype=torch.float64)
    x = given["x"].requires_grad_()
    (gradient,) = first(model(**given)[0], [x], False)
    return torch.autograd.grad(gradient.square().sum(), x)[0]


def test_a_model_refuses_them_but_with_the_reference() -> None:
    """What passes the solve by, the residual, must not come back as all there is."""
    torch.manual_seed(0)
    build = functools.partial(FourierMD, **constructor())
    model = build(backend="torch").double()
    with pytest.raises(RuntimeError, match=REFUSED):
        second(model)
    published, ours = reference.FourierMD(**constructor()), build(backend="reference")
    for each in (published, ours):
        each.double().load_state_dict(model.state_dict())
    assert torch.equal(second(ours), second(published))
