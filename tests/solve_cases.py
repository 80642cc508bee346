"""The solves by Triton as their tests take them: inputs, and a function of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gfnode_fast.ops.joint_status import check_joint_status
from gfnode_fast.ops.propagate_attention import propagate_attention
from gfnode_fast.ops.propagate_exact import check_status, propagate_exact
from gfnode_fast.ops.propagate_joint import propagate_joint
from op_checks import DEVICE, gradients, randn, relative_error

Function = Callable[..., Tensor]
Problem = tuple[list[Tensor], Tensor]  # y0 and the dynamics, times


@dataclass(frozen=True)
class Case:
    """An operation with status.

    Attributes:
        names: of y0 and the dynamics' tensors; the last ones may be left out.
        make: (dtype=, sizes=) → problem.
        check: looks at the status.
        tiny: sizes of a problem that is solved many times.
        options: what is enough for such a problem.
    """

    operation: Callable[..., tuple[Tensor, Tensor]]
    names: tuple[str, ...]
    make: Callable[..., Problem]
    check: Callable[[Tensor], None]
    tiny: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def solve(self, times: Tensor, backend: str, **options: Any) -> Function:
        """The solve as a function of y0 and the dynamics."""

        def call(*inputs: Tensor) -> Tensor:
            given = dict(zip(self.names, inputs, strict=False))
            values, status = self.operation(**given, times=times, backend=backend, **options)
            if not torch.compiler.is_compiling():
                self.check(status)  # on a GPU nobody else does
            return values

        return call

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Of the operation, by name."""
        inputs, times = self.make(dtype=torch.float32, batch=2)
        given = dict(zip(self.names, inputs, strict=False))
        return given | {"times": times, "backend": "triton"} | changes


def check_gradients(
    got: Function,
    expected: Function,
    inputs: Sequence[Tensor],
    tolerance: float,
    *,
    wide: bool = False,
) -> None:
    """Gradients of all inputs; with `wide` the expected ones are those in float64."""
    exact = [x.double() for x in inputs] if wide else inputs
    for mine, other in zip(gradients(got, inputs), gradients(expected, exact), strict=True):
        assert relative_error(mine, other) <= tolerance


def _times(batch: int, times: int, seed: int) -> Tensor:
    """(B, T) ascending in (0.02, 1)."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.rand(batch, times, generator=generator, dtype=torch.float64) * 0.98 + 0.02
    return own.sort(dim=1)[0].to(DEVICE)


def _linear(
    weight_size: float,
    slope_size: float | None,
    dtype: torch.dtype,
    *,
    batch: int = 7,
    modes: int = 2,
    components: int = 3,  # 21 rows: two programs, one partial
    channels: int = 3,
    times: int = 3,
) -> Problem:
    y0 = randn(batch, modes, components, channels, dtype=dtype)
    weight = randn(modes, channels, channels, dtype=dtype, seed=1) * weight_size
    slope = []
    if slope_size is not None:
        slope = [randn(modes, channels, dtype=dtype, seed=2) * slope_size]
    return [y0, weight, *slope], _times(batch, times, 3)


def exact_problem(
    norm: float = 0.2, dtype: torch.dtype = torch.float64, *, affine: bool = True, **sizes: int
) -> Problem:
    """(y0, W) or (y0, W, b), times; ‖W‖ is about `norm`."""
    size = norm / (2 * sizes.get("channels", 3) ** 0.5)
    return _linear(size, 1.0 if affine else None, dtype, **sizes)


def joint_problem(
    size: float = 0.5, dtype: torch.dtype = torch.float64, *, affine: bool = False, **sizes: int
) -> Problem:
    """(y0, W) or (y0, W, b), times."""
    return _linear(size, size * 20 if affine else None, dtype, **sizes)


def attention_problem(
    size: float = 0.3,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = 2,
    modes: int = 2,
    components: int = 1,
    channels: int = 3,
    times: int = 2,
    in_time: bool = True,
) -> Problem:
    """(y0, P, q, W, b), times."""
    rows = 2 if in_time else 1
    shapes = (
        (batch, modes, components, channels), (channels, channels), (rows, channels),
        (modes, channels, channels), (rows, modes, channels),
    )  # fmt: skip
    inputs = [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    inputs[3] *= size
    inputs[4] *= size
    return inputs, _times(batch, times, 9)


LINEAR = ("y0", "weight", "slope")
TINY = {"batch": 2, "components": 1, "channels": 2, "times": 2}
EXACT = Case(propagate_exact, LINEAR, exact_problem, check_status, TINY)
JOINT = Case(propagate_joint, LINEAR, joint_problem, check_joint_status, TINY, {"max_attempts": 3})
ATTENTION = Case(
    propagate_attention,
    ("y0", "key", "query_bias", "weight", "bias"),
    attention_problem,
    check_joint_status,
    {"size": 0.1, "batch": 1, "channels": 2, "times": 1},
    {"max_attempts": 2},
)
