"""What a contender executes in a row: building it, running it, and its values for the agreement
check.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gfnode_fast
from benchmarks import inputs, peers
from benchmarks.baselines import c1, u1
from benchmarks.registry import (
    CAPTURED,
    CAPTURED_EXACT,
    CAPTURED_SOLVE,
    FORMS,
    MORE_ATTEMPTS,
    SUMS_KEPT,
    TWO_THREADS,
    WHOLE_COMPILED,
    Row,
)
from benchmarks.task import (
    Task,
    Unavailable,
    begin,
    function_task,
    named_gradients,
    named_outputs,
    numerics,
    on_two_threads,
    require_device,
)
from gfnode_fast import reference
from gfnode_fast.data import Batch
from gfnode_fast.nn.graph_layers import apply_layer
from gfnode_fast.ops.topology import topology

OURS = {
    "ours": {},
    "ours exact": {"solver_mode": "exact"},
    "ours per molecule": {"solver_mode": "per_molecule"},
    "ours recompute": {"recompute": True},
    "ours compiled": {"backend": "compiled"},
    WHOLE_COMPILED: {},
    "ours eager loop": {},
    "ours stages": {},
    "ours triton": {"backend": "triton"},
    **{form: {"backend": "triton"} for form in FORMS},
    SUMS_KEPT: {"backend": "triton", "recompute": False},
    MORE_ATTEMPTS: {"backend": "triton"},
    "ours exact triton": {"backend": "triton", "solver_mode": "exact"},
    CAPTURED: {"backend": "triton"},
    CAPTURED_EXACT: {"backend": "triton", "solver_mode": "exact"},
    CAPTURED_SOLVE: {"backend": "triton"},
}
CONVERGED = "U0 converged"  # its steps so small that in fp64 only rounding is left
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-15


def build_model(contender: str, row: Row, device: torch.device) -> nn.Module:
    """The row's model as the contender has it, with the initial values common to all.

    Raises:
        Unavailable: this version has no such contender.
    """
    config = inputs.model_config(row)
    if contender == "U0":
        model: nn.Module = reference.FourierMD(**config)
    elif contender == CONVERGED:
        model = reference.FourierMD(**config, rtol=1e-12, atol=1e-14)
    elif contender == "U1":
        model = u1.FourierMD(**config)
    elif contender == "C1":
        model = c1.FourierMD(**config)
    else:
        model = _build_ours(contender, row, config)
    model.load_state_dict(inputs.initial_state(row))
    return model.to(device, inputs.dtype_of(row.precision))


def _build_ours(contender: str, row: Row, config: dict[str, Any]) -> nn.Module:
    wanted: dict[str, Any] = dict(OURS[contender])
    if row.precision in ("tf32", "bf16"):
        wanted["precision"] = row.precision
    known = inspect.signature(gfnode_fast.FourierMD).parameters
    for name in wanted:
        if name not in known:
            raise Unavailable(f"gfnode_fast.FourierMD has no `{name}` in this version")
    model = gfnode_fast.FourierMD(**config, **wanted)
    if model.backend == "reference":
        raise Unavailable(f"the drop-in runs the reference: {model.backend_reason}")
    if contender == WHOLE_COMPILED:
        model.compile()
    return model


def make_task(contender: str, row: Row, device: torch.device) -> Task:
    """Build the contender for a row.

    Raises:
        Unavailable: it does not exist here.
    """
    if contender == TWO_THREADS:
        return on_two_threads(make_task("ours", row, device))
    require_device(row.precision, device)
    if OURS.get(contender, {}).get("backend") == "triton" and device.type != "cuda":
        raise Unavailable(f"Triton needs a CUDA device, this is {device}")
    if row.op == "eigh":
        return peers.eigh_task(contender, row, device)
    if row.op == "spectrum":
        return peers.spectrum_task(contender, row, device)
    if row.op in ("graph_fourier", "inverse_graph_fourier"):
        return _transform_task(contender, row, device)
    batch = inputs.make_batch(row, device)
    if row.op == "solve" and contender == "torchode":
        return peers.torchode_task(row, batch, build_model("U1", row, device))
    model = build_model(contender, row, device)
    if contender in (CAPTURED, CAPTURED_EXACT):
        return _captured_task(row, model, batch)
    if row.op == "model":
        return _model_task(contender, row, model, batch)
    call, leaves = _PIECES[row.op](contender, row, model, batch)
    task = function_task(row, call, leaves, dict(model.named_parameters()))
    if contender == CAPTURED_SOLVE:
        return _replayed(task, leaves | dict(model.named_parameters()))
    return task


def _model_task(contender: str, row: Row, model: nn.Module, batch: Batch) -> Task:
    """The whole model: inference, gradient of the published loss, or that and an Adam step."""
    arguments, target, device = batch.inputs(), batch.target, batch.x.device
    leaves = dict(model.named_parameters())
    # U0 and U1 are what users run today: Adam's default. The others may have the best there is.
    fused = None if contender in ("U0", "U1") else True
    optimizer = torch.optim.Adam(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused
    )

    def forward() -> tuple[Tensor, ...]:
        begin()
        with torch.no_grad(), numerics(row.precision, device):
            return model(**arguments)[:3]

    def backward() -> tuple[Tensor, ...]:
        begin()
        optimizer.zero_grad()
        with numerics(row.precision, device):
            x, v, h, kld = model(**arguments)
            ((x - target).square().mean() + kld).backward()
        return x, v, h

    def step() -> None:
        backward()
        optimizer.step()

    def values() -> dict[str, Tensor]:
        if row.phase == "forward":
            return named_outputs(forward())
        return named_outputs(backward()) | named_gradients(leaves)

    run = {"forward": forward, "backward": backward, "step": step}[row.phase]
    return Task(run, values)


def _captured_task(row: Row, model: nn.Module, batch: Batch) -> Task:
    """The step of `_model_task` as one CUDA graph, the copies of its inputs into it included."""
    arguments, target, device = batch.inputs(), batch.target, batch.x.device
    optimizer = torch.optim.Adam(
        model.parameters(),
        lr=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        fused=True,
        capturable=device.type == "cuda",
    )

    def loss_of(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        return (outputs[0] - target).square().mean() + outputs[3]

    with numerics(row.precision, device):
        step = gfnode_fast.capture_training_step(
            model, optimizer, loss_fn=loss_of, inputs=arguments, targets=(target,)
        )

    def run() -> tuple[Tensor, ...]:
        with numerics(row.precision, device):  # on a CPU, where the step is not captured
            return step(arguments, target).outputs[:3]

    def values() -> dict[str, Tensor]:
        model.load_state_dict(inputs.initial_state(row))  # a step has changed them
        return named_outputs(run()) | named_gradients(dict(model.named_parameters()))

    return Task(run, values)


def _replayed(task: Task, leaves: dict[str, Tensor]) -> Task:
    """The task's execution as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            task.run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = task.run()

    def values() -> dict[str, Tensor]:
        graph.replay()
        return named_outputs(outputs) | named_gradients(leaves)

    return Task(graph.replay, values)


Piece = tuple[Callable[[], tuple[Tensor, ...]], dict[str, Tensor]]


def _require_own(contender: str, model: nn.Module, method: str) -> None:
    if contender in OURS and getattr(type(model), method) is getattr(reference.FourierMD, method):
        raise Unavailable(f"the drop-in's `{method}` is the reference's in this version")


def _signals(row: Row, batch: Batch, width: int, copies: int = 1) -> dict[str, Tensor]:
    """Encoded-looking state: real positions and velocities, seeded features."""
    atoms = batch.x.shape[0] * copies
    h = inputs.normal((atoms, width), batch.x)
    leaves = {"x": batch.x.repeat(copies, 1), "v": batch.v.repeat(copies, 1), "h": h}
    return {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}


def _propagation(contender: str, row: Row, model: nn.Module, batch: Batch) -> Piece:
    leaves = _signals(row, batch, model.hidden_nf)
    s = batch.timeframes / inputs.DELTA_FRAME
    shape = (row.batch, model.num_atoms)

    def call() -> tuple[Tensor, ...]:
        return model._propagate(
            leaves["x"], leaves["v"], leaves["h"], batch.loc_mean, s, batch.U_batch, shape
        )

    return call, leaves


def _encoder(contender: str, row: Row, model: nn.Module, batch: Batch) -> Piece:
    _require_own(contender, model, "_encode")
    leaves = _signals(row, batch, model.in_node_nf)

    def call() -> tuple[Tensor, ...]:
        return model._encode(
            leaves["x"], leaves["v"], leaves["h"], *batch.edge_index, batch.edge_fea
        )

    return call, leaves


def _decoder(contender: str, row: Row, model: nn.Module, batch: Batch) -> Piece:
    _require_own(contender, model, "_decode")
    leaves = _signals(row, batch, model.hidden_nf + model.time_emb_dim, inputs.NUM_TIMES)

    def call() -> tuple[Tensor, ...]:
        return model._decode(
            leaves["x"], leaves["v"], leaves["h"], *batch.edge_index, batch.edge_fea,
            inputs.NUM_TIMES,
        )  # fmt: skip

    return call, leaves


def _graph_layer(contender: str, row: Row, model: nn.Module, batch: Batch) -> Piece:
    """The first decoder layer on T copies of the batch's graph."""
    layer = model.decode_layers[0]  # C1 on the CPU has compiled it
    leaves = _signals(row, batch, model.hidden_nf + model.time_emb_dim, inputs.NUM_TIMES)
    if contender in OURS:
        size = FORMS.get(contender, model.num_atoms)
        edges = topology(*batch.edge_index, batch.x.shape[0], max_nodes=size)
        state = (leaves["x"], leaves["v"], leaves["h"])
        choice = {"backend": model.backend, "precision": model.precision, "recompute": False}
        return lambda: apply_layer(layer, state, edges, batch.edge_fea, **choice), leaves
    if contender == "C1" and torch.cuda.is_available():
        layer = c1.compile_function(layer)
    offset = torch.arange(inputs.NUM_TIMES, device=batch.x.device)[:, None] * batch.x.shape[0]
    ends = [(offset + end).reshape(-1) for end in batch.edge_index]
    edge_fea = batch.edge_fea.repeat(inputs.NUM_TIMES, 1)

    def call() -> tuple[Tensor, ...]:
        return layer(leaves["x"], leaves["v"], leaves["h"], *ends, edge_fea)

    return call, leaves


def _solve(contender: str, row: Row, model: nn.Module, batch: Batch) -> Piece:
    """The features' ODE alone, (M, B, 1, K) → (T, B, M, 1, K)."""
    ode = model.freq_conv.t_conv
    y0 = peers.initial_modes(row, batch, model.hidden_nf)
    s = batch.timeframes / inputs.DELTA_FRAME
    solves = {
        "ours": peers.solve_ours,
        "ours compiled": peers.solve_compiled,
        "ours eager loop": peers.solve_eager_loop,
        "ours stages": peers.solve_stages,
        "ours triton": peers.solve_triton,
        MORE_ATTEMPTS: functools.partial(peers.solve_triton, max_attempts=64),
        CAPTURED_SOLVE: peers.solve_triton,
    }
    if solve := solves.get(contender):
        return (lambda: (solve(ode, y0, s),)), {"y0": y0}
    if contender in OURS:
        raise Unavailable("measured in the propagation rows")
    return (lambda: (ode(y0, s),)), {"y0": y0}


_PIECES: dict[str, Callable[[str, Row, nn.Module, Batch], Piece]] = {
    "propagation": _propagation,
    "encoder": _encoder,
    "decoder": _decoder,
    "graph_layer": _graph_layer,
    "solve": _solve,
}


def _transform_task(contender: str, row: Row, device: torch.device) -> Task:
    """Projection of K feature channels onto M modes, or its inverse at T times."""
    batch = inputs.make_batch(row, device)
    width = inputs.model_config(row)["hidden_nf"]
    eigvecs, num_modes = batch.U_batch.contiguous(), row.num_modes
    inverse = row.op == "inverse_graph_fourier"
    shape = (
        (inputs.NUM_TIMES, row.batch, num_modes, width)
        if inverse
        else (row.batch, eigvecs.shape[1], width)
    )
    signal = inputs.normal(shape, eigvecs).requires_grad_()
    function = _transforms(contender, inverse, eigvecs, num_modes)
    with torch.no_grad():
        written = function(signal).nbytes
    kept = eigvecs.nbytes * num_modes // eigvecs.shape[1]
    forward_bytes = signal.nbytes + kept + written
    both = forward_bytes if row.phase == "forward" else 2 * forward_bytes
    return function_task(row, lambda: (function(signal),), {"signal": signal}, min_bytes=both)


def _transforms(
    contender: str, inverse: bool, eigvecs: Tensor, num_modes: int
) -> Callable[[Tensor], Tensor]:
    kept = eigvecs[:, :, :num_modes]
    if contender == "U1" and not inverse:  # as published: all modes, then the first M
        return lambda x: torch.einsum("bnm,bnc->bmc", eigvecs, x)[:, :num_modes]
    if contender == "U1":
        return lambda y: torch.einsum("bnm,tbmc->tbnc", kept, y)
    if contender == "sliced" and not inverse:
        return lambda x: kept.transpose(1, 2) @ x
    if contender == "sliced":
        return lambda y: kept @ y
    try:
        from gfnode_fast.ops.graph_fourier import graph_fourier, inverse_graph_fourier
    except ImportError as error:
        raise Unavailable(f"gfnode_fast.ops has no graph_fourier: {error}") from error
    backend = "triton" if contender == "ours triton" else "auto"
    if inverse:
        return lambda y: inverse_graph_fourier(y, eigvecs, backend=backend)
    return lambda x: graph_fourier(x, eigvecs, num_modes, backend=backend)
