// Eigendecompositions of symmetric matrices, SIMD across the batch: lane i of every vector belongs
// to matrix i of a group. Raw pointers in, no torch headers.
//
// A lane's arithmetic is the same whatever its position and whatever the other lanes hold, so a
// matrix's bits do not depend on the batch it stands in. Each matrix is scaled by a power of two to a
// largest entry near 1. Sizes 2 and 3: cyclic Jacobi in registers. From 4 on: Householder
// tridiagonalisation, implicit QL with Wilkinson's shift (Golub & Van Loan, Matrix Computations, 8.3),
// its rotations recorded and applied to four rows of the eigenvectors at a time, which stay in
// cache. Jacobi is slower there: float, AVX-512, 0.067 against 0.061 us at 4 rows, 0.24 against 0.14
// at 6. Two groups are diagonalised together: alone, each rotation waits for the last one's root.
//
// Multiplications and additions per matrix, about: 4/3 n^3 for the tridiagonal form, 4/3 n^3 for the
// reflectors' product, 7 n^3 for the rotations. Memory of a thread: 2.5 n^2 vectors and 512 KiB of
// rotations, as far as they are used.
#pragma once
#include <cstdint>

namespace gfnode {

template <typename Real>
struct EighBatch {
  int64_t rows;           // N of the stored matrices, at least the size of each
  const Real *matrices;   // (B, N, N), lower triangles
  Real *values;           // (B, N), ascending, zero beyond a matrix's size
  Real *vectors;          // (B, N, N), columns, zero beyond a matrix's size
};

struct EighGroup {
  int64_t size;
  const int64_t *which;  // `count` indices into the batch, all of this size
  int64_t count;         // at most the lanes of the instruction set
};

constexpr int64_t kEighConverged = -1;

// Solve groups `begin` to `end`; return the index of a matrix that has not converged, if there is one.
struct EighKernels {
  int64_t (*single)(const EighBatch<float> &, const EighGroup *, int64_t begin, int64_t end);
  int64_t (*twofold)(const EighBatch<double> &, const EighGroup *, int64_t begin, int64_t end);
  int64_t lanes;  // floats in a vector; half as many doubles
};

// Those of the widest instruction set this processor has.
const EighKernels &eigh_kernels();

}  // namespace gfnode
