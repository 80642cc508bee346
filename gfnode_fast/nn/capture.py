"""A whole training step, replayed as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from gfnode_fast.nn.accelerate import AcceleratedForward
from gfnode_fast.nn.backends import COORDINATES, FEATURES
from gfnode_fast.nn.fourier_md import FourierMD
from gfnode_fast.nn.static_optimizer import Snapshot, StaticOptimizer

Value = Tensor | tuple[Tensor, ...] | None
LossFunction = Callable[..., Tensor]
Update = Callable[[Tensor], None]

OP = "capture_training_step"


class StepResult(NamedTuple):
    """What a training step gives: the loss before the update, and the model's outputs, detached."""

    loss: Tensor
    outputs: tuple[Tensor, ...]


class TrainingStep:
    """`step(inputs, *targets)`: forward, backward and update; made by `capture_training_step`.

    Attributes:
        is_captured: whether it replays a CUDA graph; False on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFunction,
        inputs: Mapping[str, Value],
        targets: tuple[Tensor, ...],
        update: Update | None,
        warmup: int,
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._update = update
        self._graph: torch.cuda.CUDAGraph | None = None
        self._device = device = next(model.parameters()).device
        self._inputs = {name: _copy(name, value, device) for name, value in inputs.items()}
        self._targets = tuple(target.detach().to(device, copy=True) for target in targets)
        if self._device.type == "cuda":
            with torch.cuda.device(self._device):
                self._capture(warmup)

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self, inputs: Mapping[str, Value], *targets: Tensor) -> StepResult:
        """Make one step.

        Args:
            inputs: the model's keyword arguments, of the shapes and dtypes of the example.
            targets: what the loss function takes besides the outputs, likewise.

        Returns:
            Loss (0-dim) and outputs, copies that later steps leave alone.

        Raises:
            ValueError, TypeError: inputs that differ from the example in name, shape or dtype.
            RuntimeError: parameters, or options of the optimizer other than the learning rate,
                were changed in a way that the graph cannot follow.

        Notes:
            Gradients are those of this step (none are accumulated), in `.grad` afterwards.
        """
        _check_like(inputs, targets, self._inputs, self._targets)
        if self._graph is None:
            result = self._step(inputs, targets)
        else:
            self._static.gather()
            for name, value in inputs.items():
                _write(self._inputs[name], value)
            _write(self._targets, targets)
            with torch.cuda.device(self._device):
                self._graph.replay()
            for parameter, grad in zip(self._static.parameters, self._grads, strict=True):
                parameter.grad = grad
            result = self._result
        return StepResult(result.loss.clone(), tuple(output.clone() for output in result.outputs))

    def _step(self, inputs: Mapping[str, Value], targets: tuple[Tensor, ...]) -> StepResult:
        self._optimizer.zero_grad(set_to_none=True)
        outputs = self._model(**inputs)
        loss = self._loss_fn(outputs, *targets)
        loss.backward()
        if self._update is None:
            self._optimizer.step()
        else:
            self._update(loss.detach())
        return StepResult(loss.detach(), tuple(output.detach() for output in outputs))

    def _capture(self, warmup: int) -> None:
        device = self._device
        random_state = torch.cuda.get_rng_state(device)
        before = Snapshot(self._optimizer)
        self._static = StaticOptimizer(self._optimizer)
        side = torch.cuda.Stream(device)
        current = torch.cuda.current_stream(device)
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for _ in range(warmup):
                    self._step(self._inputs, self._targets)
            for stats in _fast(self._model).last_solve.values():
                stats.wait()  # a solve that fails does so here, not unseen in the graph
        finally:
            current.wait_stream(side)
            before.put_back()
            torch.cuda.set_rng_state(random_state, device)
        self._static.freeze()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self._result = self._step(self._inputs, self._targets)
        self._grads = [parameter.grad for parameter in self._static.parameters]
        self._graph = graph


def capture_training_step(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    loss_fn: LossFunction,
    inputs: Mapping[str, Value],
    targets: tuple[Tensor, ...] = (),
    update: Update | None = None,
    warmup: int = 3,
) -> TrainingStep:
    """Capture forward, backward and update of one training step in a CUDA graph.

    A step of this model is some hundred launches of small kernels, which the host issues more
    slowly than a GPU runs them; a replay is one.

    Args:
        model: `gfnode_fast.FourierMD`, or a model made fast by `accelerate`.
        optimizer: of its parameters. On a GPU `torch.optim.Adam` or `AdamW` with
            `capturable=True`, best with `fused=True`.
        loss_fn: (outputs, *targets) → 0-dim loss, outputs being (x, v, h, kld).
        inputs: an example of the model's keyword arguments, edges as a pair of tensors; its shapes
            and dtypes are those of every later step. It may be on the host, as offsets are.
        targets: an example of what `loss_fn` takes besides the outputs.
        update: what follows backward in place of `optimizer.step()`: takes the loss, detached, and
            calls the optimizer itself, for instance after clipping. On a GPU a replay repeats its
            launches: it must decide nothing on the host, and leave results in tensors made before.
        warmup: steps made before capturing and then undone.

    Returns:
        A `TrainingStep`: `loss, outputs = step(inputs, *targets)`. On the CPU it is the plain step.

    Raises:
        TypeError: another model; on a GPU another optimizer.
        ValueError: on a GPU a solve that cannot be captured, an optimizer without `capturable`.
        SolverError: a solve of the example that fails.

    Notes:
        What can be captured decides nothing on the host: solves by the Triton kernels
        (solver_mode "joint" or "exact", `backend_report` says whether they run), models without a
        solve (no_ode, nothing propagated). All other solves read step sizes or numbers of steps on
        the host and are refused on a GPU.

        Capturing changes neither parameters, optimizer state nor random numbers. Afterwards the
        learning rate may be changed, by a scheduler or by assignment; zero_grad of either kind does
        no harm; state_dicts of model and optimizer are those of a plain loop and may be saved and
        loaded at any time, so that a run resumes exactly. The optimizer's learning rates are
        tensors from then on. A solve that fails in a replay gives NaN.

        The CUDA part has not yet run on hardware.
    """
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 1:
        raise ValueError(f"{OP}: `warmup` must be at least 1, got {warmup!r}; pass e.g. 3")
    fast = _fast(model)
    if next(model.parameters()).is_cuda:
        _check_optimizer(optimizer)
        if problem := why_not_capturable(fast):
            raise ValueError(
                f"{OP}: `model` must decide nothing on the host, got {problem}; use "
                "backend='triton', or make plain steps"
            )
    return TrainingStep(model, optimizer, loss_fn, inputs, targets, update, warmup)


def why_not_capturable(model: FourierMD) -> str | None:
    """None if a CUDA graph can hold the model's solves, else which one it cannot, and why."""
    report = model.backend_report()
    for name in (FEATURES, COORDINATES):
        part = report.parts[name]
        if part.backend not in ("triton", "none") and not model.no_ode:
            return (
                f"the {name} by {part.backend} with solver_mode={model.solver_mode!r} "
                f"({part.reason}), which reads step sizes or numbers of steps on the host"
            )
    return None


def _fast(model: nn.Module) -> FourierMD:
    forward = model.__dict__.get("forward") if isinstance(model, nn.Module) else None
    fast = forward.fast if isinstance(forward, AcceleratedForward) else model
    if not isinstance(fast, FourierMD):
        raise TypeError(
            f"{OP}: `model` must be gfnode_fast.FourierMD or accelerated, got "
            f"{type(model).__name__}; call gfnode_fast.accelerate(model), and capture before "
            "wrapping"
        )
    return fast


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Adam | AdamW):
        raise TypeError(
            f"{OP}: `optimizer` must be torch.optim.Adam or AdamW, got {type(optimizer).__name__}; "
            "use one of them, or make plain steps"
        )
    if not all(group["capturable"] for group in optimizer.param_groups):
        raise ValueError(
            f"{OP}: `optimizer` must have capturable=True, got False; construct it with "
            "capturable=True, fused=True"
        )


def _check_like(
    inputs: Mapping[str, Value],
    targets: tuple[Tensor, ...],
    example: Mapping[str, Value],
    example_targets: tuple[Tensor, ...],
) -> None:
    if inputs.keys() != example.keys():
        raise ValueError(
            f"{OP}: `inputs` must be {sorted(example)}, got {sorted(inputs)}; pass what was "
            "captured"
        )
    pairs = [(name, _tensors(inputs[name]), _tensors(like)) for name, like in example.items()]
    pairs.append(("targets", targets, example_targets))
    for name, values, likes in pairs:
        if len(values) != len(likes):
            raise ValueError(
                f"{OP}: `{name}` must be {len(likes)} tensor(s) as captured, got {len(values)}; "
                "pass what was captured"
            )
        for value, like in zip(values, likes, strict=True):
            if value.shape != like.shape:
                raise ValueError(
                    f"{OP}: `{name}` must be {tuple(like.shape)} as captured, got "
                    f"{tuple(value.shape)}; drop a smaller last batch, or capture a step for it"
                )
            if value.dtype != like.dtype:
                raise TypeError(
                    f"{OP}: `{name}` must be {like.dtype} as captured, got {value.dtype}; convert "
                    "it"
                )


def _tensors(value: Value) -> tuple[Tensor, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, Tensor) else tuple(value)


def _copy(name: str, value: Value, device: torch.device) -> Value:
    """On the device, wherever the caller's is: a graph has no address of the host's memory."""
    if value is not None and not isinstance(value, Tensor | tuple | list):
        raise TypeError(
            f"{OP}: `{name}` must be a tensor, a pair of them or None, got {type(value).__name__}; "
            "pass edges as row and col"
        )
    copies = tuple(part.detach().to(device, copy=True) for part in _tensors(value))
    return copies[0] if isinstance(value, Tensor) else None if value is None else copies


def _write(static: Value, value: Value) -> None:
    for into, source in zip(_tensors(static), _tensors(value), strict=True):
        into.copy_(source.detach(), non_blocking=True)
