"""FourierMD, the drop-in: the reference's constructor, parameters and numbers, with a choice of
backend.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from gfnode_fast import reference
from gfnode_fast.nn.backends import (
    COORDINATES,
    DECODER,
    ENCODER,
    FEATURES,
    BackendReport,
    Part,
    Request,
    check_request,
    choose_parts,
    requested_backend,
)
from gfnode_fast.nn.graph_layers import apply_layer, layers_kept
from gfnode_fast.nn.unchanged import Unchanged
from gfnode_fast.ops.edge_differences import edge_differences
from gfnode_fast.ops.graph_layers_torch import State
from gfnode_fast.ops.joint_status import check_max_attempts
from gfnode_fast.ops.propagate import check_mode_of, propagate
from gfnode_fast.ops.propagate_registered import propagate_opaque
from gfnode_fast.ops.topology import Topology, topology
from gfnode_fast.reference.checks import describe, refuse
from gfnode_fast.reference.model import side_by_side
from gfnode_fast.solvers.mode import SolverMode
from gfnode_fast.solvers.stats import SolveStats

logger = logging.getLogger(__name__)

PUBLISHED_SIGNATURE = inspect.signature(reference.FourierMD)


class FourierMD(reference.FourierMD):
    """Drop-in for the published `FourierMD`: the same arguments, state_dict, outputs and gradients.

    Args:
        backend: who computes. Keyword only, like every argument beyond the published ones, which
            are documented at `gfnode_fast.reference.FourierMD` and may be given by position.

            "auto", the default (and None): per part what measured best on the device, unless the
            environment variable GFNODE_BACKEND names one of the others.
            "torch": PyTorch alone, linear in the batch.
            "cpp": graph layers by the C++ kernels (CPU, float32, SiLU or Tanh), and solves where
            there is one for them, the others by PyTorch.
            "triton": layers, transforms and solves by Triton kernels, on a GPU.
            "compiled": as "auto", but solves in graphs of torch.compile, made at the first use
            (which can take minutes; see `solvers.compiled`).
            "reference": the published algorithm with its costs.

            A request that cannot be served raises, here or, where it depends on the tensors'
            device and dtype, at the first use. It never falls back.
        precision: of the graph layers' matrix products: "fp32"; "tf32" and "bf16" need the Triton
            kernels, hence a GPU.
        recompute: True keeps only node states of the graph layers for backward and computes their
            edge quantities again there: slower, with less memory. False keeps these. None, the
            default, keeps them in as many layers as fit into 768 MiB for the encoder and as much
            for the decoder, the last ones, and computes the others again; sizes alone decide. The
            choice changes rounding alone, and no bit of what C++ layers put out. Triton layers
            never keep them: there it is the sums over neighbours, None keeps 32 MiB of these, and
            no bit changes. In graphs of torch.compile, and in PyTorch on a GPU, None is False. No
            effect with backend="reference".
        solver_mode: how steps are chosen (`gfnode_fast.solvers`). "joint", the published solver's
            steps for the whole batch; "per_molecule", adaptive steps of each molecule's own, so
            that an answer does not depend on batch mates; "exact", no solver at all, where modes do
            not interact; `fixed(step_size)`, uniform steps with a fixed-step `solver`.
        max_attempts: of a joint solve by Triton, which launches a number of step attempts that the
            host decides before: those after the end of the solve cost a launch each, and a solve
            that needs more fails. None, the default, launches twice what the longest solve so far
            took, at least 16, so that a model may become stiffer as it trains: the first solve is
            waited for and solved again with more if need be, the failure of a later one says what
            is launched from then on. Graphs of torch.compile launch 16 then, a captured step what
            is known when it is captured. Values do not depend on it. No effect on other solves.

    Attributes:
        backend, backend_reason: what was asked for, GFNODE_BACKEND included, and how;
            `backend_report` says what runs.
        last_solve: evaluations and steps of the last forward pass, per propagator; zeros with
            backend="reference", and not touched by graphs of torch.compile.

    Notes:
        With time_mode posenc or rope the encoder is the reference's, bit for bit: the published
        steps follow its rounding. Under torch.autocast the graph layers are the reference's, whose
        linears autocast casts, unless `precision` says another one; transforms and the solve keep
        the model's precision.

        Hooks on the model, its embedding and the VAE's linears run. Layers and propagators are
        called as modules with backend="reference" alone: elsewhere what would not run is refused
        by name in `forward`: a hook on one of theirs, such as pruning leaves behind, a forward put
        on one, a class with another forward in its place, an activation that is not the model's,
        a module appended to an MLP. Graphs of torch.compile look when they are traced.

        Gradients are those of `backward` and torch.autograd.grad. As in the published model,
        torch.func.grad, vjp, jvp and vmap and forward-mode AD are not supported and raise;
        is_grads_batched works with backend="reference" alone, as do second derivatives: elsewhere
        they raise.

        With Triton solves on a GPU nothing waits for the device: a solve that fails, or times that
        are not positive, give NaN and raise at a later step or when `last_solve` is read.

        torch.compile(model) gives one graph: in it the propagation is one operator, whose backward
        solves again, and the times are checked where they are used. From the second sizes on it
        serves any number of molecules and of times (`num_timesteps` is not looked at); one molecule
        and one time have graphs of their own. With backend="compiled" it is split around each
        solve.

    Raises:
        TypeError, ValueError: an argument with which the published model crashes, or that
            conflicts with the others; the message names it.
        RuntimeError: a backend that is not there; in `forward`, a hook or a forward put on a module
            that would not run. There also TypeError, ValueError: one replaced or appended that
            would not.
    """

    def __init__(
        self,
        *args: Any,
        backend: str | None = "auto",
        precision: str = "fp32",
        solver_mode: SolverMode = "joint",
        recompute: bool | None = None,
        max_attempts: int | None = None,
        **kwargs: Any,
    ) -> None:
        request = requested_backend(backend)
        super().__init__(*args, **kwargs)
        if type(recompute) not in (bool, type(None)):
            expected, remedy = "a bool or None", "pass True, False or None"
            refuse(TypeError, "recompute", expected, describe(recompute), remedy)
        self.recompute = recompute
        for layer in (*self.encode_layers, *self.decode_layers):
            if isinstance(layer, reference.EGNNLayer):
                layer.difference = edge_differences  # the same, and safe in torch.compile
        self.backend, self.backend_reason = request.backend, request.reason
        self.precision = precision
        check_mode_of("GF-NODE", solver_mode, self.freq_conv.t_conv, self.backend)
        self.solver_mode = solver_mode
        if max_attempts is not None:
            check_max_attempts("GF-NODE", max_attempts)
        self.max_attempts = max_attempts
        check_request(self._request())
        self.last_solve = {"freq_conv": SolveStats(), "freq_conv_x": SolveStats()}
        self._chosen: dict[tuple[object, ...], dict[str, Part]] = {}
        self._unchanged = Unchanged()
        if self.embedding.weight.device.type != "meta":
            self._parts()

    def backend_report(self) -> BackendReport:
        """What runs in each part on the parameters' device, and why.

        Notes:
            This is what `forward` consults; a request that the device cannot serve is reported as
            asked, and raises in `forward`.
        """
        weight = self.embedding.weight
        return BackendReport(
            requested=Part(self.backend, self.backend_reason),
            precision=self.precision,
            device=str(weight.device),
            dtype=str(weight.dtype),
            recompute=self.recompute,
            parts=dict(self._parts()),
        )

    @property
    def layer_activation(self) -> nn.Module:
        """What every MLP of the graph layers applies."""
        return nn.Tanh() if self.flat else self.activation

    def _request(self) -> Request:
        return Request(
            backend=Part(self.backend, self.backend_reason),
            precision=self.precision,
            solver_mode=self.solver_mode,
            layer_activation=self.layer_activation,
            signal_activation=self.activation,
            basis=self.fourier_basis,
            solves={
                FEATURES: self.freq_conv.t_conv if self.propagate_h else None,
                COORDINATES: self.freq_conv_x.t_conv if self.propagate_x else None,
            },
        )

    def _parts(self) -> dict[str, Part]:
        """The choice for the parameters' device and dtype and for what was asked, which may be set
        later; checked and made once for each, and logged.
        """
        weight = self.embedding.weight
        autocast = _is_autocast(weight.device)
        asked = (self.backend, self.precision, self.solver_mode, self.propagate_x, self.propagate_h)
        key = (weight.device, weight.dtype, autocast, *asked)
        parts = self._chosen.get(key)
        if parts is None:
            if not torch.compiler.is_compiling():
                check_mode_of("GF-NODE", self.solver_mode, self.freq_conv.t_conv, self.backend)
                check_request(self._request())
            parts = choose_parts(self._request(), weight.device, weight.dtype, autocast)
            self._chosen[key] = parts
            if self.backend == "auto" and not torch.compiler.is_compiling():
                logger.info("FourierMD: %s", self.backend_report())
        return parts

    def _edges(  # type: ignore[override]  # given to the methods below alone
        self, row: Tensor, col: Tensor, num_nodes: int
    ) -> tuple[Topology | None]:
        parts = self._parts()
        if parts[ENCODER].backend == parts[DECODER].backend == "reference":
            return (None,)
        return (topology(row, col, num_nodes, max_nodes=self.num_atoms),)

    def _encode(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        edge_fea: Tensor,
        edges: Topology | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        backend = self._layer_backend(ENCODER, x.device)
        if backend == "reference":
            return super()._encode(x, v, h, row, col, edge_fea)
        with torch.autocast(x.device.type, enabled=False):
            state = (x, v, self.embedding(h.to(self.embedding.weight.dtype)))
        if edges is None:
            edges = topology(row, col, len(x), max_nodes=self.num_atoms)
        return self._run_layers(self.encode_layers, backend, state, edges, edge_fea, 1)

    def _decode(
        self,
        x: Tensor,
        v: Tensor,
        h: Tensor,
        row: Tensor,
        col: Tensor,
        edge_fea: Tensor,
        num_copies: int,
        edges: Topology | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        backend = self._layer_backend(DECODER, x.device)
        if backend == "reference":
            return super()._decode(x, v, h, row, col, edge_fea, num_copies)
        if edges is None:
            edges = topology(row, col, len(x) // num_copies, max_nodes=self.num_atoms)
        state = (x, v, h)
        return self._run_layers(self.decode_layers, backend, state, edges, edge_fea, num_copies)

    def _layer_backend(self, part: str, device: torch.device) -> str:
        backend = self._parts()[part].backend
        own_precision = backend == "triton" and self.precision != "fp32"
        if backend in ("cpp", "triton") and not own_precision and _is_autocast(device):
            refuse(
                TypeError,
                "backend",
                "'auto', 'torch' or 'reference' under torch.autocast",
                repr(backend),
                "leave autocast, or choose precision='bf16' with backend='triton'",
            )
        return backend

    def _run_layers(
        self,
        layers: nn.ModuleList,
        backend: str,
        state: State,
        edges: Topology,
        edge_fea: Tensor,
        num_copies: int,
    ) -> State:
        self._refuse_changes("encode_layers" if layers is self.encode_layers else "decode_layers")
        dtype = self.embedding.weight.dtype
        x, v, h, edge_fea = (tensor.to(dtype) for tensor in (*state, edge_fea))
        state = (x, v, h)
        sizes = x.shape[0], num_copies * edges.num_edges
        first_kept = self._first_kept(layers, *sizes, backend)
        with torch.autocast(x.device.type, enabled=False):
            for index, layer in enumerate(layers):
                state = apply_layer(
                    layer,
                    state,
                    edges,
                    edge_fea,
                    recompute=index < first_kept,
                    backend=backend,
                    precision=self.precision,
                )
        return state

    def _refuse_changes(self, *parts: str) -> None:
        of_layers = self.layer_activation
        for part in parts:
            activation = of_layers if part.endswith("layers") else self.activation
            remedy = "use backend='reference', which calls every module"
            name = type(self).__name__
            self._unchanged.refuse_changes(name, self, part, activation, remedy)

    def _first_kept(
        self, layers: nn.ModuleList, num_rows: int, num_edges: int, backend: str
    ) -> int:
        """The first of the layers whose edge intermediates are kept for backward."""
        if self.recompute is None:
            weight = self.embedding.weight
            chosen = weight.is_cpu or backend == "triton"
            # A graph would be guarded by the number of edges.
            if torch.compiler.is_compiling() or not chosen or not len(layers):
                return 0
            return len(layers) - layers_kept(layers, num_rows, num_edges, weight.dtype, backend)
        return len(layers) if self.recompute else 0

    def _expected_times(self) -> int | None:
        # A graph that reads the number serves no other one.
        return None if torch.compiler.is_compiling() else self.num_timesteps

    def _reads_times(self) -> bool:
        parts = self._parts()
        on_triton = "triton" in (parts[FEATURES].backend, parts[COORDINATES].backend)
        return not (on_triton and self.embedding.weight.is_cuda)  # its solves look on the device

    @property
    def _transforms(self) -> str:
        """What `propagate` is asked for; "auto" takes the C++ inverse."""
        return self.backend if self.backend in ("torch", "triton") else "auto"

    def _propagated(
        self,
        propagator: reference.Propagator,
        signal: Tensor,
        s: Tensor,
        eigvecs: Tensor | None,
        beside: Tensor | None = None,
    ) -> Tensor:
        is_features = propagator is self.freq_conv
        backend = self._parts()[FEATURES if is_features else COORDINATES].backend
        part = "freq_conv" if is_features else "freq_conv_x"
        stats = self.last_solve[part]
        if not torch.compiler.is_compiling():  # a number that changes would be a new graph
            stats.reset()
        is_opaque = torch.compiler.is_compiling() and backend in ("torch", "cpp", "reference")
        if backend == "reference" and not is_opaque:
            return super()._propagated(propagator, signal, s, eigvecs, beside)
        self._refuse_changes(part, "activation")
        with torch.autocast(signal.device.type, enabled=False):
            signal = signal.to(self.embedding.weight.dtype)
            if is_opaque:
                out = propagate_opaque(
                    propagator,
                    signal,
                    s,
                    eigvecs,
                    solver_mode=self.solver_mode,
                    backend=backend,
                    transforms=self._transforms,
                )
                residual: Tensor = signal + self.activation(out)
                return side_by_side(residual, beside)
            return propagate(
                propagator,
                signal,
                s,
                eigvecs,
                stats,
                backend=backend,
                transforms=self._transforms,
                solver_mode=self.solver_mode,
                max_attempts=self.max_attempts,
                activation=self.activation,
                beside=None if beside is None else beside.to(signal.dtype),
            )


def _is_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _signature_with_extras() -> inspect.Signature:
    extras = [
        parameter
        for parameter in inspect.signature(FourierMD.__init__).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return PUBLISHED_SIGNATURE.replace(
        parameters=[*PUBLISHED_SIGNATURE.parameters.values(), *extras]
    )


FourierMD.__signature__ = _signature_with_extras()  # type: ignore[attr-defined]
