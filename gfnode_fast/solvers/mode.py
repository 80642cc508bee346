"""How a solve chooses its steps: the values of `solver_mode`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gfnode_fast.solvers.tableau import ADAPTIVE, FIXED_GRID

MODE_NAMES = ("joint", "per_molecule", "exact")


@dataclass(frozen=True)
class FixedStep:
    """Uniform steps of this size, in normalised time; made by `fixed`."""

    step_size: float

    def __repr__(self) -> str:
        return f"fixed({self.step_size:g})"


def fixed(step_size: float) -> FixedStep:
    """`solver_mode` of uniform steps from s = 0.

    Args:
        step_size: size of a step in normalised time, s = 1 being delta_frame frames; in (0, 1].

    Raises:
        TypeError, ValueError: not such a number.
    """
    if isinstance(step_size, bool) or not isinstance(step_size, int | float):
        raise TypeError(
            f"fixed: `step_size` must be a number, got {type(step_size).__name__}; pass e.g. 0.05"
        )
    if not (math.isfinite(step_size) and 0 < step_size <= 1):
        raise ValueError(
            f"fixed: `step_size` must be in (0, 1], got {step_size}; s = 1 is delta_frame frames, "
            "pass e.g. 0.05"
        )
    return FixedStep(float(step_size))


SolverMode = str | FixedStep


def check_solver_mode(
    op: str, mode: object, *, solver: str, no_ode: bool, mixes_modes: bool
) -> None:
    """Refuse a `solver_mode` that does not exist or that this dynamics or solver cannot have.

    Raises:
        TypeError: neither a string nor fixed(step_size).
        ValueError: an unknown name, or one that conflicts with the other arguments.
    """

    def refuse(argument: str, expected: str, got: object, remedy: str) -> ValueError:
        return ValueError(f"{op}: `{argument}` must be {expected}, got {got!r}; {remedy}")

    choices = f"one of {list(MODE_NAMES)} or fixed(step_size)"
    if not isinstance(mode, str | FixedStep):
        raise TypeError(
            f"{op}: `solver_mode` must be {choices}, got {type(mode).__name__} ({mode!r:.80}); "
            "pass one of them"
        )
    if isinstance(mode, str) and mode not in MODE_NAMES:
        raise refuse("solver_mode", choices, mode, "correct the name")
    if mode == "joint":
        return
    if no_ode:
        raise refuse("solver_mode", "'joint' with no_ode=True", mode, "nothing is solved there")
    if mode == "exact":
        if mixes_modes:
            raise refuse(
                "solver_mode",
                "'joint', 'per_molecule' or fixed(step_size) where modes interact",
                mode,
                "use mode_interaction='no_interaction', which makes the dynamics linear",
            )
        if solver != "dopri5":
            raise refuse(
                "solver",
                "the default 'dopri5' with solver_mode='exact'",
                solver,
                "no solver runs there: drop one of the two",
            )
    elif mode == "per_molecule" and solver not in ADAPTIVE:
        raise refuse(
            "solver",
            f"one of {list(ADAPTIVE)} with solver_mode='per_molecule'",
            solver,
            "choose an adaptive method",
        )
    elif isinstance(mode, FixedStep) and solver not in FIXED_GRID:
        raise refuse(
            "solver",
            f"one of {list(FIXED_GRID)} with solver_mode={mode}",
            solver,
            "pass e.g. solver='rk4'",
        )
