// The powers of linear dynamics y' = y W + s b on a state, and what solves take from them:
//   P_0 = y,  P_1 = P_0 W + t b,  P_2 = P_1 W + b,  P_{k+1} = P_k W
// of R rows (a molecule, or one Cartesian component of it), M modes and C channels. Raw pointers in,
// no torch headers.
//
// Tiles of rows of one mode stay in cache from the first power to the last, both ways. 2 C^2 flops per
// row, mode and power forward, twice that backward. A row's powers and readings do not depend on the
// other rows, bit for bit; gradients of W and b are sums over parts of the rows, in a fixed order.
#pragma once
#include <cstdint>

namespace gfnode {

template <typename Real>
struct Powers {
  int64_t degree, rows, modes, channels;  // K, R, M, C
  Real *buffer;                           // (K+1, R, M, C)
  const Real *weight, *slope;             // (M, C, P), rows padded with zeros; (M, C) or null
  Real time;                              // t
  int64_t first;                          // the last power that is there
};

template <typename Real>
struct PowersGrads {
  const Real *transposed;  // (M, C, P): W of each mode transposed, rows padded with zeros
  Real *grad;  // (K+1, R, M, C); grad[0] becomes the state's, grad[1] with a slope P_1's
  Real *weight, *slope;    // (M, padded C, P) and (M, P), added to; slope may be null
};

// values[b, t] = sum_k weights[b, t, k] P_k[b], and its adjoint; X numbers of a molecule in a row.
template <typename Real>
struct Readings {
  int64_t batch, times, powers, width;  // B, T, K+1, X
  const Real *weights;                  // (B, T, K+1)
  Real *buffer, *values;                // (K+1, B, X), (B, T, X)
  bool add;                             // to the values
};

// weights[i, k] = sum_p x^p table[p, k], x = (times[i] - start) / size, where start < times[i] <= end,
// elsewhere 0; in double precision.
template <typename Real>
struct Weighing {
  int64_t powers, terms;        // K+1, rows of the table
  const double *times, *table;  // (n), (terms, padded K+1)
  double start, size, end;
  Real *weights;                // (n, K+1)
};

// rows[i] = sum_k table[i, k] P_k. Written: rows[0], and sums of squares of all rows[i] / tolerance,
// tolerance = atol + rtol max(|P_0|, |rows[0]|).
template <typename Real>
struct Measure {
  int64_t count, powers, size;  // n, K+1, R M C
  const Real *table, *buffer;   // (n, K+1), (K+1, R M C)
  Real rtol, atol;
  Real *combined;               // (R M C)
};

constexpr int64_t kPowersTile = 48;  // rows

template <typename Real>
struct PowersKernels {
  void (*fill)(const Powers<Real> &, int64_t begin, int64_t end);                       // rows
  void (*pull)(const Powers<Real> &, const PowersGrads<Real> &, int64_t begin, int64_t end);  // rows
  void (*read)(const Readings<Real> &, int64_t begin, int64_t end);                     // molecules
  void (*pull_readings)(const Readings<Real> &, int64_t begin, int64_t end);            // molecules
  void (*weigh)(const Weighing<Real> &, int64_t begin, int64_t end);                    // times
  void (*measure)(const Measure<Real> &, double *squares, int64_t begin, int64_t end);  // numbers
};

}  // namespace gfnode
