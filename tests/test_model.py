"""Behaviour of both models beyond the golden files: shapes, symmetry, state, devices, memory."""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS

import gfnode_fast
from gfnode_fast import reference
from gfnode_fast.nn import fourier_md
from gfnode_fast.ops.topology import Topology, _build, topology
from golden_files import relative_error
from model_inputs import constructor, inputs, moved

LAYERS = ("egnn", "graphsage", "gcn")
INTERACTIONS = ("no_interaction", "attention", "concat")
TIME_MODES = ("none", "concat", "mlp", "posenc", "rope")
# A published solver that needs thousands of steps on posenc/rope is given loose tolerances here.
LOOSE = {"rtol": 1e-1, "atol": 1e-1}


def run(model: torch.nn.Module, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    outputs = model(**given)
    batch_rows, width = given["x"].shape[0] * 4, 8 + 6
    assert [tuple(o.shape) for o in outputs] == [
        (batch_rows, 3),
        (batch_rows, 3),
        (batch_rows, width),
        (),
    ]
    assert all(torch.isfinite(o).all() for o in outputs)
    return outputs


@pytest.mark.parametrize(
    ("layer", "interaction", "time_mode"),
    list(itertools.product(LAYERS, INTERACTIONS, TIME_MODES)),
)
def test_every_combination_runs_and_the_dropin_is_equal(
    layer: str, interaction: str, time_mode: str
) -> None:
    kwargs = constructor(
        gnn_ablation_mode=layer, mode_interaction=interaction, time_mode=time_mode, **LOOSE
    )
    model, dropin = reference.FourierMD(**kwargs), gfnode_fast.FourierMD(**kwargs)
    dropin.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(dropin.state_dict(), strict=True)
    for a, b in zip(run(model, inputs()), run(dropin, inputs()), strict=True):
        assert relative_error(b, a) < 1e-5
    model(**inputs())[0].square().mean().backward()


@pytest.mark.parametrize(
    "changes",
    [
        {"use_vae": True, "gnn_ablation_mode": "sage", "flat": True},
        {"use_vae": True, "gnn_ablation_mode": "gcn", "norm": True, "flat": True},
        {"flat": True, "norm": True},
        {"time_emb_dim": 7, "time_mode": "posenc", **LOOSE},
        {"time_emb_dim": 7, "time_mode": "mlp"},
        {"time_emb_dim": 7, "time_mode": "concat", "mode_interaction": "attention"},
        {"fourier_basis": None, "no_fourier": True, "num_modes": 5, "time_mode": "concat"},
        {"fourier_basis": "linear", "time_mode": "mlp", "mode_interaction": "attention"},
        {"no_ode": True, "mode_interaction": "concat"},
        {"propagate_x": False, "propagate_h": False},
        {"n_layers": 0},
    ],
)
def test_options_run(changes: dict[str, Any]) -> None:
    given = inputs()
    kwargs = constructor(**changes)
    width = kwargs["hidden_nf"] + kwargs["time_emb_dim"]
    model = gfnode_fast.FourierMD(**kwargs)
    x, v, h, kld = model(**given)
    assert x.shape == v.shape == (40, 3)
    assert h.shape == (40, width)
    (x.square().mean() + v.square().mean() + h.square().mean() + kld).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "scipy_solver"])
def test_every_torchdiffeq_solver_agrees_with_dopri5(solver: str) -> None:
    kwargs = constructor(num_timesteps=4)
    torch.manual_seed(0)
    exact = reference.FourierMD(**kwargs, rtol=1e-9, atol=1e-9).double()
    model = gfnode_fast.FourierMD(**kwargs, solver=solver, rtol=1e-5, atol=1e-5).double()
    model.load_state_dict(exact.state_dict())
    given = inputs(dtype=torch.float64)
    # fixed-step methods step on the union grid of a few coarse times: their own error, 3e-3 for
    # euler
    assert relative_error(model(**given)[0], exact(**given)[0]) < 1e-2


def test_signature_is_the_published_one() -> None:
    published = list(inspect.signature(reference.FourierMD).parameters.values())
    ours = list(inspect.signature(gfnode_fast.FourierMD).parameters.values())
    assert ours[: len(published)] == published
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in ours[len(published) :])
    assert inspect.signature(reference.FourierMD.forward) == inspect.signature(
        gfnode_fast.FourierMD.forward
    )


def test_registration_order_and_public_attributes() -> None:
    model = gfnode_fast.FourierMD(**constructor(use_vae=True))
    assert [name for name, _ in model.named_children()] == [
        "encode_layers",
        "decode_layers",
        "embedding",
        "fc_mu_h",
        "fc_logvar_h",
        "fc_mu_x",
        "fc_logvar_x",
        "freq_conv",
        "freq_conv_x",
    ]
    assert not list(model.buffers())
    for name in (
        "num_modes",
        "num_timesteps",
        "num_atoms",
        "solver",
        "rtol",
        "atol",
        "delta_frame",
    ):
        assert hasattr(model, name)


def test_num_atoms_may_come_later() -> None:
    model = gfnode_fast.FourierMD(**constructor(num_atoms=None))
    model.num_atoms = 5
    run(model, inputs())


def test_to_moves_everything() -> None:
    model = gfnode_fast.FourierMD(**constructor(), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model = gfnode_fast.FourierMD(**constructor()).to(torch.float64)
    assert run(model, inputs(dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.gpu
def test_to_cuda() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    expected = model(**inputs())[0]
    actual = model.to("cuda")(**moved(inputs(), "cuda"))[0]
    assert actual.is_cuda
    assert relative_error(actual.cpu(), expected) < 1e-5


def test_autocast() -> None:
    """Under bfloat16 autocast both models run, and differ by what bfloat16 does to either."""
    model, dropin = reference.FourierMD(**constructor()), gfnode_fast.FourierMD(**constructor())
    dropin.load_state_dict(model.state_dict())
    exact = model(**inputs())[0]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = model(**inputs())[0], dropin(**inputs())[0]
    ours.float().square().mean().backward()
    gradients = [p.grad for p in dropin.parameters() if p.grad is not None]
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert relative_error(ours, exact) < max(2 * relative_error(theirs, exact), 1e-2)


def test_importing_takes_no_compiler() -> None:
    script = "import sys, gfnode_fast; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_deterministic() -> None:
    model = gfnode_fast.FourierMD(**constructor(mode_interaction="attention"))
    for a, b in zip(run(model, inputs()), run(model, inputs()), strict=True):
        assert torch.equal(a, b)


def test_every_output_is_written(poison_all_memory: None) -> None:
    """Fresh memory, torchdiffeq's included, holds NaN here; none of it reaches an output or a
    gradient.
    """
    model = gfnode_fast.FourierMD(**constructor(use_vae=True))
    outputs = run(model, inputs())
    sum(o.sum() for o in outputs).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def shifted(given: dict[str, Any], offset: torch.Tensor) -> dict[str, Any]:
    return given | {"x": given["x"] + offset, "loc_mean": given["loc_mean"] + offset}


def rotation() -> torch.Tensor:
    q = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    )[0]
    return q * torch.det(q)


def test_translation() -> None:
    """EGNN only ever sees differences of positions; a shift of the input shifts the output."""
    model = reference.FourierMD(**constructor()).double()
    given, offset = inputs(dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    x, v, h, _ = run(model, given)
    x2, v2, h2, _ = run(model, shifted(given, offset))
    assert relative_error(x2, x + offset) < 1e-12
    assert relative_error(v2, v) < 1e-12
    assert relative_error(h2, h) < 1e-12


@pytest.mark.parametrize("propagate_x", [False, True])
def test_rotation_where_equivariant_and_where_not(propagate_x: bool) -> None:
    """Equivariant with propagate_x=False. With it, SiLU acts on vector components: not
    equivariant.
    """
    model = reference.FourierMD(**constructor(propagate_x=propagate_x)).double()
    given, q = inputs(dtype=torch.float64), rotation()
    turned = given | {key: given[key] @ q.T for key in ("x", "v", "loc_mean")}
    x, v, h, _ = run(model, given)
    x2, v2, h2, _ = run(model, turned)
    errors = (relative_error(x2, x @ q.T), relative_error(v2, v @ q.T), relative_error(h2, h))
    if propagate_x:
        assert min(errors[:2]) > 1e-3
    else:
        assert max(errors) < 1e-12


@pytest.mark.parametrize("layer", ["graphsage", "gcn"])
def test_sage_and_gcn_are_not_translation_invariant(layer: str) -> None:
    """They read absolute positions as features, as published."""
    model = reference.FourierMD(**constructor(gnn_ablation_mode=layer)).double()
    given, offset = inputs(dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    assert relative_error(run(model, shifted(given, offset))[2], run(model, given)[2]) > 1e-3


@pytest.mark.parametrize("layer", LAYERS)
def test_permutation(layer: str) -> None:
    """Renumbering atoms renumbers the output; order of edges does not matter."""
    model = reference.FourierMD(**constructor(gnn_ablation_mode=layer)).double()
    given = inputs(dtype=torch.float64)
    batch, num_atoms, num_times = 2, 5, 4
    order = torch.randperm(num_atoms, generator=torch.Generator().manual_seed(1))
    rows = (torch.arange(batch)[:, None] * num_atoms + order).reshape(-1)
    new_number = torch.empty_like(rows).scatter_(0, rows, torch.arange(rows.numel()))
    edges = torch.randperm(given["edge_fea"].shape[0], generator=torch.Generator().manual_seed(2))
    renumbered = given | {key: given[key][rows] for key in ("x", "h", "v", "loc_mean")}
    renumbered["U_batch"] = given["U_batch"][:, order]
    renumbered["edge_index"] = tuple(new_number[end][edges] for end in given["edge_index"])
    renumbered["edge_fea"] = given["edge_fea"][edges]
    for a, b in zip(run(model, given)[:3], run(model, renumbered)[:3], strict=True):
        a = a.view(num_times, batch * num_atoms, -1)[:, rows].reshape(b.shape)
        assert relative_error(b, a) < 1e-12


def test_non_contiguous_inputs() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    given = inputs()
    strided = {
        key: value.repeat_interleave(2, dim=-1)[..., ::2] if torch.is_tensor(value) else value
        for key, value in given.items()
    }
    for a, b in zip(run(model, given), run(model, strided), strict=True):
        assert relative_error(b, a) < 1e-6


def test_isolated_atoms_and_no_edges() -> None:
    model = gfnode_fast.FourierMD(**constructor())
    given = inputs()
    empty = torch.zeros(0, dtype=torch.long)
    given |= {"edge_index": (empty, empty), "edge_fea": torch.zeros(0, 3)}
    x = run(model, given)[0]
    x.sum().backward()


@pytest.mark.parametrize("time_mode", ["none", "posenc"])
def test_edges_are_sorted_once(monkeypatch: pytest.MonkeyPatch, time_mode: str) -> None:
    """Also where they are not kept from one batch to the next, as on a GPU."""
    sorted_for: list[int] = []

    def counted(*given: Any, **options: Any) -> Topology:
        sorted_for.append(len(given[0]))
        return topology(*given, **options)

    monkeypatch.setattr(fourier_md, "topology", counted)
    gfnode_fast.FourierMD(**constructor(n_layers=2, time_mode=time_mode))(**inputs())
    assert len(sorted_for) == 1
    gfnode_fast.FourierMD(**constructor(), backend="reference")(**inputs())
    assert len(sorted_for) == 1


@pytest.mark.parametrize("is_kept", [True, False])
def test_edges_in_any_order_may_change_between_calls(
    monkeypatch: pytest.MonkeyPatch, is_kept: bool
) -> None:
    """Sorted edges hold none of the caller's tensors, kept (CPU) or not (GPU, torch.compile)."""
    if not is_kept:
        monkeypatch.setattr(fourier_md, "topology", _build)
    model = gfnode_fast.FourierMD(**constructor(), backend="torch").double()
    oracle = reference.FourierMD(**constructor()).double()
    oracle.load_state_dict(model.state_dict())
    given = inputs(dtype=torch.float64)
    order = torch.randperm(len(given["edge_fea"]), generator=torch.Generator().manual_seed(0))
    given["edge_index"] = row, col = tuple(end[order] for end in given["edge_index"])
    for end in (row, col, row):
        loss = sum(o.square().mean() for o in run(model, given)[:3])
        as_it_was = given | {"edge_index": (row.clone(), col.clone())}
        expected = sum(o.square().mean() for o in run(oracle, as_it_was)[:3])
        end.copy_(end.roll(3))  # before backward
        for of_model, of_loss in ((model, loss), (oracle, expected)):
            of_model.zero_grad()
            of_loss.backward()
        for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
            if theirs.grad is not None:
                assert relative_error(ours.grad, theirs.grad, 1e-3) < 1e-7
