"""A GPU that is not there: tensors that claim to be on it, and a record of who waits for it.

For a process of its own, which loads the library of `device.cpp` before torch. With it and torch's
FakeTensorMode, tensors on the GPU have shapes, strides and devices, but no values. Those on the CPU
are real ones.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

import gfnode_fast
from gfnode_fast.nn import backends

aten = torch.ops.aten
PACKAGE = Path(gfnode_fast.__file__).parent
MAX_INT, MAX_GRID = 2**31, (2**31, 2**16, 2**16)
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
is_capturing = False
devices: list[torch.device] = []

# What a function that reads on the host gets, in turn, in place of values; otherwise False, 1, 0.5.
READ = {
    "check_times": [True],
    "check_state": [True],
    "per_molecule._integrate": [True, False, False],
}


def place() -> str:
    """The innermost function of the package that is running, with its module."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if PACKAGE in path.parents or path.parent.name == "kernels":
            return f"{path.stem}.{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "outside"


def described(value: Tensor) -> tuple[object, ...]:
    """Shape, dtype, device and strides."""
    strides = value.stride() if value.numel() else ()
    return tuple(value.shape), value.dtype, value.device, strides


class Watch(TorchDispatchMode):
    """Sends tensors on the GPU to FAKE, the others to torch, and writes down who waits.

    Operators of this package are run, launchers included, and must give what their fake
    implementations promise.

    Attributes:
        reads: places that read a value on the host, with how often.
        waits: places that copy between host and device and wait for it.
        atomics: places that add floating-point numbers in no defined order.
        peak: most bytes of tensors on the GPU at a time, beyond those there at `clear`.
        launched: kernel to what it was compiled for, strides aside, with how often it was launched.
    """

    def __init__(self) -> None:
        super().__init__()
        self.turns: Counter[str] = Counter()
        self.launched: defaultdict[str, Counter[object]] = defaultdict(Counter)
        self.memory: dict[int, tuple[StorageWeakRef, int]] = {}
        self.clear()

    def clear(self) -> None:
        self.reads: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.atomics: Counter[str] = Counter()
        self.peak, self.before = 0, self._allocated()

    def _allocated(self) -> int:
        self.memory = {key: kept for key, kept in self.memory.items() if not kept[0].expired()}
        return sum(size for _, size in self.memory.values())

    def _note_memory(self, tensors: list[Tensor]) -> None:
        grown = False
        for storage in (tensor.untyped_storage() for tensor in tensors):
            kept = StorageWeakRef(storage)
            if kept.cdata not in self.memory or self.memory[kept.cdata][0].expired():
                self.memory[kept.cdata], grown = (kept, storage.nbytes()), True
        if grown:
            self.peak = max(self.peak, self._allocated() - self.before)

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten" and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        target = torch.device(kwargs.get("device") or "cpu")
        if target.type == "cpu" and not any(isinstance(x, FakeTensor) for x in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        on_gpu = [x for x in tensors if x.is_cuda]
        name = func.name().partition(".")[0]
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(func, args, kwargs)
        elif on_gpu and func in VALUES:
            self.reads[place()] += 1
            if func is aten._local_scalar_dense.default:
                return self._answer(args[0], place())
            return VALUES[func](*args, **kwargs)
        elif func in FUSED:
            assert len(on_gpu) == len(tensors), f"{func} has tensors on the host"
            return None
        elif func in ATOMIC and args[0].is_floating_point():
            self.atomics[place()] += 1
        with FAKE:
            found = func(*args, **kwargs)
        if name in OPDEFS:
            return self._run(OPDEFS[name], found, args, kwargs)
        self._note_memory([x for x in tree_leaves(found) if isinstance(x, Tensor) and x.is_cuda])
        return found

    def _run(self, operator: Any, promised: Any, args: Any, kwargs: Any) -> Any:
        with self, torch.no_grad():
            given = operator._init_fn(*args, **kwargs)
        for a, b in zip(tree_leaves(promised), tree_leaves(given), strict=True):
            assert described(a) == described(b), f"{operator}: {described(a)}, got {described(b)}"
        return given

    def _note_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        into, source = (args[0], args[1]) if func is aten.copy_.default else (None, args[0])
        device = (
            torch.device(kwargs.get("device") or source.device) if into is None else into.device
        )
        goes_on = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if device.type != source.device.type and not goes_on:
            self.waits[place()] += 1

    def _answer(self, value: Tensor, where: str) -> float:
        turns = READ.get(where) or READ.get(where.partition(".")[2])
        if value.dtype == torch.bool and turns is not None:
            self.turns[where] += 1
            return turns[(self.turns[where] - 1) % len(turns)]
        return 0.5 if value.is_floating_point() else int(value.dtype != torch.bool)

    def launch(self, kernel: Any, args: Any, grid: Any, kwargs: Any) -> None:
        """What Triton would have been given."""
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
        grid = (*grid, 1, 1)[:3]
        for extent, limit in zip(grid, MAX_GRID, strict=True):
            assert 0 < extent < limit, f"{kernel.__name__}: grid {grid}"
        given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
        key: list[object] = [*options.items()]
        for parameter in kernel.params:
            value = given[parameter.name]
            where = f"{kernel.__name__}: {parameter.name}"
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{where} is on the host"
                assert devices[-1:] == [value.device], f"{where} is not on the current device"
            elif not parameter.is_constexpr and type(value) is int:
                assert abs(value) < MAX_INT, f"{where} = {value} takes a kernel of its own"
                special = not parameter.do_not_specialize and not where.count(": stride_")
                value = (special and value == 1, special and value % 16 == 0)
            key.append(value.dtype if isinstance(value, Tensor) else value)
        self.launched[kernel.__name__][tuple(key)] += 1


def _distinct(value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.unique` of values of which no two are equal."""
    position = value.new_empty(value.shape, dtype=torch.int64)
    return value.new_empty(value.numel()), position, position.flatten()


def _counts(value: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return value.new_empty(minlength, dtype=torch.int64)


VALUES = {
    aten._local_scalar_dense.default: None,
    aten._unique2.default: _distinct,
    aten.bincount.default: _counts,
    aten.nonzero.default: lambda value: value.new_empty((2, value.dim()), dtype=torch.int64),
    aten.equal.default: lambda *_: True,
}
FUSED = (aten._fused_adam_.tensor_lr, aten._fused_adamw_.tensor_lr)  # without a fake of torch's own
ATOMIC = (
    aten.index_add.default, aten.index_add_.default, aten.scatter_add.default,
    aten.scatter_add_.default, aten.scatter_reduce.two,
)  # fmt: skip


def _moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """`Module.to`, which torch refuses for parameters without memory."""
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    for owner in module.modules() if device is not None else ():
        for name, p in owner._parameters.items():
            if p is not None:
                fresh = torch.empty(p.shape, dtype=dtype or p.dtype, device=device)
                owner._parameters[name] = nn.Parameter(fresh)
    return module


class _Event:
    """Of a copy that has not arrived."""

    def record(self) -> None:
        assert not is_capturing

    def query(self) -> bool:
        assert not is_capturing
        return False

    def synchronize(self) -> None:
        watch.reads[place()] += 1


class _Stream:
    def __init__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


@contextlib.contextmanager
def _current(device: torch.device) -> Iterator[None]:
    devices.append(device)
    try:
        yield
    finally:
        devices.pop()


@contextlib.contextmanager
def _captured(graph: Any, stream: Any = None) -> Iterator[None]:
    global is_capturing
    is_capturing = True
    try:
        yield
    finally:
        is_capturing = False


def _pinned(value: Tensor) -> Tensor:
    assert not is_capturing
    return value.clone()


def _empty(*args: Any, pin_memory: bool = False, make: Any = torch.empty, **kwargs: Any) -> Tensor:
    return make(*args, **kwargs)


watch = Watch()


@contextlib.contextmanager
def gpu() -> Iterator[None]:
    """Inside there is one."""
    torch.autograd.set_multithreading_enabled(False)
    torch.empty, Tensor.pin_memory, nn.Module.to = _empty, _pinned, _moved  # type: ignore[assignment]
    backends._why_triton_nowhere = lambda: None
    JITFunction.run = lambda kernel, *args, grid, warmup, **kwargs: watch.launch(
        kernel, args, grid, kwargs
    )
    replacements = {
        "device": _current, "Event": _Event, "Stream": _Stream, "graph": _captured,
        "CUDAGraph": lambda: types.SimpleNamespace(replay=lambda: None),
        "current_stream": _Stream, "stream": lambda _: contextlib.nullcontext(),
        "get_rng_state": lambda *_: None, "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: is_capturing,
        "get_device_capability": lambda _: (9, 0),
        "get_device_properties": lambda _: types.SimpleNamespace(multi_processor_count=132),
    }  # fmt: skip
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.random.fork_rng = lambda *_, **__: contextlib.nullcontext()
    with FAKE, watch:
        yield


def on_gpu(value: Any) -> Any:
    """A tensor, or each of a tuple or the values of a dict, on the GPU."""
    if isinstance(value, dict):
        return {name: on_gpu(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    return value.to("cuda") if isinstance(value, Tensor) else value
