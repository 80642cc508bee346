"""The response of linear dynamics at rest to a forcing of time alone: p' = p W + f(s), p(0) = 0.

    p(s) = ∫_0^s f(σ) exp((s - σ) W) dσ

It is the same for every molecule. Time is cut into panels, a power of two per unit of time, halved
until the polynomial of degree Q - 1 through f at a panel's Q nodes is f to the tolerance; for that
polynomial the panel is then solved exactly, by its power series. Starts of panels follow from one
another by a prefix sum of logarithmic depth. Everything is float64, whatever the state is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from gfnode_fast.solvers.errors import SolverError
from gfnode_fast.solvers.rhs import LinearRHS
from gfnode_fast.solvers.tableau import kept
from gfnode_fast.solvers.transfers import to_device

NODES = 8
MAX_PANELS = 2**14
MAX_PANEL_THETA = 1 / 16  # ‖hW‖ of a panel
ROUNDING = 1e-17

Force = Callable[[Tensor], Tensor]
"""(s (n,)) → (n, M, C), float64."""


@lru_cache(maxsize=4)
@kept()
def _interpolation(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chebyshev nodes x (Q,) in (0, 1); Q values → coefficients (Q, Q); → values at the nodes of
    both halves (2 Q, Q).
    """
    x = (1 - np.cos((np.arange(NODES) + 0.5) * math.pi / NODES)) / 2
    coefficients = np.linalg.inv(np.vander(x, increasing=True))
    halves = np.concatenate((x / 2, (1 + x) / 2))
    finer = np.vander(halves, NODES, increasing=True) @ coefficients
    nodes, fit, refine = (torch.from_numpy(a).to(device) for a in (x, coefficients, finer))
    return nodes, fit, refine


def _sample(force: Force, start: int, panels: int, device: torch.device) -> Tensor:
    """f at the nodes of `panels` panels of [start, start + 1]: (panels, Q, M, C)."""
    nodes, _, _ = _interpolation(device)
    panel = torch.arange(panels, dtype=torch.float64, device=device)
    s = start + (panel.unsqueeze(1) + nodes) / panels
    values: Tensor = force(s.flatten()).unflatten(0, (panels, NODES))
    return values


def _resolve(
    force: Force, start: int, panels: int, rtol: float, atol: float, device: torch.device
) -> int:
    """How many panels [start, start + 1] needs: ∫|f - polynomials| <= atol + rtol ∫|f|."""
    _, _, refine = _interpolation(device)
    values = _sample(force, start, panels, device)
    while True:
        finer = _sample(force, start, 2 * panels, device)
        fitted = torch.einsum("xq,nqmc->nxmc", refine, values)
        missed = (fitted - finer.view_as(fitted)).abs().mean(dim=(0, 1)).amax()
        size = finer.abs().mean(dim=(0, 1)).amax()
        error, allowed = torch.stack((missed, atol + rtol * size)).tolist()
        if error <= allowed:
            return panels
        if panels >= MAX_PANELS or not math.isfinite(error):
            raise SolverError(
                f"exact: the forcing must be resolved to {allowed:.3g}, got {error:.3g} for s in "
                f"[{start}, {start + 1}] (step {1 / panels:.3g}, all molecules); loosen rtol and "
                "atol, or use solver_mode='joint'",
                time=float(start),
                step=1 / panels,
                rows=[],
            )
        panels, values = 2 * panels, finer


def _num_terms(theta: float, factorial_from: int) -> int:
    """Smallest j with θ^j q! / (q + j)! below rounding."""
    term, j = 1.0, 0
    while term > ROUNDING:
        j += 1
        term *= theta / (factorial_from + j)
    return j


def _chain(ends: Tensor, flow: Tensor, start: Tensor) -> Tensor:
    """p (M, n, C) with p_0 = start and p_{i+1} = p_i flow + ends_i, n a power of two."""
    if ends.shape[1] == 1:
        return start.unsqueeze(1)
    first, second = ends[:, 0::2], ends[:, 1::2]
    even = _chain(torch.baddbmm(second, first, flow), torch.bmm(flow, flow), start)
    odd = torch.baddbmm(first, even, flow)
    return torch.stack((even, odd), dim=2).flatten(1, 2)


def _series(
    values: Tensor, weight: Tensor, start: Tensor, num_terms: int
) -> tuple[list[Tensor], Tensor]:
    """Power series of p in each panel's x in [0, 1], each (M, n, C), and p at the last end."""
    panels = len(values)
    _, fit, _ = _interpolation(values.device)
    step_weight = weight / panels
    forced = torch.einsum("dq,nqmc->dmnc", fit, values) / panels
    own = [torch.zeros_like(forced[0])]
    for k in range(num_terms - 1):
        term = torch.bmm(own[-1], step_weight)
        own.append((term + forced[k] if k < NODES else term) / (k + 1))
    ends = torch.stack(own).sum(dim=0)
    flow = torch.linalg.matrix_exp(step_weight)
    carried = _chain(ends, flow, start)
    last = torch.baddbmm(ends[:, -1:], carried[:, -1:], flow)[:, 0]
    series = []
    for k, term in enumerate(own):
        carried = carried if k == 0 else torch.bmm(carried, step_weight) / k
        series.append(term + carried)
    return series, last


def forced_response(rhs: LinearRHS, times: Tensor, rtol: float, atol: float) -> Tensor:
    """p at times (B, T), float64 and positive → (B, T, M, C) in the dtype of W.

    Raises:
        SolverError: a forcing that MAX_PANELS panels per unit of time do not resolve; with the
            rope embedding, whose values are rounded to float32, any tolerance below about 1e-7.

    Notes:
        Deterministic; differentiable any number of times in W and the forcing's parameters. Panels
        of a unit of time depend on the forcing alone, not on the times that are read.
    """
    assert rhs.forcing is not None
    forcing, dtype, device = rhs.forcing, rhs.weight.dtype, times.device
    weight, *parameters = (p.double() for p in rhs.parameters)

    def force(s: Tensor) -> Tensor:
        return forcing(s, *parameters)

    norms = torch.linalg.matrix_norm(weight.detach(), ord=float("inf"))
    norm, last = torch.stack((norms.amax(), times.amax())).tolist()
    fewest = 1 << max(2, math.ceil(math.log2(max(norm / MAX_PANEL_THETA, 1.0))))
    units = max(1, math.ceil(last))
    with torch.no_grad():
        counts = [_resolve(force, unit, fewest, rtol, atol, device) for unit in range(units)]
    num_terms = NODES + 1 + _num_terms(norm / min(counts), NODES)
    start = weight.new_zeros(weight.shape[0], weight.shape[2])
    tables: list[list[Tensor]] = []
    for unit, panels in enumerate(counts):
        series, start = _series(_sample(force, unit, panels, device), weight, start, num_terms)
        tables.append(series)

    flat_times = times.flatten()
    unit_of = (flat_times.ceil().long() - 1).clamp_(min=0)
    count = to_device(torch.tensor(counts), device)
    offset = (count.cumsum(0) - count)[unit_of]
    x = (flat_times - unit_of) * count[unit_of]
    panel = torch.minimum(x.floor().long(), count[unit_of] - 1)
    x = (x - panel).to(dtype).view(-1, 1, 1)
    row = offset + panel
    p = weight.new_zeros(1, dtype=dtype)
    for k in reversed(range(num_terms)):
        term = torch.cat([series[k] for series in tables], dim=1).transpose(0, 1).to(dtype)
        p = torch.addcmul(term[row], p, x)
    response: Tensor = p.unflatten(0, times.shape)
    return response
