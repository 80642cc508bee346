// Symmetric eigenproblems by one-sided Jacobi rotations (Hestenes; Golub & Van Loan, Matrix
// Computations, 8.6.3), a warp or a part of one per matrix up to 32 rows, a block up to 128.
//
// B = A + shift is positive definite with condition at most 5 for shift = 1.5 |A|_1. Rotating pairs of
// B's columns until all are orthogonal gives columns B v = (lambda + shift) v: eigenvectors when
// normalised. Eigenvalues are their Rayleigh quotients, v^T A v: the lengths have gathered the rounding
// of all rotations. No second matrix is kept, no rows are rotated, and a step costs one exchange of
// columns.
//
// A matrix's bits depend on itself alone: it stops rotating when it has converged, whatever its
// neighbours in the warp do, and all sums have one order. No atomics.
//
// Per matrix of n rows, about 8 sweeps of n - 1 steps. Warp kernel: a column in the registers of each
// lane, per step W shuffles and 4 W multiplications and additions a lane. Block kernel: columns in
// shared memory, n (n | 1) numbers (at most 132 KB), read and written once per step.
//
// Not yet run on hardware; tests/ops/test_eigh_cuda.py runs them on the CPU. The block size of 256 is
// not tuned.
#pragma once
#include <cstdint>

namespace gfnode {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpKernelThreads = 128;
constexpr int kBlockKernelThreads = 256;
constexpr int kBlockWarps = kBlockKernelThreads / kWarp;
constexpr int kBlockRows = 128;
constexpr int kMaxSweeps = 30;

template <typename Real>
struct Precision;

template <>
struct Precision<float> {
  static constexpr float epsilon = 0x1p-23f;
  static constexpr int max_exponent = 126;
};

template <>
struct Precision<double> {
  static constexpr double epsilon = 0x1p-52;
  static constexpr int max_exponent = 1022;
};

// Cosines of columns up to this count as zero when it is asked whether to go on; rotated down to
// epsilon nevertheless.
template <typename Real>
constexpr Real kOrthogonal = 4 * Precision<Real>::epsilon;

template <typename Real>
struct Rotation {
  Real c, s, t;
};

// Makes columns of squared lengths p and q with product `inner` orthogonal: (c x - s y, s x + c y).
template <typename Real>
__device__ inline Rotation<Real> rotation(Real p, Real q, Real inner) {
  const Real zeta = (q - p) / (2 * inner);
  const Real t = (zeta < 0 ? Real(-1) : Real(1)) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const Real c = 1 / sqrt(1 + t * t);
  return {c, c * t, t};
}

// A power of two that brings `largest` near 1, as far as it and its inverse are normal numbers.
template <typename Real>
__device__ inline Real scale_of(Real largest) {
  constexpr int limit = Precision<Real>::max_exponent;
  if (!(largest > 0)) return 1;
  const int exponent = -ilogb(largest);
  return scalbn(Real(1), exponent > limit ? limit : exponent < -limit ? -limit : exponent);
}

template <typename Real>
__device__ inline Real not_a_number() {
  return Real(nan(""));
}

template <typename Real>
__device__ inline Real entry(const Real *matrix, int64_t rows, int i, int j) {
  return i > j ? matrix[i * rows + j] : matrix[j * rows + i];
}

// W lanes a matrix, `rows` <= W.
template <typename Real, int W>
__global__ void __launch_bounds__(kWarpKernelThreads, 1)
    eigh_warp_kernel(const Real *__restrict__ matrices, Real *__restrict__ values,
                     Real *__restrict__ vectors, const int64_t *__restrict__ sizes, int64_t count,
                     int rows) {
  const int lane = threadIdx.x % W;
  const int64_t matrix = (int64_t(blockIdx.x) * kWarpKernelThreads + threadIdx.x) / W;
  const bool exists = matrix < count;
  const int64_t size = !exists ? 0 : sizes ? sizes[matrix] : rows;
  const bool impossible = size < 0 || size > rows;
  const int n = impossible ? rows : int(size);
  const Real *from = matrices + matrix * rows * rows;
  const unsigned segment = W == kWarp ? kFullMask
                                      : ((1u << (W % kWarp)) - 1) << (threadIdx.x % kWarp / W * W);

  Real x[W], largest = 0;
  bool finite = !impossible;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    x[i] = i < n && lane < n && finite ? entry(from, rows, i, lane) : Real(0);
    finite = finite && x[i] - x[i] == 0;
    largest = fmax(largest, fabs(x[i]));
  }
  const bool broken = (__ballot_sync(kFullMask, !finite) & segment) != 0;
#pragma unroll
  for (int k = 1; k < W; k *= 2) largest = fmax(largest, __shfl_xor_sync(kFullMask, largest, k));
  const Real scale = broken ? Real(1) : scale_of(largest);
  Real norm = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) {
    x[i] = broken ? Real(0) : x[i] * scale;
    norm += fabs(x[i]);
  }
#pragma unroll
  for (int k = 1; k < W; k *= 2) norm = fmax(norm, __shfl_xor_sync(kFullMask, norm, k));
  const Real shift = norm > 0 ? Real(1.5) * norm : Real(1);
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i == lane && lane < n) x[i] += shift;

  bool converged = n < 2;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    if (__ballot_sync(kFullMask, !converged) == 0) break;
    Real own = 0;
#pragma unroll
    for (int i = 0; i < W; ++i) own += x[i] * x[i];
    bool more = false;
    for (int k = 1; k < W; ++k) {
      Real y[W], inner = 0;
#pragma unroll
      for (int i = 0; i < W; ++i) {
        y[i] = __shfl_xor_sync(kFullMask, x[i], k);
        inner += x[i] * y[i];
      }
      const Real other = __shfl_xor_sync(kFullMask, own, k);
      const Real lengths = sqrt(own * other);
      const bool first = lane < (lane ^ k);
      Rotation<Real> r{1, 0, 0};
      if (!converged && fabs(inner) > Precision<Real>::epsilon * lengths)
        r = rotation(first ? own : other, first ? other : own, inner);
      more = more || fabs(inner) > kOrthogonal<Real> * lengths;
      const Real s = first ? -r.s : r.s;
#pragma unroll
      for (int i = 0; i < W; ++i) x[i] = r.c * x[i] + s * y[i];
      own += (first ? -r.t : r.t) * inner;
    }
    const unsigned votes = __ballot_sync(kFullMask, more);  // of every lane, converged or not
    converged = converged || (votes & segment) == 0;
  }

  Real squares = 0, value = 0;
#pragma unroll
  for (int i = 0; i < W; ++i) squares += x[i] * x[i];
  const Real length = sqrt(squares);
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= n || broken) break;
    x[i] = x[i] / length + Real(0);  // adding zero: identities may have turned a zero's sign
    Real sum = 0;
#pragma unroll
    for (int k = 0; k < i; ++k) sum += from[i * rows + k] * scale * x[k];
    value += x[i] * (from[i * rows + i] * scale * x[i] + 2 * sum);
  }
  value /= scale;
  int rank = 0;
#pragma unroll 4
  for (int j = 0; j < W; ++j) {
    const Real that = __shfl_sync(kFullMask, value, j, W);
    rank += j < n && (that < value || (that == value && j < lane));
  }
  if (!exists || lane >= n) return;
  const bool nothing = broken || !converged;
  values[matrix * rows + rank] = nothing ? not_a_number<Real>() : value;
  Real *into = vectors + matrix * rows * rows + rank;
#pragma unroll
  for (int i = 0; i < W; ++i)
    if (i < n) into[i * rows] = nothing ? not_a_number<Real>() : x[i];
}

template <typename Real>
__device__ inline Real warp_sum(Real x) {
#pragma unroll
  for (int k = 1; k < kWarp; k *= 2) x += __shfl_xor_sync(kFullMask, x, k);
  return x;
}

// The largest x of a block, where x >= 0. `scratch` holds a number per warp.
template <typename Real>
__device__ inline Real block_max(Real x, Real *scratch) {
#pragma unroll
  for (int k = 1; k < kWarp; k *= 2) x = fmax(x, __shfl_xor_sync(kFullMask, x, k));
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  for (int i = 0; i < kBlockWarps; ++i) x = fmax(x, scratch[i]);
  return x;
}

// Columns, then their squared lengths, later eigenvalues, then a number per warp, then the order.
template <typename Real>
constexpr int64_t block_shared_bytes(int64_t rows) {
  return (rows * (rows | 1) + rows + kBlockWarps) * sizeof(Real) + rows * sizeof(int);
}

// One block a matrix, `rows` <= kBlockRows.
template <typename Real>
__global__ void __launch_bounds__(kBlockKernelThreads, 1)
    eigh_block_kernel(const Real *__restrict__ matrices, Real *__restrict__ values,
                      Real *__restrict__ vectors, const int64_t *__restrict__ sizes, int rows) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int pitch = rows | 1;
  Real *x = reinterpret_cast<Real *>(shared);
  Real *lengths = x + rows * pitch, *scratch = lengths + rows;
  int *order = reinterpret_cast<int *>(scratch + kBlockWarps);

  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int64_t matrix = blockIdx.x;
  const int64_t size = sizes ? sizes[matrix] : rows;
  const bool impossible = size < 0 || size > rows;
  const int n = impossible ? rows : int(size);
  const Real *from = matrices + matrix * rows * rows;

  Real largest = 0;
  bool finite = !impossible;
  for (int at = thread; at < n * n && finite; at += kBlockKernelThreads) {
    const int i = at / n, j = at % n;
    if (j > i) continue;
    const Real a = from[int64_t(i) * rows + j];
    finite = a - a == 0;
    largest = fmax(largest, fabs(a));
    x[j * pitch + i] = a;
    x[i * pitch + j] = a;
  }
  const bool broken = __syncthreads_or(!finite);
  const Real scale = broken ? Real(1) : scale_of(block_max(largest, scratch));
  Real norm = 0;
  for (int j = thread; j < n; j += kBlockKernelThreads) {
    Real sum = 0;
    for (int i = 0; i < n; ++i) {
      const Real a = broken ? Real(0) : x[j * pitch + i] * scale;
      x[j * pitch + i] = a;
      sum += fabs(a);
    }
    norm = fmax(norm, sum);
  }
  norm = block_max(norm, scratch);
  const Real shift = norm > 0 ? Real(1.5) * norm : Real(1);
  __syncthreads();
  for (int j = thread; j < n; j += kBlockKernelThreads) x[j * pitch + j] += shift;
  __syncthreads();

  // Pairs by the circle method: player 0 stays, the others move on by one place a step.
  const int players = n + n % 2;
  bool converged = n < 2;
  for (int sweep = 0; sweep < kMaxSweeps && !converged; ++sweep) {
    for (int j = warp; j < n; j += kBlockWarps) {
      Real sum = 0;
      for (int i = lane; i < n; i += kWarp) sum += x[j * pitch + i] * x[j * pitch + i];
      sum = warp_sum(sum);
      if (lane == 0) lengths[j] = sum;
    }
    __syncthreads();
    bool more = false;
    for (int step = 0; step < players - 1; ++step) {
      for (int pair = warp; pair < players / 2; pair += kBlockWarps) {
        const int a = pair == 0 ? 0 : 1 + (pair - 1 + step) % (players - 1);
        const int b = 1 + (players - 2 - pair + step) % (players - 1);
        const int p = a < b ? a : b, q = a < b ? b : a;
        if (q >= n) continue;
        Real left[kBlockRows / kWarp], right[kBlockRows / kWarp], inner = 0;
#pragma unroll
        for (int u = 0; u < kBlockRows / kWarp; ++u) {
          const int i = lane + u * kWarp;
          left[u] = i < n ? x[p * pitch + i] : Real(0);
          right[u] = i < n ? x[q * pitch + i] : Real(0);
          inner += left[u] * right[u];
        }
        inner = warp_sum(inner);
        const Real first = lengths[p], second = lengths[q], both = sqrt(first * second);
        if (fabs(inner) <= Precision<Real>::epsilon * both) continue;
        more = more || fabs(inner) > kOrthogonal<Real> * both;
        const Rotation<Real> r = rotation(first, second, inner);
#pragma unroll
        for (int u = 0; u < kBlockRows / kWarp; ++u) {
          const int i = lane + u * kWarp;
          if (i >= n) continue;
          x[p * pitch + i] = r.c * left[u] - r.s * right[u];
          x[q * pitch + i] = r.s * left[u] + r.c * right[u];
        }
        __syncwarp();  // all lanes have read the lengths
        if (lane == 0) {
          lengths[p] = first - r.t * inner;
          lengths[q] = second + r.t * inner;
        }
      }
      __syncthreads();
    }
    converged = !__syncthreads_or(more);
  }

  Real *eigenvalues = lengths;
  for (int j = warp; j < n && !broken; j += kBlockWarps) {
    Real *v = x + j * pitch;
    Real sum = 0;
    for (int i = lane; i < n; i += kWarp) sum += v[i] * v[i];
    const Real length = sqrt(warp_sum(sum));
    for (int i = lane; i < n; i += kWarp) v[i] /= length;
    __syncwarp();
    Real value = 0;
    for (int k = lane; k < n; k += kWarp) {
      Real below = 0;
#pragma unroll 4
      for (int i = k + 1; i < n; ++i) below += from[int64_t(i) * rows + k] * scale * v[i];
      value += v[k] * (from[int64_t(k) * rows + k] * scale * v[k] + 2 * below);
    }
    value = warp_sum(value);
    if (lane == 0) eigenvalues[j] = value / scale;
  }
  __syncthreads();
  const bool nothing = broken || !converged;
  for (int j = thread; j < n; j += kBlockKernelThreads) {
    const Real value = nothing ? not_a_number<Real>() : eigenvalues[j];
    int rank = nothing ? j : 0;
    for (int i = 0; i < n && !nothing; ++i)
      rank += eigenvalues[i] < value || (eigenvalues[i] == value && i < j);
    order[rank] = j;
    values[matrix * rows + rank] = value;
  }
  __syncthreads();
  for (int at = thread; at < n * n; at += kBlockKernelThreads) {
    const int i = at / n, k = at % n;
    vectors[(matrix * rows + i) * rows + k] =
        nothing ? not_a_number<Real>() : x[order[k] * pitch + i];
  }
}

}  // namespace gfnode
