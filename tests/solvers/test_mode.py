"""`solver_mode` as an argument of the model: what is refused, and agreement with the default."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gfnode_fast
from gfnode_fast.solvers import FixedStep, fixed
from golden_files import relative_error
from model_inputs import constructor, inputs

EXACT: dict[str, Any] = {"solver_mode": "exact"}
PER_MOLECULE: dict[str, Any] = {"solver_mode": "per_molecule"}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"solver_mode": "each"}, ValueError, "`solver_mode` must be one of .* got 'each'; "),
        ({"solver_mode": None}, TypeError, "`solver_mode` must be one of .* got NoneType"),
        ({"solver_mode": 0.1}, TypeError, "`solver_mode` must be one of .* got float .0.1.; "),
        (EXACT | {"solver": "rk4"}, ValueError, "`solver` must be the default 'dopri5' with"),
        (EXACT | {"mode_interaction": "concat"}, ValueError, "where modes interact, got 'exact'; "),
        (EXACT | {"no_ode": True}, ValueError, "must be 'joint' with no_ode=True, got 'exact'; "),
        (EXACT | {"backend": "reference"}, ValueError, "with backend='reference', got 'exact'; "),
        (EXACT | {"backend": "compiled", "time_mode": "mlp"}, ValueError, "`time_mode` must be"),
        (PER_MOLECULE | {"solver": "rk4"}, ValueError, "`solver` must be one of .'dopri5', .*; "),
        (PER_MOLECULE | {"solver": "explicit_adams"}, ValueError, "choose an adaptive method"),
        ({"solver_mode": fixed(0.1)}, ValueError, "one of .'euler', .* got 'dopri5'; "),
    ],
    ids=str,
)
def test_refused_at_construction(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"GF-NODE: .*{message}"):
        gfnode_fast.FourierMD(**constructor(), **changes)


def test_modes_interact_only_where_the_basis_lets_them() -> None:
    """The linear basis ignores mode_interaction, as published."""
    model = gfnode_fast.FourierMD(
        **constructor(fourier_basis="linear", mode_interaction="attention"), solver_mode="exact"
    )
    assert torch.isfinite(model(**inputs())[0]).all()


@pytest.mark.parametrize("mode", ["per_molecule", "exact", fixed(0.02)])
def test_model_agrees_with_the_joint_solve(mode: Any) -> None:
    changes = {"solver": "rk4"} if isinstance(mode, FixedStep) else {}
    tight = constructor(rtol=1e-7, atol=1e-8)
    torch.manual_seed(0)
    joint = gfnode_fast.FourierMD(**tight).double()
    model = gfnode_fast.FourierMD(**(tight | changes), solver_mode=mode).double()
    model.load_state_dict(joint.state_dict())
    given = inputs(dtype=torch.float64)
    results = []
    for either in (joint, model):
        x, v, h, _ = either(**given)
        (x.square().mean() + v.square().mean() + h.square().mean()).backward()
        results.append((x, [p.grad for p in either.parameters()]))
    assert model.last_solve["freq_conv"].accepted > 0
    assert relative_error(results[1][0], results[0][0]) < 1e-6
    for mine, theirs in zip(results[1][1], results[0][1], strict=True):
        assert relative_error(mine, theirs, 1e-6) < 1e-5
