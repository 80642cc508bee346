"""capture_training_step: the plain step on the CPU, the same step replayed on a GPU."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gfnode_fast
from foreign_model import ForeignMD
from gfnode_fast import capture_training_step
from gfnode_fast.nn.capture import why_not_capturable
from gfnode_fast.nn.static_optimizer import Snapshot, StaticOptimizer
from golden_files import relative_error
from model_inputs import constructor, inputs

NUM_ROWS = 4 * 2 * 5
GPU_BOUND = 1e-6  # the same kernels, replayed; atomics in none of them


def loss_fn(outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
    return F.mse_loss(outputs[0], target)


def build(**changes: Any) -> gfnode_fast.FourierMD:
    torch.manual_seed(0)
    return gfnode_fast.FourierMD(**constructor(**changes))


def batches(count: int, device: str = "cpu") -> list[tuple[dict[str, Any], Tensor]]:
    """Inputs and targets of several steps."""
    made = []
    for seed in range(count):
        given = inputs(seed=seed)
        given["edge_index"] = tuple(end.to(device) for end in given["edge_index"])
        given = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in given.items()}
        generator = torch.Generator().manual_seed(seed)
        made.append((given, torch.randn(NUM_ROWS, 3, generator=generator).to(device)))
    return made


def plain_losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[tuple[dict[str, Any], Tensor]]
) -> list[float]:
    losses = []
    for given, target in steps:
        optimizer.zero_grad()
        loss = loss_fn(model(**given), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def capture(model: nn.Module, optimizer: torch.optim.Optimizer, device: str = "cpu") -> Any:
    given, target = batches(1, device)[0]
    return capture_training_step(model, optimizer, loss_fn=loss_fn, inputs=given, targets=(target,))


def assert_same_parameters(a: nn.Module, b: nn.Module, bound: float = 0.0) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert relative_error(p, q) <= bound


def test_on_the_cpu_it_is_the_plain_step() -> None:
    model, plain = build(), build()
    step = capture(model, torch.optim.Adam(model.parameters(), lr=1e-3))
    expected = plain_losses(plain, torch.optim.Adam(plain.parameters(), lr=1e-3), batches(3))
    assert not step.is_captured
    assert_same_parameters(build(), model)  # capturing alone changed nothing
    assert [step(*batch).loss.item() for batch in batches(3)] == expected
    assert_same_parameters(model, plain)


def test_an_update_of_ones_own_takes_the_place_of_the_optimizers() -> None:
    model, plain = build(), build()
    losses: list[Tensor] = []

    def update(loss: Tensor) -> None:
        losses.append(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given, target = batches(1)[0]
    step = capture_training_step(
        model, optimizer, loss_fn=loss_fn, inputs=given, targets=(target,), update=update
    )
    assert step(given, target).loss.item() == losses[0].item()
    loss_fn(plain(**given), target).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_same_parameters(model, plain)


def test_outputs_are_copies() -> None:
    model = build()
    step = capture(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first = step(*batches(1)[0])
    kept = [first.loss.clone(), *(o.clone() for o in first.outputs)]
    step(*batches(2)[1])
    assert all(torch.equal(a, b) for a, b in zip([first.loss, *first.outputs], kept, strict=True))
    assert not any(o.requires_grad for o in first.outputs)


def test_accelerated_models_and_inputs_that_are_none() -> None:
    model = gfnode_fast.accelerate(ForeignMD(**constructor()))
    assert torch.isfinite(capture(model, torch.optim.Adam(model.parameters()))(*batches(1)[0]).loss)
    linear = build(fourier_basis="linear")
    given, target = batches(1)[0]
    given["U_batch"] = None
    step = capture_training_step(
        linear,
        torch.optim.Adam(linear.parameters()),
        loss_fn=loss_fn,
        inputs=given,
        targets=(target,),
    )
    assert torch.isfinite(step(given, target).loss)


def test_edges_must_be_tensors() -> None:
    model, (given, target) = build(), batches(1)[0]
    given["edge_index"] = gfnode_fast.ops.topology(*given["edge_index"], 10)
    with pytest.raises(TypeError, match="`edge_index` must be a tensor.* got Topology; pass edges"):
        capture_training_step(
            model,
            torch.optim.Adam(model.parameters()),
            loss_fn=loss_fn,
            inputs=given,
            targets=(target,),
        )


def test_inputs_must_be_like_the_example() -> None:
    model = build()
    step = capture(model, torch.optim.Adam(model.parameters()))
    given, target = batches(1)[0]
    with pytest.raises(ValueError, match=r"`x` must be \(10, 3\) as captured, got \(5, 3\)"):
        step(given | {"x": given["x"][:5]}, target)
    with pytest.raises(TypeError, match=r"`v` must be torch.float32 as captured"):
        step(given | {"v": given["v"].double()}, target)
    with pytest.raises(ValueError, match="`inputs` must be"):
        step({"x": given["x"]}, target)
    with pytest.raises(ValueError, match="`targets` must be 1 tensor"):
        step(given)


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({}, "joint"),
        ({"solver_mode": "exact"}, "exact"),
        ({"solver_mode": "per_molecule"}, "per_molecule"),
        ({"solver": "rk4", "solver_mode": gfnode_fast.solvers.fixed(0.1)}, "fixed(0.1)"),
        ({"backend": "reference"}, "reference"),
    ],
    ids=str,
)
def test_what_reads_on_the_host_cannot_be_captured(changes: dict[str, Any], reads: str) -> None:
    problem = why_not_capturable(build(**changes))
    assert problem is not None
    assert reads in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "triton"},
        {"backend": "triton", "solver_mode": "exact", "time_mode": "concat"},
        {"no_ode": True},
        {"propagate_x": False, "propagate_h": False},
    ],
    ids=str,
)
def test_what_can_be_captured(changes: dict[str, Any]) -> None:
    assert why_not_capturable(build(**changes)) is None


def test_refusals() -> None:
    foreign = ForeignMD(**constructor())
    with pytest.raises(TypeError, match=r"call gfnode_fast.accelerate\(model\)"):
        capture(foreign, torch.optim.Adam(foreign.parameters()))
    model = build()
    with pytest.raises(ValueError, match="`warmup` must be at least 1"):
        capture_training_step(
            model, torch.optim.Adam(model.parameters()), loss_fn=loss_fn, inputs={}, warmup=0
        )


class TestStaticOptimizer:
    """The bookkeeping around a graph, which needs no GPU."""

    def made(self) -> tuple[nn.Linear, torch.optim.Adam, StaticOptimizer]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, foreach=False)
        static = StaticOptimizer(optimizer)
        self.update(model, optimizer)
        static.freeze()
        return model, optimizer, static

    def update(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.ones(2)).square().sum().backward()
        optimizer.step()

    def test_assigned_rate_is_written_into_the_tensor(self) -> None:
        _, optimizer, static = self.made()
        (rate,) = static.rates
        optimizer.param_groups[0]["lr"] = 0.01
        static.gather()
        assert optimizer.param_groups[0]["lr"] is rate
        assert rate.item() == pytest.approx(0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        optimizer.step()
        scheduler.step()
        static.gather()
        assert rate.item() == pytest.approx(0.005)

    def test_an_assigned_number_is_not_copied_from_the_host(self) -> None:
        class Copies(TorchDispatchMode):
            seen: ClassVar[list[str]] = []

            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                self.seen.append(str(func))
                return func(*args, **(kwargs or {}))

        _, optimizer, static = self.made()
        optimizer.param_groups[0]["lr"] = 0.01
        with Copies():
            static.gather()
        assert [name for name in Copies.seen if "fill_" in name]
        assert not [name for name in Copies.seen if "copy" in name]

    def test_loaded_state_is_written_into_the_tensors(self) -> None:
        model, optimizer, static = self.made()
        held = static.state[0]["exp_avg"]
        saved = copy.deepcopy(optimizer.state_dict())
        self.update(model, optimizer)
        optimizer.load_state_dict(saved)
        assert optimizer.state[model.weight]["exp_avg"] is not held
        static.gather()
        assert optimizer.state[model.weight]["exp_avg"] is held
        assert torch.equal(held, saved["state"][0]["exp_avg"])
        optimizer.state.clear()
        static.gather()
        assert held.abs().sum() == 0

    def test_what_the_graph_cannot_follow_is_refused(self) -> None:
        model, optimizer, static = self.made()
        static.gather()
        optimizer.param_groups[0]["weight_decay"] = 0.1
        with pytest.raises(RuntimeError, match="of weight_decay 0, got 0.1 since; capture again"):
            static.gather()
        optimizer.param_groups[0]["weight_decay"] = 0
        model.weight.data = model.weight.data.clone()
        with pytest.raises(RuntimeError, match="`model` must be the parameters that were"):
            static.gather()

    @pytest.mark.parametrize("has_state", [False, True])
    def test_warming_up_is_undone(self, has_state: bool) -> None:
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        if has_state:
            self.update(model, optimizer)
        twin = copy.deepcopy(model)
        twin_optimizer = torch.optim.Adam(twin.parameters(), lr=0.1)
        twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = Snapshot(optimizer)
        for _ in range(3):
            self.update(model, optimizer)
        before.put_back()
        assert_same_parameters(model, twin)
        for m, o in ((model, optimizer), (twin, twin_optimizer)):
            self.update(m, o)
        assert_same_parameters(model, twin)


@pytest.mark.gpu
class TestReplay:
    def made(
        self, lr: float = 1e-3, **changes: Any
    ) -> tuple[gfnode_fast.FourierMD, torch.optim.Adam]:
        model = build(backend="triton", **changes).cuda()
        return model, torch.optim.Adam(model.parameters(), lr=lr, capturable=True, fused=True)

    @pytest.mark.parametrize("solver_mode", ["joint", "exact"])
    def test_replays_are_plain_steps(self, solver_mode: str) -> None:
        model, optimizer = self.made(solver_mode=solver_mode)
        plain, plain_optimizer = self.made(solver_mode=solver_mode)
        step = capture(model, optimizer, "cuda")
        assert step.is_captured
        expected = plain_losses(plain, plain_optimizer, batches(4, "cuda"))
        for (given, target), loss in zip(batches(4, "cuda"), expected, strict=True):
            assert step(given, target).loss.item() == pytest.approx(loss, rel=GPU_BOUND)
        assert_same_parameters(model, plain, GPU_BOUND)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)

    def test_outputs_are_copies(self) -> None:
        step = capture(*self.made(), "cuda")
        first = step(*batches(1, "cuda")[0])
        kept = first.outputs[0].clone()
        step(*batches(2, "cuda")[1])
        assert torch.equal(first.outputs[0], kept)

    @pytest.mark.parametrize("set_to_none", [True, False])
    def test_zero_grad_and_rate(self, set_to_none: bool) -> None:
        model, optimizer = self.made()
        plain, plain_optimizer = self.made()
        step = capture(model, optimizer, "cuda")
        for index, batch in enumerate(batches(4, "cuda")):
            rate = 1e-3 / (index + 1)
            optimizer.zero_grad(set_to_none=set_to_none)
            optimizer.param_groups[0]["lr"] = plain_optimizer.param_groups[0]["lr"] = rate
            step(*batch)
            plain_losses(plain, plain_optimizer, [batch])
        assert_same_parameters(model, plain, GPU_BOUND)

    def test_checkpoints_resume_exactly(self) -> None:
        model, optimizer = self.made()
        step = capture(model, optimizer, "cuda")
        for batch in batches(2, "cuda"):
            step(*batch)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        expected = [step(*batch).loss.item() for batch in batches(4, "cuda")[2:]]
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        assert [step(*batch).loss.item() for batch in batches(4, "cuda")[2:]] == expected
        other, other_optimizer = self.made()
        other.load_state_dict(saved[0])
        other_optimizer.load_state_dict(saved[1])
        step = capture(other, other_optimizer, "cuda")
        assert [step(*batch).loss.item() for batch in batches(4, "cuda")[2:]] == expected

    def test_refusals(self) -> None:
        model, _ = self.made()
        with pytest.raises(ValueError, match="capturable=True"):
            capture(model, torch.optim.Adam(model.parameters()), "cuda")
        with pytest.raises(TypeError, match="Adam or AdamW"):
            capture(model, torch.optim.SGD(model.parameters(), lr=0.1), "cuda")
        host = build(backend="torch").cuda()
        optimizer = torch.optim.Adam(host.parameters(), capturable=True)
        with pytest.raises(ValueError, match="decide nothing on the host"):
            capture(host, optimizer, "cuda")
