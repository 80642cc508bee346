"""What the kernels of the attention solve share: evaluations and stages of one tile of rows.

    dy_m/ds = (Σ_n A_mn y_n) W_m + b_m(s),   A = softmax_n(u_m · y_n),   u_m = y_m P + q(s)

as in `gfnode_fast.kernels.mode_rhs`, with q and b constant, or affine in s (HAS_SLOPE: row 0 of
`query_bias` (S, C) and `bias` (S, M, C) is the constant, row 1 the slope). Weights are dense.

States are tiles of BLOCK_R rows and BLOCK_C channels in a workspace of the program's own, one a
mode, modes next to each other. Rows and channels beyond the last are never stored and read as 0.
Row i of the table of stages (J, 16) holds stage i's coefficients of the stages before it, and its
time in units of the step in column 15.
"""

import triton
import triton.language as tl

from gfnode_fast.kernels.mode_rhs import _attend, _load_matrix, _query

STAGE_ROW = 16
STAGE_ROW_ = tl.constexpr(STAGE_ROW)


@triton.jit
def _at_time(ptr, stride, s, c, mask_c, HAS_SLOPE: tl.constexpr, ACC: tl.constexpr):
    """The row of C at `ptr`, plus s times the one `stride` further."""
    value = tl.load(ptr + c, mask=mask_c, other=0.0)
    if HAS_SLOPE:
        value += s.to(ACC) * tl.load(ptr + stride + c, mask=mask_c, other=0.0)
    return value


@triton.jit
def _evaluate(
    point_ptr, out_ptr, factor, s, key_ptr, query_bias_ptr, weight_ptr, bias_ptr, c, mask_y,
    num_modes, num_channels,
    HAS_SLOPE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores factor · g(s, point), a tile a mode."""
    mask_c = c < num_channels
    query_bias = _at_time(query_bias_ptr, num_channels, s, c, mask_c, HAS_SLOPE, ACC)
    for m in range(0, num_modes):
        u = _query(
            point_ptr + m * TILE, mask_y, key_ptr, num_channels, 1, query_bias, c, num_channels,
            PRECISION,
        )  # fmt: skip
        a, _ = _attend(u, point_ptr, TILE, mask_y, num_modes)
        w = weight_ptr + m * num_channels * num_channels
        w = _load_matrix(w, c, num_channels, num_channels, c, 1, num_channels)
        out = tl.dot(a, w, input_precision=PRECISION, out_dtype=ACC)
        bias = bias_ptr + m * num_channels
        out += _at_time(bias, num_modes * num_channels, s, c, mask_c, HAS_SLOPE, ACC)[None, :]
        tl.store(out_ptr + m * TILE, out * factor.to(ACC), mask=mask_y)


@triton.jit
def _fill_point(
    v_ptr, point_ptr, stages_ptr, stage, mask_y, num_modes, TILE: tl.constexpr, ACC: tl.constexpr
):
    """Stores where stage `stage` is evaluated: v_0 + Σ_j β_j v_{j+1}."""
    for m in range(0, num_modes):
        point = tl.load(v_ptr + m * TILE, mask=mask_y, other=0.0)
        for j in range(0, stage):
            beta = tl.load(stages_ptr + stage * STAGE_ROW_ + j).to(ACC)
            v = tl.load(v_ptr + ((j + 1) * num_modes + m) * TILE, mask=mask_y, other=0.0)
            point += beta * v
        tl.store(point_ptr + m * TILE, point, mask=mask_y)
    tl.debug_barrier()  # other threads read the tiles


@triton.jit
def _stage_time(stages_ptr, stage, time, size):
    return time + tl.load(stages_ptr + stage * STAGE_ROW_ + STAGE_ROW_ - 1) * size


@triton.jit
def _fill_stages(
    start_ptr, v_ptr, point_ptr, stages_ptr, degree, time, size,
    key_ptr, query_bias_ptr, weight_ptr, bias_ptr, c, mask_y, num_modes, num_channels,
    HAS_SLOPE: tl.constexpr, TILE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores v_0, the step's start (modes C apart), and v_k, h times stage k - 1."""
    for m in range(0, num_modes):
        start = tl.load(start_ptr + m * num_channels, mask=mask_y, other=0.0)
        tl.store(v_ptr + m * TILE, start, mask=mask_y)
    tl.debug_barrier()  # other threads read the tiles
    for stage in range(0, degree):
        _fill_point(v_ptr, point_ptr, stages_ptr, stage, mask_y, num_modes, TILE, ACC)
        _evaluate(
            point_ptr, v_ptr + (stage + 1) * num_modes * TILE, size,
            _stage_time(stages_ptr, stage, time, size), key_ptr, query_bias_ptr, weight_ptr,
            bias_ptr, c, mask_y, num_modes, num_channels, HAS_SLOPE, TILE, PRECISION, ACC,
        )  # fmt: skip
        tl.debug_barrier()
