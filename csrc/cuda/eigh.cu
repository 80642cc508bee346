// Launches of the eigensolver's kernels.
#include "eigh.h"

#include <cuda_runtime.h>

#include "eigh_kernels.cuh"

namespace {

constexpr int64_t kSharedBytes = 163 * 1024;  // that a block may ask for on sm_80, the least of ours

static_assert(gfnode::block_shared_bytes<double>(gfnode::kBlockRows) <= kSharedBytes);
static_assert(gfnode::kBlockRows == kCudaEighRows);

template <typename Real, int W>
void launch_warps(const Real *matrices, Real *values, Real *vectors, const int64_t *sizes,
                  int64_t count, int64_t rows, cudaStream_t stream) {
  constexpr int64_t together = gfnode::kWarpKernelThreads / W;
  const unsigned blocks = static_cast<unsigned>((count + together - 1) / together);
  gfnode::eigh_warp_kernel<Real, W><<<blocks, gfnode::kWarpKernelThreads, 0, stream>>>(
      matrices, values, vectors, sizes, count, static_cast<int>(rows));
}

template <typename Real>
int launch(const Real *matrices, Real *values, Real *vectors, const int64_t *sizes, int64_t count,
           int64_t rows, void *on) {
  if (count == 0 || rows == 0) return cudaSuccess;
  if (rows > kCudaEighRows || count > INT32_MAX) return cudaErrorInvalidValue;
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  if (rows <= 8) {
    launch_warps<Real, 8>(matrices, values, vectors, sizes, count, rows, stream);
  } else if (rows <= 16) {
    launch_warps<Real, 16>(matrices, values, vectors, sizes, count, rows, stream);
  } else if (rows <= 32) {
    launch_warps<Real, 32>(matrices, values, vectors, sizes, count, rows, stream);
  } else {
    const int bytes = static_cast<int>(gfnode::block_shared_bytes<Real>(rows));
    const cudaError_t error = cudaFuncSetAttribute(
        gfnode::eigh_block_kernel<Real>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    gfnode::eigh_block_kernel<Real>
        <<<static_cast<unsigned>(count), gfnode::kBlockKernelThreads, bytes, stream>>>(
            matrices, values, vectors, sizes, static_cast<int>(rows));
  }
  return cudaGetLastError();
}

}  // namespace

extern "C" int gfnode_cuda_eigh_float(const float *matrices, float *values, float *vectors,
                                      const int64_t *sizes, int64_t count, int64_t rows, void *stream) {
  return launch(matrices, values, vectors, sizes, count, rows, stream);
}

extern "C" int gfnode_cuda_eigh_double(const double *matrices, double *values, double *vectors,
                                       const int64_t *sizes, int64_t count, int64_t rows,
                                       void *stream) {
  return launch(matrices, values, vectors, sizes, count, rows, stream);
}

extern "C" const char *gfnode_cuda_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
