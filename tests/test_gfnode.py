"""GFNODE: FourierMD's numbers in a flat layout, and molecules of different size together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gfnode_fast import GFNODE, FourierMD
from gfnode_fast.ops.topology import topology
from gfnode_fast.solvers import fixed
from model_inputs import constructor, inputs
from op_checks import relative_error

F64 = torch.float64
SIZES = (5, 7, 5)  # two of one size, apart from each other
# The flat transforms add up in another order; joint steps pass rounding on.
BOUND = 1e-11

VARIANTS = {
    "egnn": {},
    "sage attention concat": {"gnn_ablation_mode": "SAGE", "mode_interaction": "attention",
                              "time_mode": "concat"},
    "gcn mlp": {"gnn_ablation_mode": "GCN", "time_mode": "mlp", "propagate_x": False},
    "flat norm": {"flat": True, "norm": True, "propagate_h": False},
    "vae": {"use_vae": True},
}  # fmt: skip


def models(**changes: Any) -> tuple[FourierMD, GFNODE]:
    torch.manual_seed(0)
    one = FourierMD(**constructor(**changes)).to(F64)
    arguments = constructor(**changes)
    del arguments["num_atoms"]
    many = GFNODE(**arguments).to(F64)
    many.load_state_dict(one.state_dict())
    return one, many


def flat(given: list[dict[str, Any]]) -> dict[str, Any]:
    """Batches of `FourierMD` as one of `GFNODE`."""
    ptr, rows, cols, eigvecs = [0], [], [], []
    for batch in given:
        molecules, num_atoms, _ = batch["U_batch"].shape
        row, col = batch["edge_index"]
        rows.append(row + ptr[-1])
        cols.append(col + ptr[-1])
        eigvecs.append(batch["U_batch"].flatten())
        ptr += [ptr[-1] + num_atoms * (k + 1) for k in range(molecules)]
    joined = {
        name: torch.cat([batch[name] for batch in given])
        for name in ("x", "h", "edge_fea", "v", "timeframes")
    }
    edges = torch.cat(rows), torch.cat(cols)
    return joined | {
        "edge_index": edges, "ptr": torch.tensor(ptr), "eigvecs": torch.cat(eigvecs),
    }  # fmt: skip


def run(model: FourierMD, given: dict[str, Any]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, (T, atoms, ...), and gradients of inputs and parameters."""
    leaves = {name: given[name].clone().requires_grad_() for name in ("x", "h", "edge_fea", "v")}
    torch.manual_seed(1)
    x, v, h, kld = model(**(given | leaves))
    times = model.num_timesteps
    outputs = [part.reshape(times, len(given["x"]), -1) for part in (x, v, h)]
    loss = sum(part.square().sum() for part in outputs) + kld
    names = leaves | dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    grads = {n: torch.zeros_like(p) if g is None else g
             for (n, p), g in zip(names.items(), found, strict=True)}  # fmt: skip
    return [part.detach() for part in outputs], grads


@pytest.mark.parametrize("variant", VARIANTS)
def test_molecules_of_one_size_give_fouriermds_numbers(variant: str) -> None:
    one, many = models(**VARIANTS[variant])
    given = inputs(batch=3, dtype=F64)
    expected, expected_grads = run(one, given)
    actual, grads = run(many, flat([given]))
    for left, right in zip(actual, expected, strict=True):
        assert relative_error(left, right) < BOUND
    assert many.last_solve["freq_conv"].evaluations == one.last_solve["freq_conv"].evaluations
    for name, grad in expected_grads.items():
        if name != "x":  # FourierMD is given the centroid, here it follows from x
            assert relative_error(grads[name], grad) < 1e-9 or float(grad.norm()) < 1e-12, name


@pytest.mark.parametrize("mode", ["exact", "per_molecule", fixed(0.25)], ids=str)
def test_molecules_of_different_size_are_as_alone(mode: Any) -> None:
    solver = {"solver": "rk4"} if not isinstance(mode, str) else {}
    _, many = models(solver_mode=mode, **solver)
    alone = [inputs(batch=2, num_atoms=n, dtype=F64, seed=n) for n in SIZES]
    together, _ = run(many, flat(alone))
    pieces = [run(many, flat([batch]))[0] for batch in alone]
    for k, whole in enumerate(together):
        assert relative_error(whole, torch.cat([piece[k] for piece in pieces], dim=1)) < BOUND


def test_joint_steps_depend_on_batch_mates_within_tolerance() -> None:
    _, many = models(rtol=1e-8, atol=1e-9)
    alone = [inputs(batch=2, num_atoms=n, dtype=F64, seed=n) for n in SIZES]
    together, _ = run(many, flat(alone))
    pieces = [run(many, flat([batch]))[0] for batch in alone]
    for k, whole in enumerate(together):
        assert relative_error(whole, torch.cat([piece[k] for piece in pieces], dim=1)) < 1e-6


def test_gradients_of_different_sizes() -> None:
    _, many = models(solver_mode="exact")
    alone = [inputs(batch=1, num_atoms=n, dtype=F64, seed=n) for n in SIZES]
    _, grads = run(many, flat(alone))
    pieces = [run(many, flat([batch]))[1] for batch in alone]
    for name, grad in grads.items():
        parts = [piece[name] for piece in pieces]
        expected = torch.cat(parts) if name in ("x", "h", "edge_fea", "v") else sum(parts)
        assert relative_error(grad, expected) < BOUND, name


def test_fewer_atoms_than_modes() -> None:
    _, many = models(num_modes=6, solver_mode="exact")
    outputs, grads = run(many, flat([inputs(batch=1, num_atoms=5, dtype=F64)]))
    assert all(part.isfinite().all() for part in [*outputs, *grads.values()])


def test_float32_takes_the_same_kernels() -> None:
    one, many = (model.float() for model in models())
    given = inputs(batch=2)
    expected, _ = run(one, given)
    actual, _ = run(many, flat([given]))
    for left, right in zip(actual, expected, strict=True):
        assert relative_error(left, right) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ptr": torch.tensor([0, 4, 9])}, "`ptr` must be ascending from 0 to x's 10 rows"),
        ({"ptr": torch.tensor([0, 5, 5, 10])}, "`timeframes` must be of shape"),
        ({"ptr": torch.tensor([0.0, 5.0, 10.0])}, "`ptr` must be torch.int64"),
        ({"eigvecs": torch.zeros(7, dtype=F64)}, "`eigvecs` must be of shape"),
        ({"v": torch.zeros(9, 3, dtype=F64)}, "`v` must be of shape"),
        ({"h": torch.zeros(10, 3, dtype=F64)}, "`h` must be of shape"),
        ({"timeframes": torch.zeros(2, 4)}, "`timeframes` must be positive"),
        (
            {"edge_index": topology(torch.zeros(1).long(), torch.zeros(1).long(), 9)},
            "`edge_index` must be a topology of x's 10 nodes, got 9",
        ),
    ],
)
def test_bad_inputs_are_refused(change: dict[str, Tensor], message: str) -> None:
    _, many = models()
    given = flat([inputs(batch=2, dtype=F64)])
    with pytest.raises((TypeError, ValueError), match=message):
        many(**(given | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_atoms": 5}, "`num_atoms` must be None"),
        ({"fourier_basis": "linear", "num_atoms": None}, "`fourier_basis` must be 'graph'"),
        ({"backend": "reference", "num_atoms": None}, "`backend` must be another"),
    ],
)
def test_bad_constructions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GFNODE(**constructor(**change))


def test_positions_of_arguments_are_those_of_the_signature() -> None:
    positions = (1, 2, 3, 8, torch.nn.SiLU(), "cpu", True, False, False, 3, 4, 6, "bosh3")
    model = GFNODE(*positions, delta_frame=100, fourier_basis="graph")
    assert (model.solver, model.num_atoms) == ("bosh3", None)
