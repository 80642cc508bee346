"""Other people's solvers and eigensolvers, and our own operations measured beside them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import inputs
from benchmarks.registry import CACHED, CUDA_SOLVER, Row
from benchmarks.task import Task, Unavailable, function_task
from gfnode_fast.data import Batch
from gfnode_fast.ops.eigh import eigh_batched
from gfnode_fast.spectra import Graphs, SpectralCache, graph_laplacian, graph_spectrum

NUMBERINGS = 8  # of the molecule of a "spectrum" row


def initial_modes(row: Row, batch: Batch, width: int) -> Tensor:
    """(M, B, 1, K) modal state of seeded features, requiring grad."""
    shape = (row.num_modes, row.batch, 1, width)
    return inputs.normal(shape, batch.x).requires_grad_()


def solve_ours(ode: nn.Module, y0: Tensor, s: Tensor) -> Tensor:
    """Our joint solve in the reference's layout, (T, B, M, 1, K)."""
    from gfnode_fast.ops.mode_rhs import right_hand_side
    from gfnode_fast.solvers.joint import solve_joint
    from gfnode_fast.solvers.tableau import ADAPTIVE

    solved = solve_joint(
        right_hand_side(ode.ode_func), y0, s, ADAPTIVE[ode.solver], ode.rtol, ode.atol
    )
    return solved.permute(1, 0, 3, 2, 4)


def solve_triton(ode: nn.Module, y0: Tensor, s: Tensor, max_attempts: int = 16) -> Tensor:
    """The same by Triton kernels, whose counts nobody reads."""
    from gfnode_fast.ops.triton_solve import triton_solve
    from gfnode_fast.solvers.stats import SolveStats

    solved = triton_solve(ode, y0, s, SolveStats(), "joint", max_attempts)
    return solved.permute(1, 0, 3, 2, 4)


def solve_compiled(ode: nn.Module, y0: Tensor, s: Tensor) -> Tensor:
    """The same, with both directions compiled."""
    from gfnode_fast.ops.compiled_solve import compiled_solve
    from gfnode_fast.solvers.stats import SolveStats

    return compiled_solve(ode, y0, s, SolveStats()).permute(1, 0, 3, 2, 4)


def solve_eager_loop(ode: nn.Module, y0: Tensor, s: Tensor) -> Tensor:
    """What `solve_compiled` compiles, in both directions, run as it stands."""
    from gfnode_fast.ops.mode_rhs import right_hand_side
    from gfnode_fast.solvers import compiled
    from gfnode_fast.solvers.stats import SolveStats
    from gfnode_fast.solvers.tableau import ADAPTIVE
    from gfnode_fast.solvers.traced import TracedSolve

    rhs = right_hand_side(ode.ode_func)
    function = compiled.function_of(rhs)
    solve = TracedSolve(function, ADAPTIVE[ode.solver], ode.rtol, ode.atol)
    loops = SimpleNamespace(solve=solve, forward=solve.forward, backward=solve.backward)
    solved = compiled.solve_in_graphs(
        compiled._CompiledSolve, loops, SolveStats(), s.double(), y0, rhs.parameters
    )
    return solved.permute(1, 0, 3, 2, 4)


def solve_stages(ode: nn.Module, y0: Tensor, s: Tensor) -> Tensor:
    """Our joint solve stage by stage, as it is where modes interact, instead of by powers of W."""
    from gfnode_fast.ops.mode_rhs import right_hand_side
    from gfnode_fast.solvers import joint
    from gfnode_fast.solvers.stats import SolveStats
    from gfnode_fast.solvers.tableau import ADAPTIVE

    rhs = right_hand_side(ode.ode_func)
    modes, batch, components, channels = y0.shape
    tolerances = (ode.rtol, ode.atol)
    rows = y0.reshape(modes, batch * components, channels)
    values = joint._JointSolve.apply(
        rhs, ADAPTIVE[ode.solver], tolerances, SolveStats(), s.double(), rows, *rhs.parameters
    )
    shaped = values.view(batch, s.shape[1], components, modes, channels)
    return shaped.permute(1, 0, 3, 2, 4)


def torchode_task(row: Row, batch: Batch, model: nn.Module) -> Task:
    """torchode's parallel dopri5, each molecule with its own step size, on the features' ODE."""
    try:
        import torchode
    except ImportError as error:
        raise Unavailable(f"torchode is not installed: {error}") from error
    ode = model.freq_conv.t_conv
    if ode.ode_func.mode_interaction != "no_interaction" or ode.ode_func.time_embedding is not None:
        raise Unavailable("the torchode row has the linear right-hand side only")
    num_modes, width = row.num_modes, model.hidden_nf
    weights = ode.ode_func.weights1
    y0 = initial_modes(row, batch, width)
    s = batch.timeframes / inputs.DELTA_FRAME

    def derivative(_: Tensor, y: Tensor) -> Tensor:
        return torch.einsum("bmi,mio->bmo", y.view(-1, num_modes, width), weights).flatten(1)

    term = torchode.ODETerm(derivative)
    method = torchode.Dopri5(term=term)
    controller = torchode.IntegralController(atol=ode.atol, rtol=ode.rtol, term=term)
    solver = torchode.AutoDiffAdjoint(method, controller).to(batch.x.device)

    def call() -> tuple[Tensor, ...]:
        state = y0.squeeze(2).transpose(0, 1).flatten(1)
        problem = torchode.InitialValueProblem(
            y0=state, t_start=torch.zeros_like(s[:, 0]), t_end=s[:, -1], t_eval=s
        )
        ys = solver.solve(problem).ys  # (B, T, M*K)
        return (ys.view(row.batch, -1, num_modes, 1, width).transpose(0, 1),)

    return function_task(row, call, {"y0": y0}, dict(model.named_parameters()))


def eigh_task(contender: str, row: Row, device: torch.device) -> Task:
    """Spectra of a batch of Laplacians; compared by eigenvalues and by what they recompose to."""
    matrices = inputs.laplacians(row, device, inputs.dtype_of(row.precision))
    host = matrices.cpu().numpy()

    def numpy_loop() -> tuple[Tensor, Tensor]:
        spectra = [np.linalg.eigh(matrix) for matrix in host]
        values, vectors = (torch.from_numpy(np.stack(part)) for part in zip(*spectra, strict=True))
        return values.to(device), vectors.to(device)

    if contender == "torch":
        run = lambda: torch.linalg.eigh(matrices)  # noqa: E731
    elif contender == "numpy loop":
        run = numpy_loop
    elif contender == CUDA_SOLVER and device.type != "cuda":
        raise Unavailable(f"the CUDA kernels need a CUDA device, this is {device}")
    else:
        backend = "cpp" if contender == CUDA_SOLVER else "auto"
        run = lambda: eigh_batched(matrices, backend=backend)  # noqa: E731

    return Task(run, lambda: _spectral_values(*run()))


def spectrum_task(contender: str, row: Row, device: torch.device) -> Task:
    """Spectra of a batch of graphs: the eigenproblem alone, ours, and ours where all are known.

    The graphs are the row's molecule in NUMBERINGS different orders of its atoms.
    """
    graph, dtype = inputs.molecular_graph(row.molecule), inputs.dtype_of(row.precision)
    n, generator = graph.num_atoms, torch.Generator().manual_seed(inputs.SEED)
    orders = torch.stack([torch.randperm(n, generator=generator) for _ in range(NUMBERINGS)])
    shift = torch.arange(NUMBERINGS)[:, None] * n
    row_of, col_of = ((orders[:, end] + shift).flatten() for end in (graph.row, graph.col))
    ptr = torch.arange(NUMBERINGS + 1) * n
    known = Graphs(*(ends.to(device) for ends in (row_of, col_of, ptr)))
    which = torch.randint(NUMBERINGS, (row.batch,), generator=generator).to(device)
    batch = known.select(which)
    cache = SpectralCache()
    if contender == "torch":
        matrices = graph_laplacian(batch, dtype=dtype)
        run = lambda: torch.linalg.eigh(matrices)  # noqa: E731
    elif contender == "ours":
        run = lambda: graph_spectrum(batch, dtype=dtype)  # noqa: E731
    elif contender == CACHED[0]:
        run = lambda: cache.spectrum(known, which=which, dtype=dtype)  # noqa: E731
    else:
        edges = (batch.row, batch.col, batch.ptr)
        run = lambda: cache.spectrum(Graphs(*edges), dtype=dtype)  # noqa: E731
    return Task(run, lambda: _spectral_values(*run()))


def _spectral_values(spectrum: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    return {
        "output eigenvalues": spectrum,
        "output recomposed": (vectors * spectrum[:, None]) @ vectors.transpose(1, 2),
    }
