"""Adaptive methods driven in uniform steps: the order of their steps, and of their dense output.

`test_fixed.py` measures the others.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from gfnode_fast.solvers import (
    ADAPTIVE,
    GeneralRHS,
    LinearRHS,
    RightHandSide,
    joint_linear,
    per_molecule,
    published,
    solve_joint,
    solve_per_molecule,
)

# Steps in the unit interval: few enough that errors are above rounding.
STEPS = {name: (32, 48, 64, 96) for name in ADAPTIVE} | {"dopri8": (6, 8, 10, 12)}
# The quartic has the order of its midpoint, at most 5; that of the last three is y0 and one slope.
DENSE_ORDERS = {"dopri5": 5, "dopri8": 5, "bosh3": 2, "adaptive_heun": 2, "fehlberg2": 2}
INSIDE = torch.tensor([0.15, 0.35, 0.6, 0.85], dtype=torch.float64)

START = torch.tensor([0.2, -0.3], dtype=torch.float64)
RATES = torch.tensor([1.0, -0.7], dtype=torch.float64)
TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
WEIGHT = torch.tensor([[[-0.5, 2.0], [-1.5, 0.4]]], dtype=torch.float64)
PUSH = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def turned(s: Tensor) -> Tensor:
    """exp(s TURN), (..., 2, 2); torch's own exponential has errors of 1e-13 here."""
    cos, sin = s.cos(), s.sin()
    return torch.stack((cos, sin, -sin, cos), dim=-1).unflatten(-1, (2, 2))


def turning(s: Tensor, y: Tensor) -> Tensor:
    """y = u exp(s TURN) with du/ds = rate cos(s) (1 + u²): coupled, not linear, solvable."""
    rotation = turned(s)
    u = y @ rotation.mT
    return (RATES * s.cos().reshape(-1, 1, 1) * (1 + u * u)) @ rotation + y @ TURN


def turning_solution(times: Tensor) -> Tensor:
    u = torch.tan(RATES * times.sin()[:, None] + START.atan())
    return torch.einsum("ti,tij->tj", u, turned(times))


def pushed(s: Tensor, push: Tensor) -> Tensor:
    return s.view(-1, 1, 1) * push


def pushed_solution(times: Tensor) -> Tensor:
    """dy/ds = y W + s b, as the linear system of (y, s, 1)."""
    system = torch.zeros(4, 4, dtype=torch.float64)
    system[:2, :2], system[2, :2], system[3, 2] = WEIGHT[0], PUSH[0], 1
    start = torch.cat((START, torch.tensor([0.0, 1.0], dtype=torch.float64)))
    return (start @ torch.linalg.matrix_exp(times[:, None, None] * system))[:, :2]


NOT_LINEAR = GeneralRHS(lambda s, y: turning(s, y.transpose(0, 1)).transpose(0, 1), turning, ())
AFFINE = LinearRHS(
    lambda s, y: y @ WEIGHT + s * PUSH[:, None], WEIGHT, pushed, (PUSH,), is_proportional=True
)
FASTER = ("dopri8", "joint, affine")
CASES: dict[str, tuple[Callable[..., Tensor], RightHandSide, Callable[[Tensor], Tensor]]] = {
    "joint": (solve_joint, NOT_LINEAR, turning_solution),
    "joint, affine": (solve_joint, AFFINE, pushed_solution),
    "per_molecule": (solve_per_molecule, NOT_LINEAR, turning_solution),
}


def step_by(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every solver takes steps of this size, and accepts them at these tolerances."""
    start = torch.full((1,), size, dtype=torch.float64)
    monkeypatch.setattr(published, "initial_step", lambda *_: start[0])
    monkeypatch.setattr(
        joint_linear, "_initial_step", lambda norms, _: joint_linear._Start(size, norms, (0.0,) * 3)
    )
    for module in (published, joint_linear):
        monkeypatch.setattr(module, "next_step", lambda step, *_: step)
    monkeypatch.setattr(per_molecule, "first_step", lambda *_: start)
    monkeypatch.setattr(per_molecule, "growth_after", lambda ratio, _: torch.ones_like(ratio))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("solver", ADAPTIVE)
def test_order_of_steps_and_of_dense_output(
    solver: str, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    solve, rhs, solution = CASES[case]
    errors = []
    for steps in STEPS[solver]:
        step_by(1 / steps, monkeypatch)
        inside = (torch.arange(steps).unsqueeze(1) + INSIDE).flatten() / steps
        times = torch.cat((inside, torch.ones(1, dtype=torch.float64)))
        values = solve(rhs, START.view(1, 1, 1, 2), times[None], ADAPTIVE[solver], 0.0, 1e300)
        error = (values.view(-1, 2) - solution(times)).norm(dim=1)
        errors.append((error[-1].item(), error[:-1].square().mean().sqrt().item()))
    end, dense = -np.polyfit(np.log(STEPS[solver]), np.log(errors), 1)[0]
    order = ADAPTIVE[solver].order
    # dopri8's polynomial misses z^9 / 9! by 0.1 %, so that on linear problems later terms decide.
    assert end == pytest.approx(order, abs=0.2) or (end > order and (solver, case) == FASTER)
    assert dense == pytest.approx(DENSE_ORDERS[solver], abs=0.2)
