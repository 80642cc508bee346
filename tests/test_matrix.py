"""Every pair of choices of graph layer, interaction, time mode, basis, solver mode, backend and
dtype, in few models and several shapes: values and every gradient against the reference, or the
documented refusal.

"joint" is held to the reference with the same steps, "per_molecule" to the reference on one
molecule at a time, "exact" and uniform steps to the reference in float64 with tight tolerances.
Where there is a GPU, cases of backend "triton" run on it, and the reference on the CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import gfnode_fast
from gfnode_fast import reference
from gfnode_fast.solvers import compiled, fixed
from golden_files import relative_error
from model_inputs import constructor, inputs, moved
from op_checks import DEVICE, OF_KERNELS, REQUIRE_GPU

STEP = fixed(0.0002)  # a radian of the fastest time embedding
CHOICES: dict[str, tuple[Any, ...]] = {
    "layer": ("egnn", "sage", "gcn"),
    "interaction": ("no_interaction", "attention", "concat"),
    "time_mode": ("none", "concat", "mlp", "posenc", "rope"),
    "basis": ("graph", "linear", None),
    "solver_mode": ("joint", "per_molecule", "exact", STEP),
    "backend": ("auto", "torch", "cpp", "triton", "compiled", "reference"),
    "dtype": (torch.float32, torch.float64),
}
LAST_FRAME, DELTA_FRAME = 100, 5000  # so that s <= 0.02
GROWTH = 20.0  # of the weights of the dynamics, whose norm times s is then about 1

# (values, gradients), relative. Measured: steps of the reference 2e-6 and 3e-5 in fp32, 1e-14 and
# 1e-12 in fp64, with posenc and rope, whose steps follow rounding, 2e-8; exact and uniform steps
# 1e-6 and 2e-3 in fp32 (time_mlp's ReLU has kinks), 2e-9 and 1e-7 in fp64.
BOUNDS: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("steps", torch.float32): (1e-5, 5e-4),
    ("steps", torch.float64): (1e-9, 1e-8),
    ("oscillating steps", torch.float32): (1e-5, 5e-4),
    ("oscillating steps", torch.float64): (1e-8, 1e-6),
    ("exact", torch.float32): (1e-4, 5e-3),
    ("exact", torch.float64): (1e-6, 1e-5),
}
if REQUIRE_GPU:  # whose float32 products are of three tf32 ones; not yet measured
    BOUNDS["steps", torch.float32] = (5e-5, 2e-3)


class Shape(NamedTuple):
    """Of a batch, and whether its first molecule's last atom has no edges."""

    batch: int
    atoms: int
    times: int
    modes: int
    isolated: bool = False


SHAPES = (
    Shape(2, 5, 2, 2, isolated=True),
    Shape(1, 3, 2, 3),
    Shape(3, 4, 1, 2),
)


class Case(NamedTuple):
    """One choice of each."""

    layer: str
    interaction: str
    time_mode: str
    basis: str | None
    solver_mode: Any
    backend: str
    dtype: torch.dtype

    @property
    def mixes(self) -> bool:
        return self.basis != "linear" and self.interaction != "no_interaction"

    @property
    def oscillates(self) -> bool:
        return self.basis != "linear" and self.time_mode in ("posenc", "rope")

    @property
    def shape(self) -> Shape:
        """The cases of a backend take the shapes in turn."""
        alike = [case for case in SERVED if case.backend == self.backend]
        return SHAPES[alike.index(self) % len(SHAPES)] if self in alike else SHAPES[0]

    @property
    def num_modes(self) -> int:
        atoms = self.shape.atoms
        return {None: atoms, "linear": min(self.shape.modes, atoms // 2 + 1)}.get(
            self.basis, self.shape.modes
        )

    @property
    def device(self) -> torch.device:
        return DEVICE if self.backend == "triton" else torch.device("cpu")

    def __str__(self) -> str:
        return "-".join(str(value).removeprefix("torch.") for value in self)


def refusal(case: Case) -> tuple[type[Exception], str] | None:
    """The documented refusal of this combination: error, and what its message names."""
    mode, backend = case.solver_mode, case.backend
    if mode == "exact" and case.mixes:
        return ValueError, "where modes interact"
    if backend == "reference" and mode != "joint":
        return ValueError, "`solver_mode` must be 'joint'"
    if backend == "compiled":
        if case.basis == "linear":
            return RuntimeError, "fourier_basis='linear'"
        if mode == "exact" and case.time_mode not in ("none", "concat"):
            return ValueError, "with solver_mode='exact' and backend='compiled'"
    if backend == "cpp":
        if case.oscillates and mode in ("joint", "per_molecule"):
            return ValueError, "`backend` must be 'auto', 'torch' or 'reference'"
        if case.dtype != torch.float32:
            return TypeError, "got 'cpp'"
    if backend == "triton":
        served = case.time_mode in ("none", "concat") and case.interaction != "concat"
        if case.basis == "linear" or not served or mode not in ("joint", "exact"):
            return RuntimeError, "`backend='triton'` must have kernels"
    return None


def cover(cases: list[Case]) -> list[Case]:
    """Few of the cases that hold every pair of choices that any of them holds; greedy, in order."""
    fields = list(itertools.combinations(range(len(CHOICES)), 2))
    numbers: dict[tuple[int, int, Any, Any], int] = {}
    masks = [
        sum(1 << numbers.setdefault((i, j, c[i], c[j]), len(numbers)) for i, j in fields)
        for c in cases
    ]
    left, chosen = (1 << len(numbers)) - 1, []
    while left:
        best = max(range(len(cases)), key=lambda n: (masks[n] & left).bit_count())
        left &= ~masks[best]
        chosen.append(cases[best])
    return chosen


EVERY = [Case(*values) for values in itertools.product(*CHOICES.values())]
SERVED = cover([case for case in EVERY if refusal(case) is None])
REFUSED = cover([case for case in EVERY if refusal(case) is not None])


def arguments(case: Case) -> dict[str, Any]:
    return constructor(
        gnn_ablation_mode=case.layer,
        mode_interaction=case.interaction,
        time_mode=case.time_mode,
        fourier_basis=case.basis,
        no_fourier=case.basis is None,
        num_modes=case.num_modes,
        num_atoms=case.shape.atoms,
        num_timesteps=case.shape.times,
        hidden_nf=4,
        time_emb_dim=4,
        delta_frame=DELTA_FRAME,
        solver="rk4" if case.solver_mode == STEP else "dopri5",
    ) | ({"rtol": 1e-6, "atol": 1e-8} if case.solver_mode == "exact" else {})


def built(case: Case) -> gfnode_fast.FourierMD:
    torch.manual_seed(0)
    model = gfnode_fast.FourierMD(
        **arguments(case), backend=case.backend, solver_mode=case.solver_mode
    ).to(case.device, case.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("weights1"):
                parameter.sub_(parameter.mean()).mul_(GROWTH)
    return model


def given_inputs(
    shape: Shape, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    given = inputs(shape.batch, shape.atoms, shape.times, dtype, delta_frame=LAST_FRAME)
    if shape.isolated:
        row, col = given["edge_index"]
        joined = (row != shape.atoms - 1) & (col != shape.atoms - 1)
        given["edge_index"] = row[joined], col[joined]
        given["edge_fea"] = given["edge_fea"][joined]
    return moved(given, device)


def molecules(model: Callable[..., Any], given: dict[str, Any], shape: Shape) -> tuple[Tensor, ...]:
    """The model on one molecule at a time."""
    row, col = given["edge_index"]
    parts = []
    for b in range(shape.batch):
        atoms = slice(b * shape.atoms, (b + 1) * shape.atoms)
        own = (row >= atoms.start) & (row < atoms.stop)
        alone = {k: given[k][atoms] for k in ("x", "h", "v", "loc_mean")}
        alone["edge_index"] = (row[own] - atoms.start, col[own] - atoms.start)
        alone["edge_fea"] = given["edge_fea"][own]
        alone |= {k: given[k][b : b + 1] for k in ("timeframes", "U_batch")}
        parts.append([o.view(shape.times, shape.atoms, -1) for o in model(**alone)[:3]])
    return tuple(torch.cat(part, dim=1).flatten(0, 1) for part in zip(*parts, strict=True))


def outcome(
    run: Callable[..., Any], model: torch.nn.Module, given: dict[str, Any]
) -> dict[str, Tensor]:
    """Outputs and the gradient of every parameter and input."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in given.items()
        if isinstance(value, Tensor) and name != "timeframes"
    }
    outputs = run(**(given | leaves))[:3]
    sum((o * o).mean() for o in outputs).backward()
    found = dict(zip(("x", "v", "h"), (o.detach() for o in outputs), strict=True))
    for name, leaf in [*model.named_parameters(), *leaves.items()]:
        found[f"grad {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return {name: value.double().cpu() for name, value in found.items()}


def expected_outcome(case: Case, model: gfnode_fast.FourierMD) -> dict[str, Tensor]:
    changes: dict[str, Any] = {}
    dtype = case.dtype
    if case.solver_mode in ("exact", STEP):
        changes, dtype = {"rtol": 1e-9, "atol": 1e-11, "solver": "dopri5"}, torch.float64
    oracle = reference.FourierMD(**(arguments(case) | changes)).to(dtype)
    oracle.load_state_dict(model.state_dict())
    given = given_inputs(case.shape, dtype)
    if case.solver_mode == "per_molecule":
        return outcome(lambda **every: molecules(oracle, every, case.shape), oracle, given)
    return outcome(oracle, oracle, given)


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="compiled" without code generation, which takes minutes."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(compiled, "_GRAPHS", {})


def marked(cases: list[Case]) -> list[Any]:
    """Those of the kernels are a GPU's tests where there is one."""
    of_kernels = {"triton": OF_KERNELS}
    return [pytest.param(c, id=str(c), marks=of_kernels.get(c.backend, [])) for c in cases]


@pytest.mark.parametrize("case", marked(SERVED))
def test_served(case: Case) -> None:
    model = built(case)
    expected = expected_outcome(case, model)
    actual = outcome(model, model, given_inputs(case.shape, case.dtype, case.device))
    kind = "oscillating steps" if case.oscillates else "steps"
    if case.solver_mode in ("exact", STEP):
        kind = "exact"
    values, gradients = BOUNDS[kind, case.dtype]
    floor = 1e-3 * max(v.norm().item() for k, v in expected.items() if k.startswith("grad"))
    for name, value in expected.items():
        if name.startswith("grad"):
            assert relative_error(actual[name], value, floor) < gradients, name
        else:
            assert relative_error(actual[name], value) < values, name


@pytest.mark.parametrize("case", marked(REFUSED))
def test_refused(case: Case) -> None:
    found = refusal(case)
    assert found is not None
    error, names = found
    with pytest.raises(error) as raised:
        built(case)(**given_inputs(case.shape, case.dtype, case.device))
    message = str(raised.value)
    assert names in message
    assert " must " in message
    assert " got " in message
    assert "; " in message


def test_every_pair_is_covered() -> None:
    pairs = {
        (i, j, case[i], case[j])
        for case in [*SERVED, *REFUSED]
        for i, j in itertools.combinations(range(len(CHOICES)), 2)
    }
    backends = {case.backend for case in SERVED}
    assert {(c.backend, c.shape) for c in SERVED} == set(itertools.product(backends, SHAPES))
    sizes = [len(choices) for choices in CHOICES.values()]
    assert len(pairs) == sum(a * b for a, b in itertools.combinations(sizes, 2))
