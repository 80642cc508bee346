"""`Topology`: order, cache, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gfnode_fast.ops.topology import MAX_CACHED, _cache, topology


def test_topology_is_sorted_stably_and_cached_by_content() -> None:
    row, col = torch.tensor([2, 0, 2, 1]), torch.tensor([0, 1, 1, 2])
    built = topology(row, col, 4)
    assert built.order.tolist() == [1, 3, 0, 2]
    assert built.row_start.tolist() == [0, 1, 2, 4, 4]
    assert topology(row.clone(), col.int(), 4) is built
    row[0] = 0  # in place: found by identity this would be stale
    changed = topology(row, col, 4)
    assert changed.row.tolist() == [0, 0, 1, 2]
    assert topology(row, col, 5) is not changed
    for extra in range(2 * MAX_CACHED):
        topology(row, col, 10 + extra)
    assert len(_cache) == MAX_CACHED


def test_a_topology_built_for_inference_serves_training() -> None:
    ends = torch.tensor([4, 1, 0]), torch.tensor([1, 0, 4])
    with torch.inference_mode():
        topology(*ends, 5).neighbours  # noqa: B018 - it is kept
    built = topology(*ends, 5)
    weight = torch.zeros(5, 1, requires_grad=True)
    for index in (built.row, built.col, built.neighbours.source_edge):
        weight.index_select(0, index).sum().backward()


@pytest.mark.parametrize(
    ("row", "col", "num_nodes", "error", "message"),
    [
        ([0.0], [0], 1, TypeError, "`row` must be torch.int64"),
        ([0], [0, 1], 2, ValueError, "`col` must be (E,)"),
        ([0], [2], 2, ValueError, "`col` must be between 0 and 1, got 2 ... 2"),
        ([-1], [0], 2, ValueError, "`row` must be between 0 and 1"),
        ([], [], -1, ValueError, "`num_nodes` must be at least 0"),
    ],
)
def test_messages_of_the_topology(
    row: list[Any], col: list[int], num_nodes: int, error: type[Exception], message: str
) -> None:
    rows = torch.tensor(row) if row else torch.zeros(0, dtype=torch.long)
    with pytest.raises(error) as caught:
        topology(rows, torch.tensor(col, dtype=torch.long), num_nodes)
    assert message in str(caught.value)
