"""accelerate() and restore(): somebody else's model, our arithmetic, their parameters."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gfnode_fast
from foreign_model import ForeignMD
from gfnode_fast import accelerate, reference, restore
from golden_files import relative_error
from model_inputs import constructor, inputs

DOUBLE = torch.float64


def foreign(**changes: Any) -> ForeignMD:
    torch.manual_seed(0)
    return ForeignMD(**constructor(**changes))


def published(**changes: Any) -> reference.FourierMD:
    torch.manual_seed(0)
    return reference.FourierMD(**constructor(**changes))


def outcome(model: nn.Module, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Outputs and every gradient."""
    model.zero_grad()
    leaves = {k: given[k].clone().requires_grad_() for k in ("x", "v", "h", "edge_fea", "U_batch")}
    outputs = model(**(given | leaves))
    torch.stack([o.square().mean() for o in outputs[:3]]).sum().backward()
    named = dict(model.named_parameters()) | leaves
    gradients = {f"grad {k}": t.grad.clone() for k, t in named.items() if t.grad is not None}
    return dict(zip("xvhk", (o.detach() for o in outputs), strict=True)) | gradients


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(g.norm().item() for k, g in expected.items() if k.startswith("grad"))
    for name, value in expected.items():  # measured: 2e-14
        bound = floor if name.startswith("grad") else 0.0
        assert relative_error(actual[name], value, bound) < 1e-9, name


@pytest.mark.parametrize("make", [foreign, published])
def test_values_and_every_gradient(make: Callable[..., nn.Module]) -> None:
    model, given = make().double(), inputs(dtype=DOUBLE)
    slow = outcome(model, given)
    assert accelerate(model) is model
    assert_same(outcome(model, given), slow)
    assert model.forward.last_solve["freq_conv"].accepted > 0
    assert restore(model) is model
    assert "forward" not in vars(model)
    assert all(torch.equal(v, slow[k]) for k, v in outcome(model, given).items())


@pytest.mark.parametrize(
    "changes",
    [
        {"gnn_ablation_mode": "sage", "flat": True, "time_mode": "mlp"},
        {"gnn_ablation_mode": "gcn", "mode_interaction": "concat", "time_mode": "concat"},
        {"mode_interaction": "attention", "norm": True, "solver": "bosh3"},
        {"fourier_basis": "linear", "propagate_x": False},
        {"fourier_basis": None, "no_fourier": True, "num_modes": 5},
        {"no_ode": True, "activation": nn.Tanh()},
        {"use_vae": True, "time_mode": "rope", "rtol": 1e-1, "atol": 1e-1},
    ],
    ids=str,
)
def test_what_shapes_and_attributes_tell(changes: dict[str, Any]) -> None:
    model, given = published(**changes).double(), inputs(dtype=DOUBLE)
    torch.manual_seed(1)
    slow = outcome(model, given)
    accelerate(model)
    torch.manual_seed(1)
    assert_same(outcome(model, given), slow)


def test_same_parameters_class_keys_and_random_state() -> None:
    model = foreign()
    before = dict(model.named_parameters())
    keys, state = list(model.state_dict()), torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is ForeignMD
    assert list(model.state_dict()) == keys
    assert all(p is before[name] for name, p in model.named_parameters())
    shared = dict(model.forward.fast.named_parameters())
    assert all(shared[name] is p for name, p in before.items())


def test_optimizer_state_survives() -> None:
    """Steps on either side of accelerate and restore are the steps without them."""
    given = inputs(dtype=DOUBLE)

    def train(switches: bool) -> nn.Module:
        model = foreign().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(6):
            if switches and step == 2:
                accelerate(model)
            if switches and step == 4:
                restore(model)
            optimizer.zero_grad()
            model(**given)[0].square().mean().backward()
            optimizer.step()
        return model

    plain, switched = train(False), train(True)
    for a, b in zip(plain.parameters(), switched.parameters(), strict=True):
        assert relative_error(b, a, 1e-3) < 1e-6  # Adam divides small gradients by themselves


def test_hooks_and_modes_and_state() -> None:
    model, seen = foreign(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    accelerate(model)
    model.eval()(**inputs())
    assert seen == [1]
    assert not model.forward.fast.training
    other = foreign()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    model.load_state_dict(other.state_dict())
    assert relative_error(model(**inputs())[0], other(**inputs())[0]) < 1e-5
    model.load_state_dict(foreign().state_dict(), assign=True)
    assert relative_error(model(**inputs())[0], foreign()(**inputs())[0]) < 1e-5
    model.double()
    assert model(**inputs(dtype=DOUBLE))[0].dtype == DOUBLE


def test_functional_call() -> None:
    model = accelerate(foreign())
    doubled = {name: 2 * p for name, p in model.named_parameters()}
    expected = foreign()
    expected.load_state_dict(doubled)
    actual = torch.func.functional_call(model, doubled, (), inputs())[0]
    assert relative_error(actual, expected(**inputs())[0]) < 1e-5


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_share_nothing_and_compute(how: str) -> None:
    model = accelerate(foreign())
    expected = model(**inputs())[0].detach()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.forward.model is other
    assert torch.equal(other(**inputs())[0], expected)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    assert not torch.equal(other(**inputs())[0], expected)
    assert torch.equal(model(**inputs())[0], expected)
    assert not torch.equal(restore(other)(**inputs())[0], expected)


def test_sizes_set_later() -> None:
    model = published(num_atoms=None)
    model.num_atoms = 5
    accelerate(model)
    model.num_atoms = 7
    assert model(**inputs(num_atoms=7))[0].shape == (4 * 2 * 7, 3)


def test_options_are_those_of_the_fast_model() -> None:
    model = accelerate(
        foreign(), backend="torch", solver_mode="exact", recompute=True, max_attempts=32
    )
    assert model.forward.fast.max_attempts == 32
    report = model.forward.backend_report()
    assert report.requested.backend == "torch"
    assert "exponentials" in report.parts["solve of features"].reason
    with pytest.raises(ValueError, match="`backend` must be one of"):
        accelerate(foreign(), backend="cuda")


def test_missing_attributes_may_be_given() -> None:
    model = foreign()
    del model.norm, model.solver
    with pytest.raises(ValueError, match="attributes norm, solver, got ForeignMD without"):
        accelerate(model)
    given = inputs()
    assert torch.isfinite(accelerate(model, norm=False, solver="dopri5")(**given)[0]).all()


def without(module: nn.Module, name: str) -> nn.Module:
    delattr(module, name)
    return module


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        (lambda: "model", {}, TypeError, "must be an nn.Module"),
        (lambda: gfnode_fast.FourierMD(**constructor()), {}, TypeError, "fast already"),
        (lambda: accelerate(foreign()), {}, ValueError, r"call restore\(model\)"),
        (lambda: nn.Linear(2, 2), {}, ValueError, "embedding.weight"),
        (lambda: without(foreign(), "freq_conv_x"), {}, ValueError, "freq_conv_x"),
        (lambda: nn.DataParallel(foreign()), {}, ValueError, "wrapper"),
        (foreign, {"hidden_nf": 8}, ValueError, "`hidden_nf` must be one of"),
        (lambda: published(time_mode="posenc"), {"time_mode": "mlp"}, ValueError, "time_mlp"),
    ],
)
def test_refusals(
    make: Callable[[], Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        accelerate(make(), **arguments)


def test_restore_of_a_plain_model_is_refused() -> None:
    with pytest.raises(ValueError, match="must be accelerated"):
        restore(foreign())


def test_replaced_module_is_noticed() -> None:
    model = accelerate(foreign())
    model.embedding = nn.Linear(2, 8)
    with pytest.raises(RuntimeError, match=r"`model.embedding` must be the module"):
        model(**inputs())
    assert torch.isfinite(accelerate(restore(model))(**inputs())[0]).all()


def test_data_parallel_wrapping(tmp_path: Path) -> None:
    """One process: gradients reach the parameters through DistributedDataParallel's hooks."""
    model, given = foreign().double(), inputs(dtype=DOUBLE)
    slow = outcome(model, given)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(accelerate(model))
        found = outcome(wrapped, given)
    finally:
        torch.distributed.destroy_process_group()
    assert_same({k.replace("grad module.", "grad "): v for k, v in found.items()}, slow)


def test_compiles_as_one_graph() -> None:
    model = accelerate(foreign())
    expected = model(**inputs())[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(**inputs())[0], expected) < 1e-5
    torch._dynamo.reset()


def test_changed_arguments_are_noticed() -> None:
    model = accelerate(foreign())
    model.propagate_x = False
    with pytest.raises(RuntimeError, match="`model.propagate_x` must be True"):
        model(**inputs())
    accelerate(restore(model))(**inputs())
