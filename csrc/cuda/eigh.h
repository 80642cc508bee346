// Eigendecompositions on the GPU, asynchronously on a stream; plain C, see build_info.h.
#pragma once
#include <cstdint>

constexpr int64_t kCudaEighRows = 128;  // the largest matrices

// matrices (count, rows, rows), lower triangles; values (count, rows), vectors (count, rows, rows);
// sizes (count), or null where every size is `rows`. All in device memory; rows <= kCudaEighRows.
// Returns a cudaError_t, zero on success.
extern "C" int gfnode_cuda_eigh_float(const float *matrices, float *values, float *vectors,
                                      const int64_t *sizes, int64_t count, int64_t rows, void *stream);
extern "C" int gfnode_cuda_eigh_double(const double *matrices, double *values, double *vectors,
                                       const int64_t *sizes, int64_t count, int64_t rows,
                                       void *stream);
extern "C" const char *gfnode_cuda_error(int code);
