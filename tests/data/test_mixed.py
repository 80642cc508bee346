"""`MixedDataset`: the values of each molecule's own data set, side by side."""

import importlib

import numpy as np
import pytest
import torch

from data_builders import make_trajectory
from gfnode_fast import GFNODE, FourierMD
from gfnode_fast.data import MixedDataset, WindowDataset, build_graph, draw_windows
from gfnode_fast.ops import graph_fourier_torch as on_torch
from gfnode_fast.ops.topology import topology
from model_inputs import constructor
from op_checks import relative_error

# The package `ops` has the function under the name of its module.
topology_module = importlib.import_module("gfnode_fast.ops.topology")

T, HORIZON, F64 = 3, 40, torch.float64
CHAIN = [6, 6, 8, 7, 6]


def part(numbers=None, *, size=6, dtype=F64, largest=8, num_timesteps=T):
    trajectory = make_trajectory(400, **({} if numbers is None else {"numbers": numbers}))
    graph = build_graph(trajectory.positions[0], trajectory.numbers)
    windows = draw_windows(
        trajectory, num_timesteps=num_timesteps, delta_frame=HORIZON, sizes=(size, 2, 2), seed=0
    )["train"]
    return WindowDataset(trajectory, graph, windows, dtype=dtype, largest_number=largest)


@pytest.fixture(scope="module")
def parts():
    return [part(), part(CHAIN, size=4), part([6, 6, 8])]


def own(parts, batch):
    """(molecule, sample number within it) of each sample of a batch."""
    first = np.cumsum([0, *map(len, parts)])
    kind = np.searchsorted(first, batch.samples.numpy(), side="right") - 1
    return [(k, int(i) - first[k]) for k, i in zip(kind, batch.samples.numpy(), strict=True)]


def test_a_mixed_batch_has_each_molecules_values(parts):
    index = torch.tensor([15, 3, 9, 0, 6, 3, 12])
    batch = MixedDataset(parts).batch(index)
    assert torch.equal(batch.samples, torch.tensor([3, 0, 3, 9, 6, 15, 12]))
    edges = batch.edge_index
    assert torch.equal(edges.row, edges.row.sort().values)
    first_edge = first_entry = 0
    for b, (k, i) in enumerate(own(parts, batch)):
        alone = parts[k].batch(torch.tensor([i]))
        atoms = slice(int(batch.ptr[b]), int(batch.ptr[b + 1]))
        for name in ("x", "v", "h"):
            assert torch.equal(getattr(batch, name)[atoms], getattr(alone, name)), name
        assert torch.equal(batch.target[:, atoms].flatten(0, 1), alone.target)
        assert torch.equal(batch.timeframes[b], alone.timeframes[0])
        here = slice(first_edge, first_edge + parts[k].num_edges)
        assert torch.equal(edges.row[here] - batch.ptr[b], alone.edge_index[0])
        assert torch.equal(edges.col[here] - batch.ptr[b], alone.edge_index[1])
        assert torch.equal(batch.edge_fea[here], alone.edge_fea)
        entries = slice(first_entry, first_entry + parts[k].num_atoms ** 2)
        assert torch.equal(batch.eigvecs[entries], alone.U_batch.flatten())
        first_edge, first_entry = here.stop, entries.stop
    assert (first_edge, first_entry) == (len(edges.row), len(batch.eigvecs))
    built = topology(edges.row, edges.col, len(batch.x))
    for name in ("order", "row", "col", "row_start"):
        assert torch.equal(getattr(edges, name), getattr(built, name)), name
    assert torch.equal(edges.unsorted[0], edges.row)
    assert batch.membership.sum(dim=1).tolist() == [3, 2, 2]


@pytest.mark.parametrize(
    ("mode", "bound"), [("exact", 1e-11), ("per_molecule", 1e-11), ("joint", 1e-6)]
)
def test_loss_and_gradients_are_the_sum_of_fouriermds(parts, mode, bound):
    """Joint steps follow from the whole batch, so that they agree within the tolerance only."""
    changes = {"num_timesteps": T, "delta_frame": HORIZON, "rtol": 1e-8, "atol": 1e-9}
    changes |= {"in_node_nf": 2, "in_edge_nf": 5, "solver_mode": mode}
    torch.manual_seed(0)
    arguments = constructor(**changes)
    del arguments["num_atoms"]
    mixed = GFNODE(**arguments).to(F64)
    batch = MixedDataset(parts).batch(torch.tensor([15, 3, 9, 0, 6, 3, 12]))
    predicted = mixed(**batch.inputs())[0]
    loss = batch.loss(predicted)
    grads = torch.autograd.grad(loss, list(mixed.parameters()), materialize_grads=True)
    total, expected = 0.0, [torch.zeros_like(p) for p in mixed.parameters()]
    sums = torch.zeros(len(parts), 2, dtype=F64)
    for k, dataset in enumerate(parts):
        mine = torch.tensor([i for kind, i in own(parts, batch) if kind == k])
        one = FourierMD(**constructor(**changes | {"num_atoms": dataset.num_atoms})).to(F64)
        one.load_state_dict(mixed.state_dict())
        alone = dataset.batch(mine)
        answer = one(**alone.inputs())[0]
        share = alone.loss(answer) * len(mine) / len(batch.samples)
        total += float(share.detach())
        sums[k] = alone.error_sums(answer)[0].detach()
        parameters = list(one.parameters())
        for grad, own_grad in zip(
            expected, torch.autograd.grad(share, parameters, materialize_grads=True), strict=True
        ):
            grad += own_grad
    assert float(loss.detach()) == pytest.approx(total, rel=bound)
    assert relative_error(batch.error_sums(predicted.detach()), sums) < bound
    for (name, _), grad, right in zip(mixed.named_parameters(), grads, expected, strict=True):
        assert relative_error(grad, right) < bound or float(right.norm()) < 1e-12, name


def test_nothing_is_read_from_the_device(parts):
    """Tensors on torch's meta device have no values to read; sizes are known on the host."""
    batch = MixedDataset([dataset.to("meta") for dataset in parts]).batch(torch.tensor([15, 3, 9]))
    predicted = torch.zeros_like(batch.target).requires_grad_()
    batch.loss(predicted).backward()
    assert batch.error_sums(predicted).shape == (3, 2)
    modes = on_torch.project_ragged(batch.x, batch.eigvecs, 2, batch.ptr)
    added = batch.x, None, "silu", batch.ptr
    out = on_torch.synthesise_ragged(modes[None], batch.eigvecs, *added, len(batch.x))
    assert out.shape == (1, *batch.x.shape)
    grad, _ = on_torch.synthesise_ragged_bwd(
        out, modes[None], batch.eigvecs, "silu", batch.ptr, False
    )
    assert grad.shape == (1, *modes.shape)


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(parts):
    index = torch.tensor([15, 3, 9, 0])
    expected = MixedDataset(parts).batch(index)
    dataset = MixedDataset([dataset.to("cuda") for dataset in parts])
    dataset.batch(index)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = dataset.batch(index)
        loss = batch.loss(batch.target + 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in ("x", "h", "v", "edge_fea", "eigvecs", "target", "ptr"):
        torch.testing.assert_close(getattr(batch, name).cpu(), getattr(expected, name), msg=name)
    assert torch.equal(batch.edge_index.row_start.cpu(), expected.edge_index.row_start)
    assert float(loss) == pytest.approx(1.0)


def test_random_mixes_leave_the_cache_of_topologies_alone(parts):
    arguments = constructor(num_timesteps=T, delta_frame=HORIZON, in_node_nf=2, in_edge_nf=5)
    del arguments["num_atoms"]
    model = GFNODE(**arguments).to(F64)
    dataset = MixedDataset(parts)
    topology_module._cache.clear()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            index = torch.randint(len(dataset), (3,), generator=generator)
            model(**dataset.batch(index).inputs())
    assert len(topology_module._cache) == 0
    for nodes in range(3, 40):
        topology(torch.arange(nodes), torch.arange(nodes), nodes)
    assert len(topology_module._cache) == topology_module.MAX_CACHED


def test_an_element_has_one_feature_in_all_molecules(parts):
    carbons = {float(part(numbers, largest=8)._charge[0]) for numbers in (None, [6, 6, 6])}
    assert carbons == {0.75}
    with pytest.raises(ValueError, match="`largest_number` must be at least the molecule's 8"):
        part(largest=7)


@pytest.mark.parametrize(
    ("index", "error", "text"),
    [
        (torch.tensor([0], dtype=torch.int32), TypeError, "`index` must be an int64"),
        (torch.zeros(0, dtype=torch.int64), ValueError, "B > 0"),
        (torch.tensor([0], device="meta"), ValueError, "`index` must be on cpu"),
        (torch.tensor([16]), IndexError, "must be in 0 … 15, got 16 to 16"),
        (torch.tensor([3, -1]), IndexError, "must be in 0 … 15, got -1 to 3"),
    ],
)
def test_other_indices_are_refused(parts, index, error, text):
    with pytest.raises(error, match=text):
        MixedDataset(parts).batch(index)


def test_parts_must_be_alike(parts):
    for others in ([], [parts[0], part(CHAIN, dtype=torch.float32)], [part(num_timesteps=2)]):
        with pytest.raises(ValueError, match="`parts` must be data sets of one dtype"):
            MixedDataset([*others, *parts[:1]] if others else [])
