"""Spectral propagation: transform over the atoms, solve each mode's ODE, transform back at T times.

Oracle: `gfnode_fast.reference.Propagator`. Cost and memory are linear in the batch and in the
output times, except for fixed-step solvers on the published union grid.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gfnode_fast.ops.compiled_solve import compiled_solve
from gfnode_fast.ops.cpp_solve import check_cpp_solve
from gfnode_fast.ops.dispatch import in_transform
from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
from gfnode_fast.ops.graph_fourier_torch import sum_beside
from gfnode_fast.ops.joint_status import MAX_ATTEMPTS, check_max_attempts
from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.ops.synthesis import serves, synthesise_solved
from gfnode_fast.ops.triton_solve import triton_solve
from gfnode_fast.reference.checks import check_choice
from gfnode_fast.reference.propagator import LinearBasisRHS, ModeODE, ModeRHS, Propagator
from gfnode_fast.solvers.errors import check_all_times, check_state
from gfnode_fast.solvers.exact import solve_exact
from gfnode_fast.solvers.fixed_step import solve_fixed
from gfnode_fast.solvers.grid import solve_grid
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.mode import FixedStep, SolverMode, check_solver_mode
from gfnode_fast.solvers.per_molecule import solve_per_molecule
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE, FIXED_GRID

SOLVE_BACKENDS = ("torch", "cpp", "compiled", "triton")
CHAOTIC_TIME_MODES = ("posenc", "rope")


def propagate(
    propagator: Propagator,
    signal: Tensor,
    times: Tensor,
    eigvecs: Tensor | None,
    stats: SolveStats | None = None,
    *,
    backend: str = "torch",
    transforms: str = "auto",
    solver_mode: SolverMode = "joint",
    max_attempts: int | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    beside: Tensor | None = None,
    ptr: Tensor | None = None,
) -> Tensor:
    """The propagator's output with its own parameters, without the published output handling.

    Args:
        propagator: reference module that holds basis, solver and parameters.
        signal: (B, N, D, C) at time 0; (ΣN, D, C) with `ptr`.
        times: (B, T) normalised times > 0.
        eigvecs: (B, N, N) for the graph basis, else ignored; (ΣN²,) with `ptr`.
        stats: counts evaluations and steps when given, and keeps what `max_attempts` follows from.
        backend: of the solve: "torch", "cpp" for linear and affine dynamics (`why_no_cpp_solve`),
            "compiled" for torch.compile around the solver loop, or "triton", which takes the
            transforms too.
        transforms: "torch", "triton", or "auto", which takes Triton where `graph_fourier` does and
            the compiled inverse on the CPU where it serves (`synthesis`).
        solver_mode: "joint" takes the published solver's steps; "per_molecule", "exact" and
            `fixed(step_size)` are those of `gfnode_fast.solvers`.
        max_attempts: of a joint solve by Triton, which launches a number of step attempts that the
            host decides before. None: twice what the longest solve so far with these `stats` took,
            at least 16; 16 without `stats` and in graphs of torch.compile. No effect elsewhere.
        activation: when given, what the model does next is done here: the result is the signal
            plus the activation of what was propagated, in one pass where it is compiled.
        beside: (T, B, W), put after the channels of each of a molecule's atoms in that result, by
            the same pass where it needs no gradient; of D = 1.
        ptr: (B+1,) int64, molecules of different size: molecule b owns the atoms ptr[b] ...
            ptr[b+1]-1, as in `graph_fourier`. Modes that a molecule does not have (m >= N_b) start
            at 0. Of the graph basis only.

    Returns:
        (T, B, N, D, C), or (T, ΣN, D, C) with `ptr`; C + W channels with `beside`.

    Raises:
        TypeError, ValueError: a `beside` of another shape or dtype, or without `activation`.
        ValueError: another backend; a solver_mode that this dynamics, solver or backend does not
            have; times that are not positive and finite, where something is solved.
        RuntimeError: another backend than "torch" with what it does not have (`check_cpp_solve`,
            `check_compilable`, `check_triton_solve`); a transform of torch.func; with "compiled" a
            TorchDispatchMode such as FlopCounterMode's, in backward too.
        SolverError: non-finite state or step underflow, or too few `max_attempts`; with
            backend="triton" on a GPU from `stats`, later, and until then the values are NaN.

    Notes:
        With "joint": the published solver's accepted steps, values within rounding, gradients of
        the published discrete solve. Deterministic. Once differentiable; `times` get no gradient.
    """
    if in_transform():
        raise RuntimeError(
            "propagate: `signal` must be a plain tensor, got one in a transform of torch.func "
            "(grad, vjp, jvp, vmap, ...); use torch.autograd.grad, one gradient at a time"
        )
    check_choice("backend", backend, SOLVE_BACKENDS)
    check_mode_of("propagate", solver_mode, propagator.t_conv, backend)
    _check_shapes(propagator, signal, times, ptr)
    _check_beside(beside, signal, times, activation)
    if max_attempts is not None:
        check_max_attempts("propagate", max_attempts)
    elif stats is None:
        max_attempts = MAX_ATTEMPTS  # nothing is known, nor will be
    stats = SolveStats() if stats is None else stats
    transforms = "triton" if backend == "triton" else transforms
    modes = _transform(propagator, signal, eigvecs, ptr, transforms)
    if backend == "triton":
        ode = propagator.t_conv
        solved = triton_solve(ode, modes, times, stats, solver_mode, max_attempts)
    elif backend == "compiled":
        solved = compiled_solve(propagator.t_conv, modes, times, stats, solver_mode)
    else:
        if backend == "cpp":
            ode = propagator.t_conv
            check_cpp_solve("propagate", ode, solver_mode, modes.device, modes.dtype)
        solve = _solve if solver_mode == "joint" else _solve_in_mode
        solved = solve(propagator.t_conv, modes, times, stats, solver_mode, backend)
    return _transform_back(propagator, solved, signal, eigvecs, ptr, activation, beside, transforms)


def check_mode_of(op: str, mode: object, ode: ModeODE, backend: str) -> None:
    """Refuse a `solver_mode` that this ODE, its solver or the backend does not have."""
    function = ode.ode_func
    check_solver_mode(
        op,
        mode,
        solver=ode.solver,
        no_ode=ode.no_ode,
        mixes_modes=isinstance(function, ModeRHS) and function.mode_interaction != "no_interaction",
    )
    if mode != "joint" and backend == "reference":
        raise ValueError(
            f"{op}: `solver_mode` must be 'joint' with backend='reference', got {mode!r}; use "
            "backend='torch'"
        )
    forced = isinstance(function, ModeRHS) and function.time_mode not in ("none", "concat")
    if mode == "exact" and backend == "compiled" and forced:
        raise ValueError(
            f"{op}: `time_mode` must be 'none' or 'concat' with solver_mode='exact' and "
            f"backend='compiled', got {function.time_mode!r}; use backend='torch'"
        )


def _is_chaotic(ode: ModeODE) -> bool:
    """Whether step control amplifies rounding; then the initial state must be the reference's."""
    function = ode.ode_func
    return not isinstance(function, LinearBasisRHS) and function.time_mode in CHAOTIC_TIME_MODES


def _check_shapes(
    propagator: Propagator, signal: Tensor, times: Tensor, ptr: Tensor | None
) -> None:
    if ptr is not None and propagator.basis != "graph":
        raise ValueError(
            "propagate: `ptr` must be None without the graph basis, got offsets for "
            f"{propagator.basis!r}; propagate molecules of one size at a time"
        )
    shape, dims = ("(B, N, D, C)", 4) if ptr is None else ("(ΣN, D, C) beside `ptr`", 3)
    if signal.dim() != dims:
        raise ValueError(
            f"propagate: `signal` must be {shape}, got {tuple(signal.shape)}; reshape it"
        )
    batch = signal.shape[0] if ptr is None else ptr.shape[0] - 1
    if times.dim() != 2 or times.shape[0] != batch:
        raise ValueError(
            f"propagate: `times` must be ({batch}, T), got {tuple(times.shape)}; pass a row of "
            "times for each molecule"
        )


def _check_beside(
    beside: Tensor | None,
    signal: Tensor,
    times: Tensor,
    activation: Callable[[Tensor], Tensor] | None,
) -> None:
    if beside is None:
        return
    shape = tuple(times.shape[::-1])
    if activation is None or signal.shape[-2] != 1:
        raise ValueError(
            "propagate: `beside` must come with `activation` and a signal of D = 1, got "
            f"{'no activation' if activation is None else f'D = {signal.shape[-2]}'}; join it to "
            "the result"
        )
    if beside.dim() != 3 or beside.shape[:2] != shape:
        raise ValueError(
            f"propagate: `beside` must be ({shape[0]}, {shape[1]}, W), got {tuple(beside.shape)}; "
            "reshape it"
        )
    if beside.dtype != signal.dtype:
        raise TypeError(
            f"propagate: `beside` must be {signal.dtype} like the signal, got {beside.dtype}; "
            "convert it"
        )


def _transform(
    propagator: Propagator,
    signal: Tensor,
    eigvecs: Tensor | None,
    ptr: Tensor | None,
    backend: str,
) -> Tensor:
    """(B, N, D, C), or (ΣN, D, C) with `ptr` → (M, B, D, C)."""
    if propagator.basis != "graph" or (ptr is None and _is_chaotic(propagator.t_conv)):
        return propagator.transform(signal, eigvecs)
    assert eigvecs is not None
    channels = signal.flatten(-2)
    modes = graph_fourier(channels, eigvecs, propagator.num_modes, ptr=ptr, backend=backend)
    return modes.view(*modes.shape[:2], *signal.shape[-2:]).transpose(0, 1)


def _solve(
    ode: ModeODE, modes: Tensor, times: Tensor, stats: SolveStats, mode: SolverMode, backend: str
) -> Tensor:
    """(M, B, D, C) → (B, T, D, M, C), in mode "joint"."""
    function = right_hand_side(ode.ode_func)
    if ode.solver in ADAPTIVE and not ode.no_ode:
        tableau = ADAPTIVE[ode.solver]
        return solve_joint(
            function, modes, times, tableau, ode.rtol, ode.atol, stats, backend=backend
        )
    if ode.solver in FIXED_GRID and not ode.no_ode:
        return solve_grid(function, modes, times, FIXED_GRID[ode.solver], stats)

    # One application of the right-hand side, or a multistep method: the reference, torchdiffeq.
    def counted(s: Tensor | None, y: Tensor) -> Tensor:
        stats.evaluations += 1
        slope: Tensor = ode.ode_func(s, y)
        return slope

    if not ode.no_ode:
        check_all_times(ode.solver, times.detach())
    values = ode.solve(counted, modes, times).permute(1, 0, 3, 2, 4)
    if not ode.no_ode:
        _check_read(ode.solver, values.detach(), times.detach())
    return values


def _check_read(solver: str, values: Tensor, times: Tensor) -> None:
    """Raise SolverError if values (B, T, ...) that torchdiffeq gave at times (B, T) are not finite;
    its steps end at the output times of all molecules.
    """
    bad = ~torch.isfinite(values).flatten(2).all(dim=2)
    if bad.any():
        first = times[bad].min()
        before = times.new_zeros(()) if first == times.min() else times[times < first].max()
        step = (first - before).item()
        check_state(solver, values.flatten(1).unsqueeze(1), first.item(), step, components=1)


def _solve_in_mode(
    ode: ModeODE, modes: Tensor, times: Tensor, stats: SolveStats, mode: SolverMode, backend: str
) -> Tensor:
    """(M, B, D, C) → (B, T, D, M, C), in any mode but "joint"."""
    function = right_hand_side(ode.ode_func)
    if mode == "exact":
        return solve_exact(function, modes, times, ode.rtol, ode.atol, stats, backend=backend)
    if isinstance(mode, FixedStep):
        tableau = FIXED_GRID[ode.solver]
        return solve_fixed(function, modes, times, tableau, mode.step_size, stats)
    tableau = ADAPTIVE[ode.solver]
    return solve_per_molecule(function, modes, times, tableau, ode.rtol, ode.atol, stats)


def _transform_back(
    propagator: Propagator,
    solved: Tensor,
    signal: Tensor,
    eigvecs: Tensor | None,
    ptr: Tensor | None,
    activation: Callable[[Tensor], Tensor] | None,
    beside: Tensor | None,
    backend: str,
) -> Tensor:
    """(B, T, D, M, C) → (T, B, N, D, C), or (T, ΣN, D, C) with `ptr`; C + W with `beside`."""
    if propagator.basis != "graph":
        out = propagator.transform_back(solved.permute(1, 0, 3, 2, 4), signal.shape[1], eigvecs)
        return _with_signal(out, signal, activation, beside, ptr)
    assert eigvecs is not None
    if (
        activation is not None
        and backend == "auto"
        and serves(solved, eigvecs, signal, activation, beside)
    ):
        return synthesise_solved(solved, eigvecs, signal, activation, beside, ptr)
    modes = solved.permute(1, 0, 3, 2, 4).flatten(3)
    total = None if ptr is None else len(signal)
    wants_beside = beside is not None and beside.requires_grad
    is_fused = backend == "triton" and type(activation) is nn.SiLU and not wants_beside
    flat = inverse_graph_fourier(
        modes,
        eigvecs,
        residual=signal.flatten(-2) if is_fused else None,
        activation="silu" if is_fused else None,
        beside=beside if is_fused else None,
        ptr=ptr,
        total_atoms=total,
        backend=backend,
    )
    out = flat.unflatten(-1, (signal.shape[-2], -1))
    return out if is_fused else _with_signal(out, signal, activation, beside, ptr)


def _with_signal(
    out: Tensor,
    signal: Tensor,
    activation: Callable[[Tensor], Tensor] | None,
    beside: Tensor | None,
    ptr: Tensor | None,
) -> Tensor:
    """What the model does next, where it is no part of the transform back."""
    if activation is None:
        return out
    if beside is None:
        return signal + activation(out)
    return sum_beside(signal.squeeze(-2), activation(out).squeeze(-2), beside, ptr).unsqueeze(-2)
