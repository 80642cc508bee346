"""The order of windows: every window, or molecules by temperature."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gfnode_fast.training.order import epoch_order

COUNTS = [80, 15, 5]


def drawn(order: torch.Tensor) -> np.ndarray:
    bounds = np.cumsum([0, *COUNTS])
    return np.histogram(order.numpy(), bins=bounds)[0]


def test_it_is_a_function_of_seed_and_epoch():
    assert torch.equal(epoch_order(1, 2, [50]), epoch_order(1, 2, [50]))
    assert not torch.equal(epoch_order(1, 2, [50]), epoch_order(1, 3, [50]))
    assert not torch.equal(epoch_order(1, 2, [50]), epoch_order(2, 2, [50]))
    assert sorted(epoch_order(1, 2, [50]).tolist()) == list(range(50))
    for temperature in (2.0, None):
        orders = [epoch_order(1, epoch, COUNTS, temperature) for epoch in (2, 2, 3)]
        assert torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], orders[2])


def test_temperature_one_takes_every_window_once():
    assert torch.equal(epoch_order(3, 1, COUNTS), epoch_order(3, 1, [100]))


@pytest.mark.parametrize("temperature", [0.5, 2.0, 5.0, None])
def test_frequencies_follow_the_temperature(temperature):
    weights = np.asarray(COUNTS, float) ** (0 if temperature is None else 1 / temperature)
    share = 100 * weights / weights.sum()
    found = np.array([drawn(epoch_order(0, e, COUNTS, temperature)) for e in range(400)])
    assert (found.sum(axis=1) == 100).all()
    assert (np.abs(found - share) < 1).all()
    np.testing.assert_allclose(found.mean(axis=0), share, atol=0.1)


@pytest.mark.parametrize("temperature", [1e-3, 5e-324])
def test_a_low_temperature_takes_the_largest_alone(temperature):
    assert drawn(epoch_order(0, 0, COUNTS, temperature)).tolist() == [100, 0, 0]


def test_windows_of_a_molecule_are_drawn_equally_often():
    order = epoch_order(0, 0, COUNTS, None)
    times = torch.bincount(order, minlength=100)
    for first, last in zip((0, 80, 95), (80, 95, 100), strict=True):
        assert int(times[first:last].max() - times[first:last].min()) <= 1
