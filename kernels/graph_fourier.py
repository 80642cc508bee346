"""Graph Fourier transform onto the first M eigenvectors, and back with a fused epilogue.

    forward  modes[b, m, c] = Σ_n U_b[n, m] signal[b, n, c]                         m < M
    inverse  p[t, b, n, c] = Σ_m U_b[n, m] modes[t, b, m, c]
             out = (act(p) + residual[b, n, c]) + centroid[b, n, c / 2]   (even c only)
             and beside[t, b] after the channels of every atom

The transform's gradient with respect to its signal is the inverse of one time without epilogue,
so there are four kernels: forward, inverse, the inverse's backward, and the eigenvectors' gradient.

A program owns one molecule and a tile of channels: forward, all its atoms; inverse, a run of its
times, the residual being read once; backward, all its times, so that the sums over times are local.
Molecules differ in size by offsets (`ptr` to atoms, `eig_ptr` to eigenvectors, N_b² a molecule); if
all have N atoms the offsets are multiples of N and nothing is read. Modes that a molecule does not
have (m >= N_b) are 0 forward and ignored backward.

Per molecule, T times, fp32: forward moves 4 C (N + M) + 4 N M bytes for 2 M N C flops, inverse
4 T C (N + M) + 4 C N for 2 T M N C. That is M N / (4 (N + M)) multiply-adds a byte, 0.4 at M = 2,
N = 13 and 3 at M = N = 25, below the 7.8 at which fp32 units and not memory set the pace until
M = N = 62; a tensor-core product pads M = 2 to 16. So: plain fused multiply-adds.
At M = 2, N = 13, C = 64, T = 8: forward 3.9 kB, 3.3 kflop; inverse 34 kB, 27 kflop.

No atomics; every sum has a fixed order, and a molecule's results do not depend on the others.
Sums are in fp32, fp64 for fp64. Addresses are 64-bit.
Limits: M <= 128 (a tile holds all modes in the forward kernel); the last dimension dense (the
launchers copy otherwise). Tuned on: none yet; not yet run on hardware.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _molecule_extent(ptr_ptr, eig_ptr_ptr, molecule, stride_ub, NUM_ATOMS: tl.constexpr):
    """A molecule's first atom, number of atoms and offset of its eigenvectors."""
    if NUM_ATOMS > 0:
        first_atom = molecule * NUM_ATOMS
        num_atoms = NUM_ATOMS
        eig_offset = molecule * stride_ub
    else:
        first_atom = tl.load(ptr_ptr + molecule)
        num_atoms = (tl.load(ptr_ptr + molecule + 1) - first_atom).to(tl.int32)
        eig_offset = tl.load(eig_ptr_ptr + molecule)
    return first_atom, num_atoms, eig_offset


@triton.jit
def _graph_fourier_fwd_kernel(
    signal_ptr,
    eigvecs_ptr,
    modes_ptr,
    ptr_ptr,
    eig_ptr_ptr,
    stride_sn,
    stride_ub,
    stride_un,
    stride_uk,
    num_channels,
    NUM_MODES: tl.constexpr,
    NUM_ATOMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    first_atom, num_atoms, eig_offset = _molecule_extent(
        ptr_ptr, eig_ptr_ptr, molecule, stride_ub, NUM_ATOMS
    )
    if NUM_ATOMS == 0:
        stride_un = num_atoms
        stride_uk = 1
    mode = tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < num_channels
    mask_m = (mode < NUM_MODES) & (mode < num_atoms)
    u_ptr = eigvecs_ptr + eig_offset + mode * stride_uk
    x_ptr = signal_ptr + first_atom * stride_sn + channel
    acc = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for _ in tl.range(0, num_atoms, loop_unroll_factor=4):
        u = tl.load(u_ptr, mask=mask_m, other=0.0).to(ACC)
        x = tl.load(x_ptr, mask=mask_c, other=0.0).to(ACC)
        acc += u[:, None] * x[None, :]
        u_ptr += stride_un
        x_ptr += stride_sn
    out = (molecule * NUM_MODES + mode[:, None]) * num_channels + channel[None, :]
    tl.store(modes_ptr + out, acc, mask=(mode < NUM_MODES)[:, None] & mask_c[None, :])


@triton.jit
def _synthesise_tile(
    u_ptr, stride_uk, mask_n, modes_ptr, stride_mm, mask_c, num_modes, BLOCK_N, BLOCK_C, ACC
):
    """Σ_m U[n, m] modes[m, c] on a tile of atoms and channels."""
    acc = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for _ in range(0, num_modes):
        u = tl.load(u_ptr, mask=mask_n, other=0.0).to(ACC)
        y = tl.load(modes_ptr, mask=mask_c, other=0.0).to(ACC)
        acc += u[:, None] * y[None, :]
        u_ptr += stride_uk
        modes_ptr += stride_mm
    return acc


@triton.jit
def _inverse_graph_fourier_fwd_kernel(
    modes_ptr,
    eigvecs_ptr,
    residual_ptr,
    centroid_ptr,
    beside_ptr,
    out_ptr,
    ptr_ptr,
    eig_ptr_ptr,
    stride_mt,
    stride_mb,
    stride_mm,
    stride_ub,
    stride_un,
    stride_uk,
    stride_rn,
    stride_on,
    stride_ot,
    num_channels,
    num_beside,
    num_times,
    times_per_program,
    NUM_MODES: tl.constexpr,
    NUM_ATOMS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_CENTROID: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    first_atom, num_atoms, eig_offset = _molecule_extent(
        ptr_ptr, eig_ptr_ptr, molecule, stride_ub, NUM_ATOMS
    )
    if NUM_ATOMS == 0:
        stride_un = num_atoms
        stride_uk = 1
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < num_channels
    first_time = tl.program_id(2).to(tl.int64) * times_per_program
    last_time = tl.minimum(first_time + times_per_program, num_times)
    kept = tl.minimum(num_atoms, NUM_MODES)
    y_ptr = modes_ptr + molecule * stride_mb + channel
    for start in range(0, num_atoms, BLOCK_N):
        atom = start + tl.arange(0, BLOCK_N)
        mask_n = atom < num_atoms
        mask = mask_n[:, None] & mask_c[None, :]
        row = first_atom + atom
        if HAS_RESIDUAL:
            at = row[:, None] * stride_rn + channel[None, :]
            residual = tl.load(residual_ptr + at, mask=mask, other=0.0).to(ACC)
        if HAS_CENTROID:
            at = row[:, None] * (num_channels // 2) + (channel // 2)[None, :]
            position = mask & (channel % 2 == 0)[None, :]
            centroid = tl.load(centroid_ptr + at, mask=position, other=0.0).to(ACC)
        u_ptr = eigvecs_ptr + eig_offset + atom * stride_un
        o_ptr = out_ptr + row[:, None] * stride_on + channel[None, :]
        for t in range(first_time, last_time):
            p = _synthesise_tile(
                u_ptr, stride_uk, mask_n, y_ptr + t * stride_mt, stride_mm, mask_c, kept,
                BLOCK_N, BLOCK_C, ACC,
            )  # fmt: skip
            if SILU:
                p = p * tl.sigmoid(p)
            if HAS_RESIDUAL:
                p += residual
            if HAS_CENTROID:
                p += centroid
            tl.store(o_ptr + t * stride_ot, p, mask=mask)
        if BLOCK_W > 0:  # by the programs of the first channels
            column = tl.arange(0, BLOCK_W)
            mask_w = (column < num_beside) & (tl.program_id(1) == 0)
            w_ptr = out_ptr + row[:, None] * stride_on + (num_channels + column)[None, :]
            for t in range(first_time, last_time):
                first = (t * tl.num_programs(0) + molecule) * num_beside
                beside = tl.load(beside_ptr + first + column, mask=mask_w, other=0.0)
                rows = tl.broadcast_to(beside[None, :], (BLOCK_N, BLOCK_W))
                tl.store(w_ptr + t * stride_ot, rows, mask=mask_n[:, None] & mask_w[None, :])


@triton.jit
def _pulled_through_activation(
    grad, u_ptr, stride_uk, mask_n, modes_ptr, stride_mm, mask_c, kept, BLOCK_N, BLOCK_C, ACC
):
    """grad · silu'(p) with p = Σ_m U[n, m] modes[m, c] taken again."""
    p = _synthesise_tile(
        u_ptr, stride_uk, mask_n, modes_ptr, stride_mm, mask_c, kept, BLOCK_N, BLOCK_C, ACC
    )
    sigmoid = tl.sigmoid(p)
    return grad * sigmoid * (1 + p * (1 - sigmoid))


@triton.jit
def _inverse_graph_fourier_bwd_kernel(
    grad_ptr,
    modes_ptr,
    eigvecs_ptr,
    grad_modes_ptr,
    grad_added_ptr,
    ptr_ptr,
    eig_ptr_ptr,
    stride_gt,
    stride_gn,
    stride_mt,
    stride_mb,
    stride_mm,
    stride_ub,
    stride_un,
    stride_uk,
    stride_ot,
    num_channels,
    num_times,
    NUM_MODES: tl.constexpr,
    NUM_ATOMS: tl.constexpr,
    SILU: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    molecule = tl.program_id(0).to(tl.int64)
    first_atom, num_atoms, eig_offset = _molecule_extent(
        ptr_ptr, eig_ptr_ptr, molecule, stride_ub, NUM_ATOMS
    )
    if NUM_ATOMS == 0:
        stride_un = num_atoms
        stride_uk = 1
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = channel < num_channels
    kept = tl.minimum(num_atoms, NUM_MODES)
    zero_time = molecule * 0
    y_ptr = modes_ptr + molecule * stride_mb + channel
    out_ptr = grad_modes_ptr + molecule * NUM_MODES * num_channels + channel
    end = num_atoms
    if NUM_ATOMS == 0:
        end = tl.maximum(num_atoms, 1)  # without atoms the gradients are 0, not absent
    for start in range(0, end, BLOCK_N):
        atom = start + tl.arange(0, BLOCK_N)
        mask_n = atom < num_atoms
        mask = mask_n[:, None] & mask_c[None, :]
        row = first_atom + atom
        u_ptr = eigvecs_ptr + eig_offset + atom * stride_un
        g_ptr = grad_ptr + row[:, None] * stride_gn + channel[None, :]
        acc_added = tl.zeros((BLOCK_N, BLOCK_C), ACC)
        for t in range(zero_time, num_times):
            g = tl.load(g_ptr + t * stride_gt, mask=mask, other=0.0).to(ACC)
            acc_added += g
            if SILU:
                g = _pulled_through_activation(
                    g, u_ptr, stride_uk, mask_n, y_ptr + t * stride_mt, stride_mm, mask_c, kept,
                    BLOCK_N, BLOCK_C, ACC,
                )  # fmt: skip
            for m in range(0, NUM_MODES):
                u = tl.load(u_ptr + m * stride_uk, mask=mask_n & (m < kept), other=0.0).to(ACC)
                part = tl.sum(u[:, None] * g, axis=0)
                at = out_ptr + t * stride_ot + m * num_channels
                # a molecule of more than BLOCK_N atoms adds to what its earlier atoms gave
                part += tl.load(at, mask=mask_c & (start > 0), other=0.0).to(ACC)
                tl.store(at, part, mask=mask_c)
        if HAS_ADDED:
            at = row[:, None] * num_channels + channel[None, :]
            tl.store(grad_added_ptr + at, acc_added, mask=mask)
        tl.debug_barrier()  # other threads may add to the partial sums that these have stored


@triton.jit
def _graph_fourier_eigvecs_bwd_kernel(
    grad_ptr,
    modes_ptr,
    eigvecs_ptr,
    grad_eigvecs_ptr,
    ptr_ptr,
    eig_ptr_ptr,
    stride_gt,
    stride_gn,
    stride_mt,
    stride_mb,
    stride_mm,
    stride_ub,
    stride_un,
    stride_uk,
    num_channels,
    num_times,
    NUM_MODES: tl.constexpr,
    NUM_ATOMS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):
    """grad_U[n, m] = Σ_{t, c} grad_p[t, n, c] modes[t, m, c]; columns m >= M are left alone."""
    molecule = tl.program_id(0).to(tl.int64)
    first_atom, num_atoms, eig_offset = _molecule_extent(
        ptr_ptr, eig_ptr_ptr, molecule, stride_ub, NUM_ATOMS
    )
    out_offset = eig_offset
    if NUM_ATOMS > 0:
        out_offset = molecule * NUM_ATOMS * NUM_ATOMS
    else:
        stride_un = num_atoms
        stride_uk = 1
    kept = tl.minimum(num_atoms, NUM_MODES)
    zero_time = molecule * 0
    mode = tl.arange(0, BLOCK_M)
    for start in range(0, num_atoms, BLOCK_N):
        atom = start + tl.arange(0, BLOCK_N)
        mask_n = atom < num_atoms
        row = first_atom + atom
        u_ptr = eigvecs_ptr + eig_offset + atom * stride_un
        acc = tl.zeros((BLOCK_N, BLOCK_M), ACC)
        for t in range(zero_time, num_times):
            for c in range(0, num_channels, BLOCK_C):
                channel = c + tl.arange(0, BLOCK_C)
                mask_c = channel < num_channels
                mask = mask_n[:, None] & mask_c[None, :]
                g_ptr = grad_ptr + t * stride_gt + row[:, None] * stride_gn + channel[None, :]
                y_ptr = modes_ptr + molecule * stride_mb + t * stride_mt + channel
                g = tl.load(g_ptr, mask=mask, other=0.0).to(ACC)
                if SILU:
                    g = _pulled_through_activation(
                        g, u_ptr, stride_uk, mask_n, y_ptr, stride_mm, mask_c, kept,
                        BLOCK_N, BLOCK_C, ACC,
                    )  # fmt: skip
                for m in range(0, kept):
                    y = tl.load(y_ptr + m * stride_mm, mask=mask_c, other=0.0).to(ACC)
                    column = tl.sum(g * y[None, :], axis=1)
                    acc += tl.where(mode[None, :] == m, column[:, None], 0.0)
        at = out_offset + atom[:, None] * num_atoms + mode[None, :]
        mask = mask_n[:, None] & (mode < kept)[None, :]
        tl.store(grad_eigvecs_ptr + at, acc, mask=mask)
