"""Tableau identities and equality with torchdiffeq's own coefficients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torchdiffeq._impl.odeint import SOLVERS

from gfnode_fast.solvers import exact, forced
from gfnode_fast.solvers.tableau import ADAPTIVE, DOPRI5, TABLEAUS, Tableau, row_tensor

BY_NAME = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)


@BY_NAME
def test_rows_sum_to_their_abscissae(tableau: Tableau) -> None:
    assert sum(tableau.solution) == pytest.approx(1, abs=1e-14)
    for alpha, beta in zip(tableau.alpha, tableau.beta, strict=True):
        assert sum(beta) == pytest.approx(alpha, abs=1e-14)


@BY_NAME
def test_order_conditions_on_quadratures(tableau: Tableau) -> None:
    """Σ b_i c_i^(q-1) = 1/q up to the order."""
    abscissae = (0.0, *tableau.alpha)
    for q in range(1, tableau.order + 1):
        total = sum(b * c ** (q - 1) for b, c in zip(tableau.solution, abscissae, strict=True))
        assert total == pytest.approx(1 / q, abs=1e-14), q


@pytest.mark.parametrize("tableau", ADAPTIVE.values(), ids=ADAPTIVE)
def test_adaptive_methods_are_torchdiffeqs(tableau: Tableau) -> None:
    theirs = SOLVERS[tableau.name]
    assert tableau.order == theirs.order
    assert torch.equal(torch.tensor(tableau.alpha, dtype=torch.float64), theirs.tableau.alpha)
    for ours, row in zip(tableau.beta, theirs.tableau.beta, strict=True):
        assert torch.equal(torch.tensor(ours, dtype=torch.float64), row)
    for ours, row in (
        (tableau.solution, theirs.tableau.c_sol),
        (tableau.error, theirs.tableau.c_error),
        (tableau.mid, theirs.mid),
    ):
        assert torch.equal(torch.tensor(ours, dtype=torch.float64), row)


@pytest.mark.parametrize("tableau", ADAPTIVE.values(), ids=ADAPTIVE)
def test_dense_output_passes_through_the_ends(tableau: Tableau) -> None:
    """Quartic: y1 at 1, y_mid at 1/2, slope k_0 at 0 and k_{J-1} at 1; error row sums to 0."""
    dense = tableau.dense
    powers = torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)
    stages = torch.eye(tableau.num_stages, dtype=torch.float64)
    half = 0.5**powers
    close = {"atol": 1e-13, "rtol": 0}
    torch.testing.assert_close(
        dense.sum(0), torch.tensor(tableau.solution, dtype=torch.float64), **close
    )
    torch.testing.assert_close(
        half @ dense, torch.tensor(tableau.mid, dtype=torch.float64), **close
    )
    torch.testing.assert_close(dense[0], stages[0], **close)
    torch.testing.assert_close(powers @ dense, stages[-1], **close)
    assert sum(tableau.error) == pytest.approx(0, abs=1e-13)


def test_what_is_kept_does_not_depend_on_who_asks_first() -> None:
    device = torch.device("cpu")

    def tables() -> list[Tensor]:
        for cached in (row_tensor, exact._taylor_table, forced._interpolation):
            cached.cache_clear()
        row = row_tensor(DOPRI5.error, torch.float32, device)
        return [
            dataclasses.replace(DOPRI5).dense,
            row,
            exact._taylor_table(5, device),
            *forced._interpolation(device),
        ]

    expected = tables()
    with torch.inference_mode(), torch.device("meta"):
        kept = tables()
    for mine, theirs in zip(kept, expected, strict=True):
        assert not mine.is_inference()
        assert torch.equal(mine, theirs)
