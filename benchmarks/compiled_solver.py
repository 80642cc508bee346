"""The compiled solver loop against the eager one, forward and backward, one thread, interleaved in
one run: the features' solve alone, and the propagation of features and vectors.

The eager loop is U1: torchdiffeq's solver driven by a plain Python loop under autograd, the same
steps, each molecule's own times. Also the drop-in's default ("torch"). Prints one JSON object per
row.

    python -m benchmarks.compiled_solver [--batch 50 ...] [--model egnn ...] [--seconds 5]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gfnode_fast
from benchmarks import inputs, timing
from benchmarks.baselines import u1
from benchmarks.registry import MODELS, Row
from gfnode_fast import reference
from gfnode_fast.ops.compiled_solve import compiled_solve
from gfnode_fast.ops.mode_rhs import right_hand_side
from gfnode_fast.solvers.joint import solve_joint
from gfnode_fast.solvers.stats import SolveStats
from gfnode_fast.solvers.tableau import ADAPTIVE

EAGER = "eager loop (U1)"
AGREEMENT = 1e-3  # of fp32 gradients with the eager loop's, relative, far above what is measured


Piece = tuple[Callable[[], tuple[Tensor, ...]], list[Tensor]]
"""A differentiable computation and the leaves whose gradients are wanted."""


def propagation(name: str, model: reference.FourierMD, row: Row) -> Piece:
    """Transforms, both solves, activation, residual."""
    batch = inputs.make_batch(row, torch.device("cpu"))
    generator = torch.Generator().manual_seed(inputs.SEED)
    h = torch.randn(batch.x.shape[0], model.hidden_nf, generator=generator)
    state = [leaf.clone().requires_grad_() for leaf in (batch.x, batch.v, h)]
    s = batch.timeframes / inputs.DELTA_FRAME
    shape = (row.batch, model.num_atoms)
    parameters = [*model.freq_conv.parameters(), *model.freq_conv_x.parameters()]
    return (
        lambda: model._propagate(*state, batch.loc_mean, s, batch.U_batch, shape),
        [*state, *parameters],
    )


def solve(name: str, model: reference.FourierMD, row: Row) -> Piece:
    """The features' solve alone."""
    batch = inputs.make_batch(row, torch.device("cpu"))
    generator = torch.Generator().manual_seed(inputs.SEED)
    y0 = torch.randn(row.num_modes, row.batch, 1, model.hidden_nf, generator=generator)
    y0.requires_grad_()
    s = batch.timeframes / inputs.DELTA_FRAME
    ode = model.freq_conv.t_conv

    def call() -> tuple[Tensor, ...]:
        if name == EAGER:
            return (ode(y0, s),)
        if name == "compiled":
            return (compiled_solve(ode, y0, s, SolveStats()),)
        rhs = right_hand_side(ode.ode_func)
        return (solve_joint(rhs, y0, s, ADAPTIVE[ode.solver], ode.rtol, ode.atol),)

    return call, [y0, *ode.parameters()]


PIECES = {"solve": solve, "propagation": propagation}


def differentiate(piece: Piece) -> Callable[[], None]:
    call, leaves = piece

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        sum(value.square().mean() for value in call()).backward()

    return run


def measure(row: Row, seconds: float) -> dict[str, Any]:
    config = inputs.model_config(row)
    models = {
        EAGER: u1.FourierMD(**config),
        "torch": gfnode_fast.FourierMD(**config, backend="torch"),
        "compiled": gfnode_fast.FourierMD(**config, backend="compiled"),
    }
    runs, gradients = {}, {}
    for name, model in models.items():
        model.load_state_dict(inputs.initial_state(row))
        piece = PIECES[row.op](name, model, row)
        runs[name] = differentiate(piece)
        begin = time.perf_counter()
        runs[name]()
        first = time.perf_counter() - begin
        gradients[name] = [leaf.grad for leaf in piece[1]]
    worst = max(
        ((a - b).norm() / b.norm()).item()
        for a, b in zip(gradients["compiled"], gradients[EAGER], strict=True)
        if b is not None
    )
    if not worst < AGREEMENT:
        raise RuntimeError(f"{row.name}: gradients differ by {worst:.1e}; nothing was timed")
    timings = timing.interleaved(runs, torch.device("cpu"), rounds=1000, seconds_each=seconds)
    return {
        "row": row.name,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "worst_gradient_error": worst,
        "first_call_s": first,  # compiling, unless the compiler's cache has it
        "median_ms": {n: t.summary()["median_s"] * 1e3 for n, t in timings.items()},
        "times_faster": {n: timing.ratio(timings[EAGER], t) for n, t in timings.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[50])
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=5.0, help="per contender and row")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for model in given.model:
        for batch in given.batch:
            for op in PIECES:
                row = Row(op, "backward", batch, model=model)
                print(json.dumps(measure(row, given.seconds)), flush=True)


if __name__ == "__main__":
    main()
