"""An order of a graph's nodes that does not depend on how they are numbered."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS_AT_ONCE = 1 << 21  # pairs of nodes, over all choices tried together: bounds the memory


def clusters(values: Tensor, gap: Tensor) -> Tensor:
    """Number values that lie together: sorted neighbours within `gap` have the same number.

    Args:
        values: (B, K).
        gap: (B,).

    Returns:
        (B, K) int64, ascending with the value, from 0 in every row.
    """
    ordered, order = values.sort(dim=1, stable=True)
    steps = (ordered.diff(dim=1) > gap[:, None]).to(torch.int64)
    numbers = torch.nn.functional.pad(steps.cumsum(dim=1), (1, 0))
    return torch.empty_like(numbers).scatter_(1, order, numbers)


def canonical_order(codes: Tensor, sizes: Tensor) -> Tensor:
    """Order the nodes of graphs by their place in the graph.

    Colours are refined by the multiset of (edge, neighbour's colour) of every node; where nodes
    still share a colour, one of those whose choice leads to the largest refined colouring goes
    first, and refinement goes on.

    Args:
        codes: (B, n, n) int64 kind of the pair (i, j), symmetric; the diagonal is the node's kind.
        sizes: (B,) nodes of each graph, up to n.

    Returns:
        (B, n) int64, the nodes in order; what lies beyond a graph's size comes last.

    Notes:
        Renumbering the nodes renumbers the order, up to an automorphism of the graph, wherever
        nodes that refinement cannot tell apart are equivalent. That holds for molecules; strongly
        regular graphs are the classical exception. Integers only, deterministic. O(B n²) per round
        of refinement, with up to n rounds for each node that has to be chosen among others than
        its twins, O(B n⁴) for rings.
    """
    n = codes.shape[1]
    inside = torch.arange(n, device=codes.device) < sizes[:, None]
    nodes = codes.diagonal(dim1=1, dim2=2)
    colours = _ranks(torch.where(inside, nodes, torch.iinfo(torch.int64).max))
    # 0 marks what lies beyond a graph's size: no code is mixed to it
    edges = torch.where(inside[:, :, None] & inside[:, None, :], _mixed(codes), 0)
    colours = _refined(colours, edges)
    while True:
        shared = inside & (_count(colours, inside).gather(1, colours) > 1)
        colours, shared = _without_twins(colours, edges, shared)
        open_graphs = shared.any(dim=1).nonzero().flatten()
        if len(open_graphs) == 0:
            break
        colours[open_graphs] = _individualised(
            colours[open_graphs], edges[open_graphs], shared[open_graphs]
        )
    return colours.argsort(dim=1, stable=True)


def _count(colours: Tensor, chosen: Tensor) -> Tensor:
    """(B, n): how many of the chosen nodes have each colour."""
    return torch.zeros_like(colours).scatter_add_(1, colours, chosen.long())


def _without_twins(colours: Tensor, edges: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """Tell apart, by their numbers, twins before all other nodes that share a colour.

    Twins are nodes whose exchange changes no edge: hydrogens of one carbon. A colour of nothing but
    twins is alike for every other colour's nodes, so that choosing among them refines nothing.
    Being twins is transitive: each is compared with the first of its colour.
    """
    if not shared.any():
        return colours, shared
    batch, n = colours.shape
    number = torch.arange(n, device=colours.device).expand(batch, n)
    first = torch.full_like(colours, n).scatter_reduce(1, colours, number, "amin")
    first = first.gather(1, colours).clamp_max(n - 1)
    alike = edges == edges.gather(1, first[:, :, None].expand(batch, n, n))
    alike |= (number[:, None, :] == first[:, :, None]) | torch.eye(n, device=edges.device).bool()
    others = shared & ~alike.all(dim=2)
    is_open = shared & (_count(colours, others).gather(1, colours) > 0)
    before = torch.where(is_open, colours, n).amin(dim=1, keepdim=True)
    twins = shared & (colours < before)
    earlier = (colours[:, None, :] == colours[:, :, None]).tril(-1).sum(dim=2)
    return torch.where(twins, colours + earlier, colours), shared & ~twins


def _individualised(colours: Tensor, edges: Tensor, shared: Tensor) -> Tensor:
    """Put one node of the first shared colour before the others of it, and refine."""
    n = colours.shape[1]
    target = torch.where(shared, colours, n).amin(dim=1)
    graph, node = (colours == target[:, None]).nonzero(as_tuple=True)
    at_once = max(1, PAIRS_AT_ONCE // n**2)
    tried = [
        _tried(colours[g], edges[g], v)
        for g, v in zip(graph.split(at_once), node.split(at_once), strict=True)
    ]
    trial, certificate = (torch.cat(parts) for parts in zip(*tried, strict=True))
    best = torch.full_like(target, torch.iinfo(torch.int64).min)
    best = best.scatter_reduce(0, graph, certificate, "amax")
    is_best = certificate == best[graph]
    position = torch.arange(len(graph), device=graph.device)
    chosen = torch.full_like(target, len(graph)).scatter_reduce(
        0, graph[is_best], position[is_best], "amin"
    )
    return trial[chosen]


def _tried(colours: Tensor, edges: Tensor, node: Tensor) -> tuple[Tensor, Tensor]:
    """Refined colours with one node of each graph before its equals, and a number that says how
    colours are then joined by edges, whatever the numbering of nodes.
    """
    trial = 2 * colours
    trial[torch.arange(len(node), device=node.device), node] -= 1
    trial = _refined(_ranks(trial), edges)
    pairs = edges ^ _mixed(trial)[:, :, None] ^ (_mixed(~trial)[:, None, :] << 1)
    return trial, torch.where(edges != 0, _mixed(pairs), 0).sum(dim=(1, 2))


def _refined(colours: Tensor, edges: Tensor) -> Tensor:
    """Refine until the number of colours stays."""
    count = _num_colours(colours)
    while True:
        joined = _mixed(edges ^ _mixed(colours)[:, None, :])
        neighbours = torch.where(edges != 0, joined, 0).sum(dim=2)
        colours = _ranks_of_pairs(colours, neighbours)
        refined = _num_colours(colours)
        if torch.equal(refined, count):
            return colours
        count = refined


def _num_colours(colours: Tensor) -> Tensor:
    return (colours.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1)


def _ranks(values: Tensor) -> Tensor:
    """(B, n): how many values of the row are smaller."""
    return (values[:, None, :] < values[:, :, None]).sum(dim=2)


def _ranks_of_pairs(first: Tensor, second: Tensor) -> Tensor:
    """The ranks of pairs in lexicographic order."""
    is_less = second[:, None, :] < second[:, :, None]
    same = first[:, None, :] == first[:, :, None]
    return (is_less & same | (first[:, None, :] < first[:, :, None])).sum(dim=2)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers that scatters them (the finaliser of splitmix64)."""
    x = x + -7046029254386353131
    x.bitwise_xor_(_shifted(x, 30)).mul_(-4658895280553007687)
    x.bitwise_xor_(_shifted(x, 27)).mul_(-7723592293110705685)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)
