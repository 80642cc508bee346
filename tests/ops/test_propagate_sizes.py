"""Molecules of different size in one batch, by offsets."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from gfnode_fast.ops.propagate import propagate
from gfnode_fast.reference.propagator import Propagator
from gfnode_fast.solvers.mode import SolverMode, fixed
from op_checks import relative_error
from spectral import propagator

SIZES = (5, 2, 7, 1, 5)  # fewer atoms than modes among them
TIMES, COMPONENTS, CHANNELS, MODES = 3, 3, 6, 3
# Measured: 4e-16; the same products on other batch sizes.
BOUND = 1e-13


def molecules() -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Signals (N, D, C) and eigenvectors (N, N) of each, times (B, T), offsets."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    signals = [randn(n, COMPONENTS, CHANNELS) for n in SIZES]
    eigvecs = [torch.linalg.qr(randn(n, n))[0] for n in SIZES]
    times = torch.rand(len(SIZES), TIMES, dtype=torch.float64, generator=generator) + 0.01
    return signals, eigvecs, times, torch.tensor((0, *SIZES)).cumsum(0)


def differentiate(model: Propagator, out: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the leaves and of the parameters, from a cotangent that depends on the value."""
    found = torch.autograd.grad(out.sin().sum(), [*leaves, *model.parameters()])
    return [grad.detach() for grad in found]


def together(
    model: Propagator, mode: SolverMode, activation: nn.Module | None = None
) -> tuple[Tensor, list[Tensor]]:
    signals, eigvecs, times, ptr = molecules()
    leaf, basis = torch.cat(signals).requires_grad_(), torch.cat([u.flatten() for u in eigvecs])
    out = propagate(model, leaf, times, basis, solver_mode=mode, ptr=ptr, activation=activation)
    assert out.shape == (TIMES, sum(SIZES), COMPONENTS, CHANNELS)
    return out.detach(), differentiate(model, out, [leaf])


@pytest.mark.parametrize(
    ("mode", "interaction"),
    [
        ("exact", "no_interaction"),
        ("per_molecule", "no_interaction"),
        ("per_molecule", "attention"),
        (fixed(0.2), "attention"),
    ],
    ids=str,
)
def test_each_molecule_alone(mode: SolverMode, interaction: str) -> None:
    solver = "rk4" if mode == fixed(0.2) else "dopri5"
    model = propagator(solver=solver, mode_interaction=interaction, num_modes=MODES)
    activation = nn.SiLU()
    values, (grad_signal, *grads) = together(model, mode, activation)
    signals, eigvecs, times, ptr = molecules()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for b, (signal, basis) in enumerate(zip(signals, eigvecs, strict=True)):
        size = max(MODES, SIZES[b])  # padded where modes are missing
        padded = signal.new_zeros(1, size, COMPONENTS, CHANNELS)
        padded[0, : SIZES[b]] = signal
        square = basis.new_zeros(1, size, size)
        square[0, : SIZES[b], : SIZES[b]] = basis
        leaf = padded.requires_grad_()
        out = propagate(
            model, leaf, times[b : b + 1], square, solver_mode=mode, activation=activation
        )[:, 0, : SIZES[b]]
        own = slice(ptr[b], ptr[b + 1])
        assert relative_error(values[:, own], out) < BOUND
        grad_leaf, *more = differentiate(model, out, [leaf])
        assert relative_error(grad_signal[own], grad_leaf[0, : SIZES[b]]) < BOUND
        total = [a + c for a, c in zip(total, more, strict=True)]
    for mine, alone in zip(grads, total, strict=True):
        assert relative_error(mine, alone) < BOUND


@pytest.mark.parametrize("changes", [{}, {"solver": "rk4"}, {"mode_interaction": "attention"}])
def test_joint_solve_of_the_padded_batch(changes: dict[str, str]) -> None:
    model = propagator(num_modes=MODES, **changes)
    values, (grad_signal, *grads) = together(model, "joint")
    signals, eigvecs, times, ptr = molecules()
    padded = torch.zeros(len(SIZES), max(SIZES), COMPONENTS, CHANNELS, dtype=torch.float64)
    square = torch.zeros(len(SIZES), max(SIZES), max(SIZES), dtype=torch.float64)
    for b, size in enumerate(SIZES):
        padded[b, :size] = signals[b]
        square[b, :size, :size] = eigvecs[b]
    leaf = padded.requires_grad_()
    out = propagate(model, leaf, times, square)
    kept = torch.cat([out[:, b, :size] for b, size in enumerate(SIZES)], dim=1)
    grad_leaf, *alone = differentiate(model, kept, [leaf])
    assert relative_error(values, kept) < BOUND
    rows = torch.cat([grad_leaf[b, :size] for b, size in enumerate(SIZES)])
    for mine, other in zip([grad_signal, *grads], [rows, *alone], strict=True):
        assert relative_error(mine, other) < BOUND


def test_refusals() -> None:
    signals, eigvecs, times, ptr = molecules()
    flat, basis = torch.cat(signals), torch.cat([u.flatten() for u in eigvecs])
    with pytest.raises(ValueError, match="`ptr` must be None without the graph basis"):
        propagate(propagator("linear"), flat, times, basis, ptr=ptr)
    with pytest.raises(ValueError, match=r"`signal` must be \(ΣN, D, C\) beside `ptr`"):
        propagate(propagator(), flat[None], times, basis, ptr=ptr)
    with pytest.raises(ValueError, match="`eigvecs` must have"):
        propagate(propagator(), flat, times, basis[1:], ptr=ptr)
    with pytest.raises(ValueError, match="`times`"):
        propagate(propagator(), flat, times[1:], basis, ptr=ptr)
