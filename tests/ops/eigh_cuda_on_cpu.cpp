// The kernels of csrc/cuda/eigh_kernels.cuh as functions for the CPU.
#include "cuda_on_cpu.h"

namespace gfnode {
alignas(16) static unsigned char shared[1 << 18];
}

#include "cuda/eigh_kernels.cuh"

template <typename Real>
static void run(const Real *matrices, Real *values, Real *vectors, const int64_t *sizes,
                int64_t count, int64_t rows, int width) {
  using namespace gfnode;
  const auto warps = [&](auto kernel) {
    const int64_t together = kWarpKernelThreads / width;
    cuda_on_cpu::launch((count + together - 1) / together, kWarpKernelThreads,
                        [&] { kernel(matrices, values, vectors, sizes, count, int(rows)); });
  };
  if (width == 8) return warps(eigh_warp_kernel<Real, 8>);
  if (width == 16) return warps(eigh_warp_kernel<Real, 16>);
  if (width == 32) return warps(eigh_warp_kernel<Real, 32>);
  cuda_on_cpu::launch(count, kBlockKernelThreads, [&] {
    eigh_block_kernel<Real>(matrices, values, vectors, sizes, int(rows));
  });
}

#define GFNODE_EXPORT(name, Real)                                                                \
  extern "C" void name(const Real *matrices, Real *values, Real *vectors, const int64_t *sizes,  \
                       int64_t count, int64_t rows, int width) {                                 \
    run(matrices, values, vectors, sizes, count, rows, width);                                   \
  }

GFNODE_EXPORT(eigh_float, float)
GFNODE_EXPORT(eigh_double, double)
