"""What every kernel module declares of itself, so that all of them can be compiled without a GPU.

A module of this package that defines kernels has a function `aot_cases() -> list[AotCase]`:
its entry kernels as shipped, at production shapes. `missing_cases` finds entry
kernels that no case covers; tests/test_aot.py compiles the cases for sm_80, sm_90 and sm_100.

An entry kernel is a `@triton.jit` function that no other one calls; the called ones are device
functions and are compiled with their callers.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from gfnode_fast.kernels.integers import BATCH_SIZES


@dataclass(frozen=True)
class AotCase:
    """One shipped configuration of one entry kernel.

    Attributes:
        kernel: the `@triton.jit` function, decorated further (`autotune`, `heuristics`) or not.
        name: unique over the package, naming op, direction, precision and shape:
            "graph_fourier_fwd fp32 K=64 M=2".
        signature: run-time argument → Triton type: "*fp32", "*bf16", "*i64", "i32", "fp32" ...
        constexprs: every other argument → its value: `tl.constexpr` parameters, None for absent
            pointers, 1 for strides that are 1 (Triton specialises on both).
        num_warps, num_stages: as launched.
        divisible_by_16: integer arguments that are multiples of 16 in this configuration. Pointers
            always count as aligned: torch allocates so.
        allowed_spills_reason: why local-memory traffic is accepted here; None refuses it.
        options: further compile options as launched, e.g. {"maxnreg": 128}.
        only: the one architecture it is compiled for, where that says enough; None: all.
    """

    kernel: Any
    name: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    divisible_by_16: tuple[str, ...] = ()
    allowed_spills_reason: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    only: int | None = None

    def check(self) -> None:
        """Compare the case with the kernel's parameters.

        Raises:
            ValueError: a parameter without a type or value, with both, a name that is no
                parameter, or a value of one that is not specialised on (`integers.BATCH_SIZES`).
        """
        parameters = set(inspect.signature(unwrap(self.kernel)).parameters)
        given = [*self.signature, *self.constexprs]
        problems = {
            "without a type or value": sorted(parameters - set(given)),
            "with both a type and a value": sorted(set(self.signature) & set(self.constexprs)),
            "that the kernel does not have": sorted(
                (set(given) | set(self.divisible_by_16)) - parameters
            ),
            "that Triton is told nothing of": sorted(
                {*self.constexprs, *self.divisible_by_16} & set(BATCH_SIZES)
            ),
        }
        for what, names in problems.items():
            if names:
                raise ValueError(
                    f"AotCase: `{self.name}` must name each parameter of "
                    f"{unwrap(self.kernel).__name__} once, got {names} {what}; correct the case"
                )


def of_ones(cases: list[AotCase], *sizes: str) -> list[AotCase]:
    """The cases with these integers 1 where they have them, which Triton makes constants: one
    component, one time.
    """
    found = []
    for case in cases:
        ones = {name: 1 for name in sizes if name in case.signature}
        signature = {name: kind for name, kind in case.signature.items() if name not in ones}
        found.append(
            replace(
                case,
                name=f"{case.name} of ones",
                signature=signature,
                constexprs={**case.constexprs, **ones},
                divisible_by_16=tuple(n for n in case.divisible_by_16 if n not in ones),
            )
        )
    return found


def unwrap(kernel: Any) -> Callable[..., Any]:
    """Return the Python function under `jit`, `autotune`, `heuristics` or the interpreter."""
    while not inspect.isfunction(kernel):
        kernel = kernel.fn
    function: Callable[..., Any] = kernel
    return function


def kernel_modules(package: ModuleType | None = None) -> Iterator[ModuleType]:
    """Import and yield the modules of `gfnode_fast.kernels` (or another package) but this one."""
    package = package or importlib.import_module(__package__ or "")
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if info.name != __name__:
            yield importlib.import_module(info.name)


def all_cases(package: ModuleType | None = None) -> list[AotCase]:
    """Collect the cases of all kernel modules, checked.

    Raises:
        ValueError: a case that does not fit its kernel, or two cases of one name.
    """
    cases = [
        case
        for module in kernel_modules(package)
        if hasattr(module, "aot_cases")
        for case in module.aot_cases()
    ]
    names = [case.name for case in cases]
    for case in cases:
        case.check()
        if names.count(case.name) > 1:
            raise ValueError(f"AotCase: `name` must be unique, got {case.name!r} more than once")
    return cases


def entry_kernels(package: ModuleType | None = None) -> dict[str, Callable[..., Any]]:
    """Map `module.function` to each jit function that no other jit function calls."""
    from triton.runtime.jit import KernelInterface

    defined = {}
    for module in kernel_modules(package):
        for name, value in vars(module).items():
            if isinstance(value, KernelInterface) and unwrap(value).__module__ == module.__name__:
                defined[f"{module.__name__}.{name}"] = unwrap(value)
    called = {callee for function in defined.values() for callee in _called_functions(function)}
    return {name: function for name, function in defined.items() if function not in called}


def missing_cases(package: ModuleType | None = None) -> list[str]:
    """Names of entry kernels without an `AotCase`."""
    covered = {unwrap(case.kernel) for case in all_cases(package)}
    return [name for name, kernel in entry_kernels(package).items() if kernel not in covered]


def _called_functions(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Jit functions that the source of `function` names, bare or as an attribute of a module."""
    from triton.runtime.jit import KernelInterface

    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    scope = function.__globals__
    for node in ast.walk(tree):
        value = None
        if isinstance(node, ast.Name):
            value = scope.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            value = getattr(scope.get(node.value.id), node.attr, None)
        if isinstance(value, KernelInterface) and unwrap(value) is not function:
            yield unwrap(value)
