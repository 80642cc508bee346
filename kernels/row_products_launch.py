"""Launchers of products node by node, and what the graph layers' launchers share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gfnode_fast.kernels.launch import MAX_GRID, ceil_div, dot_block, on_device_of
from gfnode_fast.kernels.registry import AotCase, unwrap
from gfnode_fast.kernels.row_products import _row_linear_kernel, _row_outer_kernel

BLOCK_C = 32  # divides 64 and 96
OUTER_BLOCK = 64
OUTER_BLOCK_R = 32  # 64 spills
SHARE_R = 64  # shares of rows are multiples of it
PER_MULTIPROCESSOR = 2  # programs with memory of their own
INTERPRETED_PROGRAMS = 2
BUFFER_BYTES = 64 << 20  # of what backward keeps by node and edge: copies are taken together to it
INDICES = ("order", "row_start", "row", "col", "source_start", "source_edge", "block_start")
MODES = {"fp32": "tf32x3", "tf32": "tf32", "bf16": "bf16", "fp64": "ieee"}
SPILLS = {"fp64": "for checking only"}


def mode(tensor: Tensor, precision: str) -> str:
    """What products are made of: see `feature_tiles`."""
    if tensor.dtype == torch.float64:
        return "ieee"
    if precision == "fp32":
        return "tf32x3"
    return f"{precision} emulated" if triton.knobs.runtime.interpret else precision


def tile(made_of: str) -> dict[str, Any]:
    """Launch options of the kernels that chain products.

    Three tf32 products after each other are laid out with 16 rows or 8 columns to a warp: four
    warps for a tile of 16 x 32, any other number would repeat them.
    """
    rows, warps = (16, 4) if made_of in ("tf32x3", "ieee") else (32, 8)
    return {
        "BLOCK_R": rows,
        "BLOCK_C": BLOCK_C,
        "MODE": made_of,
        "num_warps": warps,
        "num_stages": 1,  # with more, the loads taken ahead spill
        "maxnreg": 255,  # ptxas would stop at 128, and spill
    }


def feature_blocks(depth: int) -> dict[str, int]:
    """Columns of [q, e, 1], and of its three parts."""
    return {"BLOCK_D": dot_block(depth + 2), "BLOCK_P": dot_block(3 * (depth + 2))}


def num_programs(tensor: Tensor, items: int, per_multiprocessor: int = 1) -> int:
    """Programs that share the items; each has a share of the weights' gradients of its own."""
    if not tensor.is_cuda:
        return max(1, min(items, INTERPRETED_PROGRAMS))
    available = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return max(1, min(items, per_multiprocessor * available))


class Rows(NamedTuple):
    """A matrix from its row `first` on. A view could be aligned otherwise, for a kernel anew."""

    of: Tensor
    first: int = 0


def copies_together(num_copies: int, bytes_of_copy: int) -> int:
    """How many copies backward takes at a time: in as few parts as fit `BUFFER_BYTES`, alike.

    A copy of a large batch fills a GPU, and what it keeps would otherwise be as much as all that
    the layers of the model save.
    """
    fit = min(max(BUFFER_BYTES // max(bytes_of_copy, 1), 1), MAX_GRID)
    return ceil_div(num_copies, max(ceil_div(num_copies, fit), 1))


def zero_gradients(
    state: Sequence[Tensor], edge_fea: Tensor, weights: Sequence[Tensor], wants_edge_fea: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What backward of a layer gives for no rows."""
    of_x, of_v, of_h = (torch.empty_like(part) for part in state)
    of_fea = torch.zeros_like(edge_fea) if wants_edge_fea else edge_fea.new_empty(0)
    return of_x, of_v, of_h, of_fea, of_x.new_zeros(sum(weight.numel() for weight in weights))


def add_outers(total: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """Of one part of the rows after another; total: empty before the first."""
    return [a.add_(b) for a, b in zip(total, found, strict=True)] if total else found


def forward_items(
    like: Tensor,
    block_start: Tensor,
    num_nodes: int,
    copies: int,
    max_nodes: int | None,
    block: int,
) -> tuple[bool, int]:
    """Whether programs of a forward kernel own whole molecules, or tiles of `block` nodes, and how
    many blocks or tiles there are.

    Whole molecules, and so one launch, wherever as many of their programs as of the tiles' run at
    once. Fewer would leave the GPU idle for longer than the launch saved: a tile takes some tens
    of microseconds (a count of its loads and products, not measured), a launch a few.
    """
    tiles, blocks = ceil_div(num_nodes, block), block_start.shape[0] - 1
    if max_nodes is None:
        return False, tiles
    filled = min(blocks, ceil_div(num_nodes, max(max_nodes, 1)))
    of_molecules, of_tiles = (
        num_programs(like, items * copies, PER_MULTIPROCESSOR) for items in (filled, tiles)
    )
    whole = of_molecules >= of_tiles
    return whole, blocks if whole else tiles


def launch_row_linear(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    blocks: int,
    width: int,
    precision: str,
    *,
    out: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """a (R, K), weight (N, blocks * K) with any strides → (R, blocks * N), N = `width`; with `out`,
    of as many rows as that has, from `first` on.

    In the tiles of the kernels that take the same products themselves: with 64 rows they would be
    other instructions on sm_90 and sm_100, which need not round alike.
    """
    if out is None:
        out = a.new_empty(a.shape[0], blocks * width)
    rows, num_k = out.shape[0], a.shape[1]
    options = tile(mode(a, precision))
    if out.numel():
        grid = ceil_div(rows, options["BLOCK_R"]), blocks, ceil_div(width, BLOCK_C)
        with on_device_of(a):
            _row_linear_kernel[grid](
                a, weight, bias, out, rows, first, *weight.stride(), width, num_k,
                NUM_BLOCKS=blocks, **options,
            )  # fmt: skip
    return out


def launch_row_outers(
    pairs: Sequence[tuple[Rows, Rows]], num_rows: int, precision: str
) -> list[Tensor]:
    """gᵀ a of each pair of (R, N) and (R, K), rows of any stride: (N, K), in one memory."""
    like = pairs[0][1].of
    shares = num_programs(like, ceil_div(num_rows, 4 * SHARE_R))
    share = SHARE_R * ceil_div(ceil_div(num_rows, SHARE_R), shares)
    shapes = [(g.of.shape[1], a.of.shape[1]) for g, a in pairs]
    sizes = [num_n * num_k for num_n, num_k in shapes]
    partial = like.new_empty(shares, sum(sizes))
    options = tile(mode(like, precision)) | {"BLOCK_R": OUTER_BLOCK_R}
    del options["BLOCK_C"]
    with on_device_of(like):
        for (g, a), own, (num_n, num_k) in zip(
            pairs, partial.split(sizes, dim=1), shapes, strict=True
        ):
            _row_outer_kernel[(shares, ceil_div(num_n, OUTER_BLOCK), ceil_div(num_k, OUTER_BLOCK))](
                g.of, a.of, own, num_rows, share, g.first, a.first, g.of.stride(0), a.of.stride(0),
                partial.stride(0), num_n, num_k, BLOCK_N=OUTER_BLOCK, BLOCK_K=OUTER_BLOCK,
                **options,
            )  # fmt: skip
    sums = partial.sum(0).split(sizes)
    return [own.view(shape) for own, shape in zip(sums, shapes, strict=True)]


def aot_case(
    kernel: Any,
    name: str,
    precision: str,
    constexprs: Mapping[str, object],
    divisible_by_16: tuple[str, ...],
    allowed_spills_reason: str | None = None,
) -> AotCase:
    """A case of which pointers are to the kernel's dtype or int64, integers int32."""
    launched = tile(MODES[precision])
    options = {key: launched.pop(key) for key in ("num_warps", "num_stages")}
    options["options"] = {"maxnreg": launched.pop("maxnreg")}
    pointer = "*fp64" if precision == "fp64" else "*fp32"
    values, signature = {**launched, **constexprs}, {}
    for parameter in inspect.signature(unwrap(kernel)).parameters:
        if parameter in values:
            continue
        if not parameter.endswith("_ptr"):
            signature[parameter] = "i32"
        else:
            signature[parameter] = "*i64" if parameter[:-4] in INDICES else pointer
    return AotCase(
        kernel,
        f"{name} {precision}",
        signature,
        {key: value for key, value in values.items() if key in _parameters(kernel)},
        divisible_by_16=divisible_by_16,
        allowed_spills_reason=SPILLS.get(precision, allowed_spills_reason),
        only=90 if precision == "fp64" else None,
        **options,
    )


def _parameters(kernel: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(unwrap(kernel)).parameters


def aot_cases() -> list[AotCase]:
    """Widths that tiles divide, and not; W with its rows dense, as it is in forward."""
    cases, whole = [], ("num_n", "num_k")
    for precision in MODES:
        linear = {"NUM_BLOCKS": 2, "stride_k": 1, "bias_ptr": None}
        outer = {"BLOCK_N": OUTER_BLOCK, "BLOCK_K": OUTER_BLOCK, "BLOCK_R": OUTER_BLOCK_R}
        cases += [
            aot_case(_row_linear_kernel, "row_linear K=96", precision, linear, whole),
            aot_case(_row_linear_kernel, "row_linear C=102", precision, linear, ()),
            aot_case(_row_outer_kernel, "row_outer K=96", precision, outer, whole),
        ]
    return cases
