"""What is run on a GPU that is not there; see `watch`. Each function `case_*` is a test."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gfnode_fast
from fake_gpu import watch as fake
from fake_gpu.watch import on_gpu, watch
from foreign_model import ForeignMD
from gfnode_fast import ops
from gfnode_fast.ops import dispatch
from gfnode_fast.ops.graph_layers_torch import EGNNWeights, MeanWeights, MLPWeights
from gfnode_fast.ops.topology import topology
from gfnode_fast.reference.propagator import ModeRHS
from gfnode_fast.solvers import fixed
from gfnode_fast.solvers.transfers import DeviceReport
from gfnode_fast.spectra import Graphs, graph_laplacian
from gfnode_fast.training.molecules import Molecules
from gfnode_fast.training.problem import build_model
from gfnode_fast.training.ranks import Ranks
from gfnode_fast.training.step import BatchStep
from model_inputs import constructor, inputs
from small_run import mixed_config, mixed_files, small_config, small_trajectory

TIMES = 2
CHECKED = {"checks.check_times"}  # before every solve on the host
JOINT = CHECKED | {"joint_linear._begin", "joint_linear._integrate"}
PUBLISHED = CHECKED | {
    "joint._integrate", "control.initial_step", "published.integrate_published",
    "errors.check_state",
}  # fmt: skip

TABLES = {  # constants, moved to the device once
    "tableau.row_tensor", "tableau.dense_tensor", "exact._taylor_table", "forced._interpolation",
    "joint_operator._tolerances", "propagate_joint._table", "propagate_attention._tables",
    "propagate_exact._table",
}  # fmt: skip


def new(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.empty(
        shape, dtype=dtype, device="cuda", requires_grad=grad and dtype.is_floating_point
    )


def edges(count: int) -> tuple[Tensor, Tensor]:
    return new(count, dtype=torch.int64), new(count, dtype=torch.int64)


def backward(outputs: Any) -> None:
    leaves = torch.utils._pytree.tree_leaves(outputs)
    torch.stack(
        [o.sum() for o in leaves if isinstance(o, Tensor) and o.requires_grad]
    ).sum().backward()


def batch() -> dict[str, Any]:
    given: dict[str, Any] = on_gpu(inputs(num_timesteps=TIMES))
    return given


def fourier_md(**changes: Any) -> gfnode_fast.FourierMD:
    arguments = {"device": "cuda", "num_timesteps": TIMES} | changes
    return gfnode_fast.FourierMD(**constructor(**arguments))


def gfnode(**changes: Any) -> gfnode_fast.GFNODE:
    arguments = constructor(device="cuda", num_timesteps=TIMES, **changes)
    del arguments["num_atoms"]
    return gfnode_fast.GFNODE(**arguments)


def mixed(sizes: list[int], degree: int = 2) -> dict[str, Any]:
    """A batch of `GFNODE` whose offsets are on the host."""
    atoms, entries = sum(sizes), sum(n * n for n in sizes)
    given = {name: new(atoms, width, grad=False) for name, width in (("x", 3), ("v", 3), ("h", 2))}
    return given | {
        "edge_index": edges(degree * atoms),
        "edge_fea": new(degree * atoms, 3, grad=False),
        "ptr": torch.tensor([0, *itertools.accumulate(sizes)]),
        "timeframes": new(len(sizes), TIMES, grad=False),
        "eigvecs": new(entries, grad=False),
    }  # fmt: skip


def steps(
    model: Any, given: dict[str, Any], reads: set[str], first: set[str] | None = None
) -> None:
    """Forward and backward read on the host in these places, at a first call in `first`, and wait
    nowhere else.
    """
    for expected in (reads,) if first is None else (first, reads):
        watch.clear()
        outputs = model(**given)
        assert all(output.is_cuda for output in outputs)
        backward(outputs)
        assert set(watch.reads) == expected, f"read in {dict(watch.reads)}"
        assert set(watch.waits) <= TABLES, f"waited for copies in {dict(watch.waits)}"
    assert all(p.grad is None or p.grad.is_cuda for p in model.parameters())


LEARNT = {"triton_solve.triton_solve"}  # how many attempts the first joint solve took
ON_TRITON: tuple[dict[str, Any], ...] = (
    {},
    {"gnn_ablation_mode": "sage", "time_mode": "concat", "recompute": True},
    {"solver_mode": "exact", "norm": True},
    {"solver_mode": "exact", "time_mode": "concat", "flat": True},
    {"mode_interaction": "attention", "use_vae": True},
    {"mode_interaction": "attention", "time_mode": "concat", "gnn_ablation_mode": "gcn"},
)


def case_triton_reads_and_waits_for_nothing() -> None:
    for changes in ON_TRITON:
        first = set() if changes.get("solver_mode") == "exact" else LEARNT
        steps(fourier_md(backend="triton", **changes), batch(), set(), first)
        assert not watch.atomics, f"sums without an order in {dict(watch.atomics)}"


def case_auto_on_a_family_that_has_been_verified() -> None:
    unverified, dispatch.verified_gpus = dispatch.verified_gpus, lambda: {"sm_90": "a result"}
    try:
        model = fourier_md(backend="auto")
        steps(model, batch(), set(), LEARNT)
        assert {part.backend for part in model.backend_report().parts.values()} == {"triton"}
        steps(gfnode(backend="auto"), mixed([5, 7, 5]), set(), LEARNT)
    finally:
        dispatch.verified_gpus = unverified


def case_solves_on_the_host_read_what_they_decide_by() -> None:
    exact = CHECKED | {"exact.make_plan"}
    per_molecule = {"_integrate", "check_molecules", "solve_per_molecule"}
    for changes, reads in (
        ({}, JOINT),
        ({"gnn_ablation_mode": "sage", "use_vae": True, "time_mode": "concat"}, JOINT),
        ({"gnn_ablation_mode": "gcn", "fourier_basis": "linear", "recompute": True}, JOINT),
        ({"fourier_basis": None, "no_fourier": True, "num_modes": 5}, JOINT),
        ({"mode_interaction": "attention", "time_mode": "concat", "solver": "bosh3"}, PUBLISHED),
        ({"time_mode": "rope", "solver": "bosh3"}, PUBLISHED),
        ({"solver_mode": "exact"}, exact),
        (
            {"solver_mode": "exact", "time_mode": "mlp"},
            exact | {"forced.forced_response", "forced._resolve"},
        ),
        (
            {"solver_mode": "per_molecule", "solver": "bosh3"},
            CHECKED | {f"per_molecule.{f}" for f in per_molecule},
        ),
        (
            {"solver": "rk4", "solver_mode": fixed(0.5)},
            CHECKED
            | {"errors.check_state", "fixed_step.check_uniform", "fixed_step._Uniform.__init__"},
        ),
        ({"solver": "midpoint"}, CHECKED | {"errors.check_state", "grid._Union.__init__"}),
        ({"no_ode": True}, CHECKED),
        ({"propagate_x": False, "propagate_h": False}, CHECKED),
    ):
        given = batch()
        if changes.get("fourier_basis", "graph") != "graph":
            given["U_batch"] = None
        steps(fourier_md(**changes), given, reads)


def case_accelerated() -> None:
    model = ForeignMD(**constructor(num_timesteps=TIMES)).to("cuda")
    steps(gfnode_fast.accelerate(model, backend="triton"), batch(), set(), LEARNT)


def case_molecules_of_different_size() -> None:
    given = mixed([5, 7, 5])
    for ptr in (given["ptr"], on_gpu(given["ptr"])):
        for changes, first in (({}, LEARNT), ({"solver_mode": "exact"}, set())):
            model = gfnode(backend="triton", **changes)
            steps(model, given | {"ptr": ptr}, set(), first)
            assert not watch.atomics
            sorted_edges = topology(*given["edge_index"], len(given["x"]), max_nodes=7)
            steps(model, given | {"ptr": ptr, "edge_index": sorted_edges}, set())
    steps(gfnode(backend="torch"), given, JOINT)
    by_size = {"graph_fourier_torch._by_size"}
    steps(gfnode(backend="torch"), given | {"ptr": on_gpu(given["ptr"])}, JOINT | by_size)


def case_public_operations_on_triton() -> None:
    count, atoms, channels, modes, times, parts = 4, 5, 8, 3, 4, 3
    total, entries = count * atoms, count * atoms * atoms
    ptr = torch.arange(count + 1) * atoms
    for offsets in (None, ptr, on_gpu(ptr)):
        flat = offsets is not None
        eigvecs = new(entries) if flat else new(count, atoms, atoms)
        shape = (total,) if flat else (count, atoms)
        signal = new(*shape, channels)
        found = ops.graph_fourier(signal, eigvecs, modes, ptr=offsets, backend="triton")
        backward(ops.inverse_graph_fourier(
            found.expand(times, *found.shape), eigvecs, residual=signal, activation="silu",
            centroid=new(*shape, channels // 2), beside=new(times, count, 2, grad=False),
            ptr=offsets, backend="triton",
        ))  # fmt: skip
    for interaction in ("no_interaction", "attention", "concat"):
        for time_mode in ("none", "mlp"):
            rhs = ModeRHS(channels, modes, interaction, time_mode, 6).to("cuda")
            s = None if time_mode == "none" else new()
            backward(ops.mode_rhs(rhs, s, new(modes, 6, channels), backend="triton"))
    square = new(modes, channels, channels)
    for b, t in ((count, times), (0, times), (count, 0)):
        y0, when = new(b, modes, parts, channels), new(b, t, grad=False)
        for slope in (None, new(modes, channels)):
            backward(ops.propagate_exact(y0, square, when, slope=slope, backend="triton"))
            backward(ops.propagate_joint(y0, square, when, slope=slope, backend="triton"))
        attention = new(channels, channels), new(2, channels), square, new(2, modes, channels)
        backward(ops.propagate_attention(y0, *attention, when, backend="triton"))
    assert not watch.reads, f"read in {dict(watch.reads)}"


def case_graph_layers_without_edges_or_nodes() -> None:
    def mlp(wide: int, out: int) -> MLPWeights:
        return MLPWeights(new(16, wide), new(16), new(out, 16), new(out))

    silu, width = torch.nn.SiLU(), 8
    for backend, (num_edges, nodes, copies) in itertools.product(
        ("triton", "torch"), ((30, 10, 2), (0, 10, 1), (0, 0, 1))
    ):
        rows = nodes * copies
        graph = topology(*edges(num_edges), nodes, max_nodes=5)
        given = new(rows, 3), new(rows, 3), new(rows, width), graph, new(num_edges, 5)
        egnn = EGNNWeights(
            mlp(2 * width + 6, width), mlp(width, 1), mlp(width, 1), mlp(2 * width, width)
        )
        backward(ops.egnn_layer(*given, egnn, silu, backend=backend))
        c = width + 6
        sage = MeanWeights(mlp(2 * c + 5, c), mlp(2 * c, c))
        backward(ops.sage_layer(*given, sage, silu, backend=backend))
        gcn = MeanWeights(mlp(2 * c + 5, c), mlp(c, c))
        backward(ops.gcn_layer(*given, gcn, silu, backend=backend))
    assert not watch.reads, f"read in {dict(watch.reads)}"


def case_spectra() -> None:
    graphs = Graphs(*edges(8), new(3, dtype=torch.int64))
    assert graph_laplacian(graphs).is_cuda
    backward(ops.eigh_batched(new(6, 5, 5), new(6, dtype=torch.int64)))


def case_the_largest_sizes() -> None:
    """Grids and integers at 6400 molecules of 400 atoms, whose memory nobody has."""
    given = mixed([400] * 6400, degree=20)
    for changes in ({}, {"gnn_ablation_mode": "sage", "solver_mode": "exact"}):
        model = gfnode(backend="triton", hidden_nf=64, num_modes=8, **changes)
        backward(model(**given))
    found = ops.graph_fourier(new(1, 5, 4), new(1, 5, 5), 2, backend="triton")
    ops.inverse_graph_fourier(found.expand(70_000, 1, 2, 4), new(1, 5, 5), backend="triton")


def case_kernels_are_compiled_once_for_all_batches() -> None:
    """But for strides, of which some follow the batch and all say how loads are aligned."""
    for changes in ({}, {"gnn_ablation_mode": "sage", "mode_interaction": "attention"}):
        model = gfnode(backend="triton", **changes)
        watch.launched.clear()
        for count, sizes in enumerate(([5] * 3, [3], [4] * 16, [7, 9, 4, 1], [16] * 32)):
            backward(model(**mixed(sizes, degree=1 + count)))
            kernels = {name: set(keys) for name, keys in watch.launched.items()}
            if count == 0:
                known = kernels
            assert kernels == known, f"with molecules of {sizes} atoms"


def case_memory_of_a_training_step() -> None:
    """Of the published model and molecule, 13 atoms and 60 edges: bytes a molecule, at most 0.5 MB;
    counted 434 kB and 476 kB."""
    count, atoms, degree, times = 4096, 13, 60, 8
    rows = count * atoms
    given = {name: new(rows, 3, grad=False) for name in ("x", "v", "loc_mean")} | {
        "h": new(rows, 2, grad=False),
        "edge_index": edges(count * degree),
        "edge_fea": new(count * degree, 5, grad=False),
        "timeframes": new(count, times, grad=False),
        "U_batch": new(count, atoms, atoms, grad=False),
    }
    sizes = {"num_atoms": atoms, "num_timesteps": times, "time_emb_dim": 32, "num_modes": 2}
    for layer in ("egnn", "sage"):
        published = {"n_layers": 5, "hidden_nf": 64, "in_edge_nf": 5, "gnn_ablation_mode": layer}
        model = fourier_md(**sizes, **published, backend="triton")
        watch.clear()
        outputs = model(**given)
        outputs[0].square().mean().backward()
        del outputs
        assert watch.peak < 500e3 * count, f"{layer}: {watch.peak / count} bytes a molecule"
        assert watch.peak > 200e3 * count  # of the features alone, which layers keep


def arrived(report: DeviceReport) -> list[float]:
    """What a joint solve reports, or an exact one of two molecules."""
    return [0.5, 0.5, 1, 1, 1, 1, 0.5, 0] if len(report._values) == 8 else [1, 1, 1, 0, 0]


def training_step(config: Any, windows: int) -> Callable[[int], None]:
    molecules = Molecules(config)
    device = torch.device("cuda")
    data = molecules.dataset("train", dtype=torch.float32, device=device)
    step = BatchStep(config, build_model(config, molecules.num_atoms).to(device), data, Ranks())
    index = torch.zeros(windows, dtype=torch.int64, device=data.index_device)
    return lambda number: step(index, number, 0)


RECIPE: dict[str, Any] = {
    "model": {"use_vae": True, "backend": "triton"},
    "optim": {"optimizer": "adamw", "clip_norm": 0.1, "ema_decay": 0.8},
    "log_every": 10,
}


def check_steps(config: Any, windows: int = 4) -> None:
    step = training_step(config, windows)
    step(0)
    watch.clear()
    step(1)
    assert not watch.reads, f"read in {dict(watch.reads)}"
    assert not watch.waits, f"waited for copies in {dict(watch.waits)}"
    assert not watch.atomics, f"sums without an order in {dict(watch.atomics)}"


def case_training_steps_read_and_wait_for_nothing() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "small.npz"
        small_trajectory().save(path)
        exact = RECIPE | {"model": RECIPE["model"] | {"solver_mode": "exact"}}
        in_parts = RECIPE | {"optim": RECIPE["optim"] | {"accumulate": 2}}
        for recipe in (exact, in_parts, RECIPE | {"capture": True}):
            check_steps(small_config(path, Path("unused"), **recipe))
        config = mixed_config(mixed_files(Path(folder)), Path("unused"), **RECIPE)
        check_steps(config, windows=5)


def case_captured_steps() -> None:
    """Inputs may come from the host: offsets of molecules do."""
    made: tuple[tuple[Any, dict[str, Any]], ...] = (
        (fourier_md(backend="triton"), batch()),
        (fourier_md(backend="triton", solver_mode="exact"), inputs(num_timesteps=TIMES)),
        (fourier_md(no_ode=True), batch()),
        (gfnode(backend="triton"), mixed([5, 7, 5])),
    )
    for model, given in made:
        rows = given["x"].shape[0] * TIMES
        optimizer = torch.optim.Adam(model.parameters(), capturable=True, fused=True)
        step = gfnode_fast.capture_training_step(
            model, optimizer, inputs=given, targets=(new(rows, 3, grad=False),),
            loss_fn=lambda outputs, target: (outputs[0].reshape(-1, 3) - target).square().mean(),
        )  # fmt: skip
        assert step.is_captured
        given = on_gpu(given)
        watch.clear()
        optimizer.param_groups[0]["lr"] = 3e-4
        assert step(given, new(rows, 3, grad=False)).loss.is_cuda
        assert not watch.reads
        assert not watch.waits, f"waited for copies in {dict(watch.waits)}"


def case_a_report_is_not_asked_for_in_somebody_elses_capture() -> None:
    model, given = fourier_md(backend="triton"), batch()
    model(**given)
    with fake._captured(None):
        model(**given)


def case_the_watch_sees() -> None:
    """A read, a copy that waits, a tensor on the host, a sum without an order."""
    value = new(3, grad=False)
    for look in (lambda: value.sum().item(), lambda: bool(value.any()), value.tolist, value.unique):
        watch.clear()
        look()
        assert watch.reads
    value + torch.tensor([1.0, 2.0, 3.0]).to("cuda")
    assert watch.waits
    value.index_add(0, new(3, dtype=torch.int64), value)
    assert watch.atomics
    try:
        value + torch.ones(3)
    except RuntimeError:
        return
    raise AssertionError("tensors on two devices were added")


def run_all() -> dict[str, str | None]:
    """What went wrong in each case."""
    problems: dict[str, str | None] = {}
    DeviceReport.read = arrived  # type: ignore[method-assign]
    with fake.gpu():
        for name, run in list(globals().items()):
            if name.startswith("case_"):
                watch.clear()
                problems[name] = None
                try:
                    run()
                except Exception:
                    problems[name] = traceback.format_exc()
    return problems
