"""Propagators with lively dynamics and random signals for solver tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gfnode_fast import reference
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE, ModeRHS, Propagator

DTYPE = torch.float64


def propagator(
    basis: str | None = "graph",
    *,
    channels: int = 6,
    num_modes: int = 3,
    mode_interaction: str = "no_interaction",
    time_mode: str = "none",
    solver: str = "dopri5",
    rtol: float = 1e-3,
    atol: float = 1e-4,
    scale: float = 2.0,
    seed: int = 0,
    no_ode: bool = False,
) -> Propagator:
    """fp64, weights re-centred and scaled so that several steps are taken."""
    torch.manual_seed(seed)
    rhs = (
        LinearBasisRHS(channels, num_modes)
        if basis == "linear"
        else ModeRHS(channels, num_modes, mode_interaction, time_mode, 6)
    )
    built = Propagator(
        basis, num_modes, ModeODE(rhs, solver=solver, rtol=rtol, atol=atol, no_ode=no_ode)
    ).to(DTYPE)
    with torch.no_grad():
        weights = rhs.weights1
        weights.sub_(weights.mean()).mul_(scale * channels)
    return built


def signals(
    batch: int = 3,
    num_atoms: int = 5,
    components: int = 1,
    channels: int = 6,
    num_times: int = 4,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """signal (B, N, D, C), times (B, T) in (0, 1], eigenvectors (B, N, N)."""
    g = torch.Generator().manual_seed(seed)
    signal = torch.randn(batch, num_atoms, components, channels, generator=g, dtype=DTYPE)
    times = torch.rand(batch, num_times, generator=g, dtype=DTYPE).sort().values + 0.01
    matrix = torch.randn(batch, num_atoms, num_atoms, generator=g, dtype=DTYPE)
    return signal, times, torch.linalg.qr(matrix)[0]


def outputs_and_gradients(function: Any, model: Propagator, *given: Any) -> dict[str, Tensor]:
    """The output and the gradients of a fixed random functional of it."""
    signal, times, eigvecs = given
    leaf = signal.clone().requires_grad_()
    model.zero_grad()
    out = function(model, leaf, times, eigvecs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    (out * cotangent.to(out.device)).sum().backward()
    found = {"output": out.detach(), "grad signal": leaf.grad}
    for name, parameter in model.named_parameters():
        found[f"grad {name}"] = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        )
    return found


def published(model: Propagator, *given: Any) -> Tensor:
    out: Tensor = model(*given)
    return out


__all__ = ["outputs_and_gradients", "propagator", "published", "reference", "signals"]
