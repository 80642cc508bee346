"""U1 and C1 are the reference in values and gradients; U0 is the published algorithm, by its
cost.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks import inputs
from benchmarks.agreement import TOLERANCES, compare
from benchmarks.baselines import c1, u1
from benchmarks.operations import make_task
from benchmarks.registry import Row
from benchmarks.timing import count_operations
from gfnode_fast import reference
from golden_files import NAMES, load_golden

CPU = torch.device("cpu")
FIXED_STEP = ("euler", "midpoint", "rk4")
ADAPTIVE = [name for name in NAMES if name.endswith("f64") and name.split(".")[0] not in FIXED_STEP]


def run(model: nn.Module, name: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Outputs, gradients and right-hand side evaluations on a golden file's inputs."""
    golden = load_golden(name)
    model = model.double()
    model.load_state_dict(golden.group("param"))
    given = golden.inputs()
    leaves = dict(model.named_parameters())
    for key in golden.group("grad_input"):
        leaves[key] = given[key].requires_grad_()
    counts = {"freq_conv": 0, "freq_conv_x": 0}
    for part in counts:

        def count(*_: object, part: str = part) -> None:
            counts[part] += 1

        getattr(model, part).t_conv.ode_func.register_forward_pre_hook(count)
    torch.manual_seed(golden.config["forward_seed"])
    outputs = dict(zip(("x", "v", "h", "kld"), model(**given), strict=True))
    cotangents = golden.group("cotangent")
    sum((outputs[k] * cotangents[k]).sum() for k in ("x", "v", "h")).backward()
    values = {f"output {k}": out.detach() for k, out in outputs.items()}
    for key, leaf in leaves.items():
        grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        values[f"grad {key}"] = grad.detach().clone()
    return values, counts


@pytest.mark.parametrize("name", ADAPTIVE)
def test_u1_is_u0(name: str) -> None:
    config = load_golden(name).constructor()
    expected, expected_counts = run(reference.FourierMD(**config), name)
    actual, counts = run(u1.FourierMD(**config), name)
    assert counts == expected_counts
    errors = compare(actual, expected)
    # Measured: outputs 0, gradients 1.3e-15.
    assert errors["outputs"] < TOLERANCES["fp64"][0]
    assert errors["gradients"] < TOLERANCES["fp64"][1]


def test_u1_refuses_fixed_steps() -> None:
    row = Row("model", "forward", 2, molecule="ethanol")
    model = u1.FourierMD(**inputs.model_config(row) | {"solver": "rk4"})
    batch = inputs.make_batch(row, CPU)
    with pytest.raises(NotImplementedError, match="rk4"):
        model(**batch.inputs())


@pytest.mark.parametrize(
    "model", ["egnn", pytest.param("sage_attention_concat", marks=pytest.mark.slow)]
)
def test_c1_computes_what_u1_does(model: str) -> None:
    """As traced; the bench itself checks what the compiler made of it before timing."""
    row = Row("model", "backward", 2, model=model, molecule="ethanol", precision="fp64")
    with c1.compiler("eager"):
        actual = make_task("C1", row, CPU).values()
    errors = compare(actual, make_task("U1", row, CPU).values())
    # Measured: outputs 1e-15, gradients 1e-13.
    assert errors["outputs"] < 1e-12
    assert errors["gradients"] < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("op", ["decoder", "solve"])
def test_c1_compiled_has_every_gradient(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients in positions too, which inductor's default fusion loses in EGNN layers.

    The encoder's layers are the decoder's, the vectors' solve is the features'; three stages
    generate the code of six in half the time.
    """
    published = inputs.model_config
    monkeypatch.setattr(inputs, "model_config", lambda row: published(row) | {"solver": "bosh3"})
    row = Row(op, "backward", 2, molecule="ethanol")
    actual = make_task("C1", row, CPU).values()
    errors = compare(actual, make_task("U1", row, CPU).values())
    assert errors["outputs"] < TOLERANCES["fp32"][0]
    assert errors["gradients"] < TOLERANCES["fp32"][1]


@pytest.mark.parametrize("batch", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_u0_dispatches_what_the_published_model_does(batch: int) -> None:
    """About 137 operations per united time of a training step; 58 500 in all at B = 50."""
    irregular, regular = (
        Row("model", "step", batch, times=times) for times in ("irregular", "regular")
    )
    counts, unions = [], []
    for row in (irregular, regular):
        task = make_task("U0", row, CPU)
        task.run()
        counts.append(count_operations(task.run))
        unions.append(inputs.union_size(inputs.make_batch(row, CPU)))
    assert unions[1] == inputs.NUM_TIMES
    assert 110 <= (counts[0] - counts[1]) / (unions[0] - unions[1]) <= 145
    assert 5_000 <= counts[1] <= 7_500
