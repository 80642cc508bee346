"""What the published model only crashes on is refused with a typed error that names the
argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gfnode_fast
from model_inputs import constructor, inputs

MODELS = [gfnode_fast.reference.FourierMD, gfnode_fast.FourierMD]

CONSTRUCTOR_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"with_v": False}, ValueError, "with_v"),
    ({"with_v": 1}, TypeError, "with_v"),
    ({"delta_frame": None}, TypeError, "delta_frame"),
    ({"delta_frame": 0}, ValueError, "delta_frame"),
    ({"delta_frame": float("nan")}, ValueError, "delta_frame"),
    ({"time_emb_dim": 3}, ValueError, "time_emb_dim"),
    ({"time_emb_dim": 7, "time_mode": "rope"}, ValueError, "time_emb_dim"),
    ({"no_ode": True, "time_mode": "mlp"}, ValueError, "no_ode"),
    ({"no_ode": True, "fourier_basis": "linear"}, ValueError, "no_ode"),
    ({"no_ode": True, "fourier_basis": None, "no_fourier": True}, ValueError, "no_ode"),
    ({"fourier_basis": None}, ValueError, "fourier_basis"),
    ({"fourier_basis": "cosine"}, ValueError, "fourier_basis"),
    ({"fourier_basis": "graph", "no_fourier": True}, ValueError, "fourier_basis"),
    ({"gnn_ablation_mode": "gat"}, ValueError, "gnn_ablation_mode"),
    ({"gnn_ablation_mode": None}, TypeError, "gnn_ablation_mode"),
    ({"mode_interaction": "mean"}, ValueError, "mode_interaction"),
    ({"time_mode": "fourier"}, ValueError, "time_mode"),
    ({"time_mode": None}, TypeError, "time_mode"),
    ({"solver": "rk5"}, ValueError, "solver"),
    ({"solver": "scipy_solver"}, ValueError, "solver"),
    ({"rtol": 0.0}, ValueError, "rtol"),
    ({"atol": "small"}, TypeError, "atol"),
    ({"num_modes": 0}, ValueError, "num_modes"),
    ({"num_modes": 2.0}, TypeError, "num_modes"),
    ({"num_timesteps": 0}, ValueError, "num_timesteps"),
    ({"n_layers": -1}, ValueError, "n_layers"),
    ({"hidden_nf": 0}, ValueError, "hidden_nf"),
    ({"num_atoms": 0}, ValueError, "num_atoms"),
    ({"activation": "SiLU"}, TypeError, "activation"),
    ({"use_vae": "yes"}, TypeError, "use_vae"),
]

Change = Callable[[dict[str, Any]], object]


def put(**changes: Any) -> Change:
    return lambda given: given.update(changes)


def edit(name: str, function: Callable[[torch.Tensor], object]) -> Change:
    return lambda given: given.update({name: function(given[name])})


# (constructor changes, input change, error, argument named)
FORWARD_REFUSALS: list[tuple[dict[str, Any], Change, type[Exception], str]] = [
    ({}, put(v=None), TypeError, "v"),
    ({}, put(loc_mean=None), TypeError, "loc_mean"),
    ({}, put(timeframes=None), TypeError, "timeframes"),
    ({}, put(U_batch=None), TypeError, "U_batch"),
    ({}, put(x=[[0.0, 0.0, 0.0]]), TypeError, "x"),
    ({}, edit("x", lambda x: x[:, :2]), ValueError, "x"),
    ({}, edit("x", lambda x: x[:-1]), ValueError, "num_atoms"),
    ({}, edit("x", lambda x: x[:0]), ValueError, "num_atoms"),
    ({}, edit("h", lambda h: h[:, :1]), ValueError, "h"),
    ({}, edit("v", lambda v: v[:-1]), ValueError, "v"),
    ({}, edit("v", lambda v: v.double()), TypeError, "v"),
    ({}, edit("loc_mean", lambda m: m[:1]), ValueError, "loc_mean"),
    ({}, edit("edge_fea", lambda e: e[:-1]), ValueError, "edge_fea"),
    ({}, edit("edge_fea", lambda e: e[:, :-1]), ValueError, "edge_fea"),
    ({}, put(edge_index=torch.zeros(3, 4, dtype=torch.long)), TypeError, "edge_index"),
    ({}, edit("edge_index", lambda e: (e[0], e[1][:-1])), ValueError, "edge_index[1]"),
    ({}, edit("edge_index", lambda e: (e[0].float(), e[1])), TypeError, "edge_index[0]"),
    ({}, edit("edge_index", lambda e: (e[0], e[1].to("meta"))), ValueError, "edge_index[1]"),
    ({}, edit("U_batch", lambda u: u[:, :, :-1]), ValueError, "U_batch"),
    ({}, edit("U_batch", lambda u: u.double()), TypeError, "U_batch"),
    ({}, edit("timeframes", lambda t: t[:, :-1]), ValueError, "timeframes"),
    ({}, edit("timeframes", lambda t: t[:1]), ValueError, "timeframes"),
    ({}, edit("timeframes", lambda t: t - t.min()), ValueError, "timeframes"),
    ({}, edit("timeframes", lambda t: t / 0), ValueError, "timeframes"),
    ({}, edit("timeframes", lambda t: t * float("nan")), ValueError, "timeframes"),
    ({}, edit("timeframes", lambda t: t > 5), TypeError, "timeframes"),
    ({}, edit("timeframes", lambda t: t.requires_grad_()), ValueError, "timeframes"),
    ({"num_modes": 6}, put(), ValueError, "num_modes"),
    ({"num_modes": 4, "fourier_basis": "linear"}, put(), ValueError, "num_modes"),
    ({"num_modes": 3, "fourier_basis": None, "no_fourier": True}, put(), ValueError, "num_modes"),
    ({"num_atoms": None}, put(), ValueError, "num_atoms"),
    ({"num_atoms": 3}, put(), ValueError, "num_atoms"),
    ({}, edit("x", lambda x: x.to("meta")), ValueError, "x"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("changes", "error", "argument"), CONSTRUCTOR_REFUSALS)
def test_constructor_refuses(
    model: Any, changes: dict[str, Any], error: type[Exception], argument: str
) -> None:
    with pytest.raises(error, match=rf"^GF-NODE: `{argument}` must be .*, got .*; "):
        model(**constructor(**changes))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("changes", "change", "error", "argument"), FORWARD_REFUSALS)
def test_forward_refuses(
    model: Any, changes: dict[str, Any], change: Change, error: type[Exception], argument: str
) -> None:
    built = model(**constructor(**changes))
    given = inputs()
    change(given)
    with pytest.raises(error) as caught:
        built(**given)
    assert str(caught.value).startswith(f"GF-NODE: `{argument}` must be ")
    assert "; " in str(caught.value)


def test_delta_frame_removed_later_is_refused() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    model.delta_frame = None
    with pytest.raises(TypeError, match="`delta_frame`"):
        model(**inputs())


def test_unneeded_arguments_may_be_missing() -> None:
    """Without the graph basis no eigenvectors are asked for."""
    model = gfnode_fast.FourierMD(**constructor(fourier_basis="linear"))
    given = inputs()
    given["U_batch"] = None
    assert torch.isfinite(model(**given)[0]).all()


@pytest.mark.parametrize("model", MODELS)
def test_times_may_require_gradients_where_nothing_is_lost(model: Any) -> None:
    given = inputs()
    given["timeframes"].requires_grad_()
    with torch.no_grad():
        model(**constructor())(**given)
    without_solve = model(**constructor(propagate_x=False, propagate_h=False))
    without_solve(**given)[2].sum().backward()
    assert given["timeframes"].grad.abs().sum() > 0


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="colour"):
        gfnode_fast.FourierMD(**constructor(), colour="blue")
    with pytest.raises(ValueError, match=r"`backend` must be .* got 'cuda'"):
        gfnode_fast.FourierMD(**constructor(), backend="cuda")
    with pytest.raises(TypeError, match="`backend`"):
        gfnode_fast.FourierMD(**constructor(), backend=1)


def test_positional_arguments_and_other_activations() -> None:
    model = gfnode_fast.FourierMD(
        1,
        2,
        3,
        8,
        nn.Tanh(),
        "cpu",
        True,
        False,
        False,
        3,
        4,
        6,
        5,
        "dopri5",
        1e-3,
        1e-4,
        100,
        "graph",
    )
    assert torch.isfinite(model(**inputs())[0]).all()
