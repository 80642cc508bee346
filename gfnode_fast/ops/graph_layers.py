"""Graph layers on T copies of one batch of graphs: EGNN, GraphSAGE, GCN.

Each takes the state of all copies, copy-major (node i of copy t in row t*n + i), and the edges of
one copy. Oracles: `gfnode_fast.reference.layers`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gfnode_fast._once import refuse_tangents
from gfnode_fast.ops import graph_layers_triton as on_triton
from gfnode_fast.ops.dispatch import in_transform, require_triton
from gfnode_fast.ops.graph_layers_cpp import ACTIVATIONS, CompiledKernels, why_not_compiled
from gfnode_fast.ops.graph_layers_torch import (
    EGNNWeights,
    LayerKernels,
    MeanWeights,
    MLPWeights,
    State,
    TorchKernels,
    split_egnn,
    split_mean,
)
from gfnode_fast.ops.topology import Topology
from gfnode_fast.reference.layers import COORDINATE_WIDTH

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cpp", "triton")
PRECISIONS = ("fp32", "tf32", "bf16")
RECOMPUTED_EDGES = 8192  # at once: bounds the memory of backward; smaller ones cost more calls


def egnn_layer(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edges: Topology,
    edge_fea: Tensor,
    weights: EGNNWeights,
    activation: nn.Module,
    *,
    norm: bool = False,
    recompute: bool = False,
    backend: str = "auto",
    precision: str = "fp32",
) -> State:
    """One EGNN layer with velocities (arXiv 2102.09844, as the published GF-NODE uses it).

        r_ij = x_i - x_j;  q = |r|²  (q / max(|q|, 1e-12) with `norm`)
        m_ij = message([q, h_i, h_j, e_ij]), activated at the end
        x_i' = x_i + velocity(h_i) v_i + clamp(mean_j r_ij coordinate(m_ij), ±100)
        h_i' = node([h_i, Σ_j m_ij]);  v' = v

    Args:
        x: (T*n, 3) positions.
        v: (T*n, 3) velocities.
        h: (T*n, K) features.
        edges: of one copy, n nodes; messages run from `col` and are summed onto `row`.
        edge_fea: (E, D) edge features of one copy, in the caller's order of edges.
        weights: message 2K+1+D → hidden → K, coordinate and velocity K → hidden → 1, node
            2K → hidden → K.
        activation: applied element by element in every MLP (`flat` is Tanh and wider weights).
        norm: normalise squared distances.
        recompute: keep only the layer's inputs for backward, where one copy at a time is computed
            again, instead of keeping the edge intermediates of all. "triton" never keeps these, and
            sums over neighbours unless `recompute`, which changes no bit of it.
        backend: "cpp" is compiled kernels, "torch" plain PyTorch; "auto" takes "cpp" where
            it serves: float32 on the CPU, SiLU or Tanh, no autocast, extension built. "triton" is
            for a GPU (SiLU or Tanh, no autocast, one hidden width) and not yet run on hardware.
        precision: of the matrix products, with backend="triton" alone: "fp32" (three tf32 products
            for one, float64 in float64), "tf32" and "bf16" (operands rounded to nearest, sums,
            distances and coordinates in float32, SiLU with tanh.approx).

    Returns:
        x' (T*n, 3), v, h' (T*n, K).

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not match, or that the backend
            asked for does not serve.
        RuntimeError: backend="cpp" without the extension, or "triton" without Triton or a GPU; a
            second derivative through either.

    Notes:
        Deterministic on the CPU, whatever the number of threads: sums over neighbours run in the
        topology's order; with "triton" deterministic on one model of GPU. Differentiable any number
        of times with backend="torch", once with "cpp" and "triton".
    """
    _check_state("egnn_layer", x, v, h, edges, edge_fea)
    width, edge_width = h.shape[-1], edge_fea.shape[1]
    for name, mlp, ends in (
        ("message", weights.message, (2 * width + 1 + edge_width, width)),
        ("coordinate", weights.coordinate, (width, 1)),
        ("velocity", weights.velocity, (width, 1)),
        ("node", weights.node, (2 * width, width)),
    ):
        _check_mlp("egnn_layer", name, mlp, ends, h)

    kernels = _kernels("egnn_layer", backend, precision, h, activation)
    if not isinstance(kernels, TorchKernels):
        refuse_tangents("egnn_layer", x, v, h, edge_fea, *(p for mlp in weights for p in mlp))

    if kernels is None:
        _check_same_hidden(weights)
        return on_triton.egnn(
            (x, v, h), edge_fea, edges, weights, activation, norm, precision, recompute
        )

    def layer(state: State, sorted_fea: Tensor) -> State:
        return split_egnn(state, sorted_fea, edges, weights, activation, norm, kernels)

    return _run(layer, (x, v, h), edge_fea, edges, recompute, activation)


def sage_layer(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edges: Topology,
    edge_fea: Tensor,
    weights: MeanWeights,
    activation: nn.Module,
    *,
    recompute: bool = False,
    backend: str = "auto",
    precision: str = "fp32",
) -> State:
    """One GraphSAGE layer on c = [x, v, h], width C = K + 6.

        c_i' = c_i + node([c_i, mean_j edge([c_i, c_j, e_ij])])

    Args:
        x, v, h, edges, edge_fea, activation, recompute, backend, precision: as in `egnn_layer`.
        weights: edge 2C+D → hidden → C, node 2C → hidden → C.

    Returns, raises, notes: as in `egnn_layer`; v changes too.
    """
    return _mean_layer(
        "sage_layer",
        (x, v, h),
        edges,
        edge_fea,
        weights,
        activation,
        recompute,
        backend,
        precision,
        node_inputs=2,
    )


def gcn_layer(
    x: Tensor,
    v: Tensor,
    h: Tensor,
    edges: Topology,
    edge_fea: Tensor,
    weights: MeanWeights,
    activation: nn.Module,
    *,
    recompute: bool = False,
    backend: str = "auto",
    precision: str = "fp32",
) -> State:
    """One GCN layer on c = [x, v, h], width C = K + 6.

        c_i' = c_i + node(mean_j edge([c_i, c_j, e_ij]))

    Args:
        x, v, h, edges, edge_fea, activation, recompute, backend, precision: as in `egnn_layer`.
        weights: edge 2C+D → hidden → C, node C → hidden → C.

    Returns, raises, notes: as in `egnn_layer`; v changes too.
    """
    return _mean_layer(
        "gcn_layer",
        (x, v, h),
        edges,
        edge_fea,
        weights,
        activation,
        recompute,
        backend,
        precision,
        node_inputs=1,
    )


def _mean_layer(
    op: str,
    state: State,
    edges: Topology,
    edge_fea: Tensor,
    weights: MeanWeights,
    activation: nn.Module,
    recompute: bool,
    backend: str,
    precision: str,
    node_inputs: int,
) -> State:
    _check_state(op, *state, edges, edge_fea)
    width, edge_width = state[2].shape[-1] + COORDINATE_WIDTH, edge_fea.shape[1]
    _check_mlp(op, "edge", weights.edge, (2 * width + edge_width, width), state[2])
    _check_mlp(op, "node", weights.node, (node_inputs * width, width), state[2])

    kernels = _kernels(op, backend, precision, state[2], activation)
    if not isinstance(kernels, TorchKernels):
        refuse_tangents(op, *state, edge_fea, *weights.edge, *weights.node)

    if kernels is None:
        concat = node_inputs == 2
        return on_triton.mean(
            state, edge_fea, edges, weights, activation, concat, precision, recompute
        )

    def layer(state: State, sorted_fea: Tensor) -> State:
        return split_mean(state, sorted_fea, edges, weights, activation, node_inputs == 2, kernels)

    return _run(layer, state, edge_fea, edges, recompute, activation)


def _kernels(
    op: str, backend: str, precision: str, h: Tensor, activation: nn.Module
) -> LayerKernels | None:
    """None: Triton, whose layers are operators of their own."""
    if backend not in BACKENDS:
        raise ValueError(
            f"{op}: `backend` must be one of {', '.join(BACKENDS)}, got {backend!r}; choose one of "
            "these"
        )
    if precision not in PRECISIONS:
        raise ValueError(
            f"{op}: `precision` must be one of {', '.join(PRECISIONS)}, got {precision!r}; choose "
            "one of these"
        )
    if backend == "triton":
        _check_triton(op, precision, h, activation)
        return None
    if precision != "fp32":
        raise ValueError(
            f"{op}: `precision` must be 'fp32' with backend={backend!r}, got {precision!r}; "
            "reduced precision is served by backend='triton' alone"
        )
    if backend == "torch":
        return TorchKernels()
    refusal = _refusal(h, activation)
    if refusal is None:
        return CompiledKernels()
    error, problem = refusal
    if backend == "auto":
        if error is RuntimeError and not torch.compiler.is_compiling():
            _say_once(problem)
        return TorchKernels()
    raise error(f"{op}: `backend` must be 'torch' or 'auto' here, got 'cpp'; {problem}")


def _check_triton(op: str, precision: str, h: Tensor, activation: nn.Module) -> None:
    require_triton(op, h)
    if h.dtype != torch.float32 and not (h.dtype == torch.float64 and precision == "fp32"):
        raise TypeError(
            f"{op}: `h` must be torch.float32 with backend='triton', or torch.float64 with "
            f"precision='fp32', got {h.dtype} with {precision!r}; convert the tensors"
        )
    if torch.is_autocast_enabled(h.device.type):
        raise TypeError(
            f"{op}: `backend` must be 'torch' or 'auto' under autocast, got 'triton'; leave "
            "autocast and pass precision="
        )
    if type(activation) not in on_triton.ACTIVATIONS:
        raise TypeError(
            f"{op}: `activation` must be nn.SiLU or nn.Tanh with backend='triton', got "
            f"{type(activation).__name__}; use backend='torch'"
        )


def _check_same_hidden(weights: EGNNWeights) -> None:
    widths = [mlp.weight0.shape[0] for mlp in weights]
    if len(set(widths)) > 1:
        raise ValueError(
            "egnn_layer: `weights` must have one hidden width in all MLPs with backend='triton', "
            f"got {widths}; use backend='torch'"
        )


@lru_cache(maxsize=8)
def _say_once(problem: str) -> None:
    logger.info("graph layers: backend torch: %s", problem)


def _refusal(h: Tensor, activation: nn.Module) -> tuple[type[Exception], str] | None:
    """Why the compiled kernels do not serve, and as what error that is raised."""
    if h.device.type != "cpu":
        return ValueError, f"the tensors are on {h.device}; move them to the CPU"
    if h.dtype != torch.float32:
        return TypeError, f"the tensors are {h.dtype}; convert them to torch.float32"
    if torch.is_autocast_enabled("cpu"):
        return TypeError, "autocast is on; leave it"
    if type(activation) not in ACTIVATIONS:
        return TypeError, f"the activation is {type(activation).__name__}; use nn.SiLU or nn.Tanh"
    if in_transform():
        return RuntimeError, "torch.func transforms the tensors; use torch.autograd.grad"
    if problem := why_not_compiled():
        return RuntimeError, problem
    return None


def _run(
    layer: Callable[[State, Tensor], State],
    state: State,
    edge_fea: Tensor,
    edges: Topology,
    recompute: bool,
    activation: nn.Module,
) -> State:
    """`layer` on (T, n, ...) state; with `recompute`, a few copies at a time under a checkpoint."""
    sorted_fea = edge_fea.index_select(0, edges.order)
    copies = state[0].shape[0] // max(edges.num_nodes, 1)
    x, v, h = (part.reshape(copies, edges.num_nodes, part.shape[1]) for part in state)
    if recompute and copies and torch.is_grad_enabled():
        size = max(1, RECOMPUTED_EDGES // max(edges.num_edges, 1))
        chunks = zip(x.split(size), v.split(size), h.split(size), strict=True)
        # The generator's state cannot be read in a captured CUDA graph; these draw nothing.
        again = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=type(activation) not in ACTIVATIONS
        )
        parts = [again(layer, chunk, sorted_fea) for chunk in chunks]
        x, v, h = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        x, v, h = layer((x, v, h), sorted_fea)
    return x.flatten(0, 1), v.flatten(0, 1), h.flatten(0, 1)


def _check_state(
    op: str, x: Tensor, v: Tensor, h: Tensor, edges: Topology, edge_fea: Tensor
) -> None:
    if h.dim() != 2 or (h.shape[0] % edges.num_nodes if edges.num_nodes else h.shape[0]):
        raise ValueError(
            f"{op}: `h` must be (T*{edges.num_nodes}, K) for a topology of {edges.num_nodes} "
            f"nodes, got {tuple(h.shape)}; pass whole copies of the graph"
        )
    for name, value in (("x", x), ("v", v)):
        _check_tensor(op, name, value, (h.shape[0], 3), h)
    if edge_fea.dim() != 2:
        raise ValueError(
            f"{op}: `edge_fea` must be (E, D), got {tuple(edge_fea.shape)}; pass one row per edge"
        )
    _check_tensor(op, "edge_fea", edge_fea, (edges.num_edges, edge_fea.shape[1]), h)
    if edges.row.device != h.device:
        raise ValueError(
            f"{op}: `edges` must be on {h.device} like h, got {edges.row.device}; build the "
            "topology from edges on that device"
        )


def _check_mlp(op: str, name: str, mlp: MLPWeights, ends: tuple[int, int], like: Tensor) -> None:
    if mlp.weight0.dim() != 2:
        raise ValueError(
            f"{op}: `{name}.weight0` must be (hidden, {ends[0]}), got "
            f"{tuple(mlp.weight0.shape)}; pass nn.Linear's weight"
        )
    hidden = mlp.weight0.shape[0]
    shapes = ((hidden, ends[0]), (hidden,), (ends[1], hidden), (ends[1],))
    for field, value, shape in zip(mlp._fields, mlp, shapes, strict=True):
        _check_tensor(op, f"{name}.{field}", value, shape, like)


def _check_tensor(op: str, name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{op}: `{name}` must be {shape} for h {tuple(like.shape)}, got "
            f"{tuple(value.shape)}; reshape it"
        )
    if value.dtype != like.dtype:
        raise TypeError(
            f"{op}: `{name}` must be {like.dtype} like h, got {value.dtype}; convert one of them"
        )
    if value.device != like.device:
        raise ValueError(
            f"{op}: `{name}` must be on {like.device} like h, got {value.device}; move it"
        )
