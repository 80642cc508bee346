// The kernels for each instruction set, and the choice at run time.
#include "kernels.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <vector>

namespace gfnode {
namespace {

constexpr float kNormEpsilon = 1e-12f;

namespace baseline {  // 128-bit vectors: every x86-64 and arm64
#define GFNODE_LANES 4
#define GFNODE_TILE_ROWS 4
#include "tile.inc"
#include "edge_layers.inc"
#include "row_mlp.inc"
#include "synthesis.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward};
}  // namespace baseline

// clang has no `#pragma GCC target`; there the compiler's own flags decide.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GFNODE_X86_KERNELS

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define GFNODE_LANES 8
#define GFNODE_TILE_ROWS 4
#include "tile.inc"
#include "edge_layers.inc"
#include "row_mlp.inc"
#include "synthesis.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward};
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define GFNODE_LANES 16
#define GFNODE_TILE_ROWS 12
#include "tile.inc"
#include "edge_layers.inc"
#include "row_mlp.inc"
#include "synthesis.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward};
}  // namespace avx512
#pragma GCC pop_options
#endif

// ATen's own limit on instruction sets holds here too; a wrong value of it is ATen's to announce.
bool allowed(const char *instruction_set) {
  const char *limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (!limit || std::strcmp(limit, "avx512") == 0) return true;
  if (std::strcmp(limit, "avx2") == 0) return std::strcmp(instruction_set, "avx2") == 0;
  return std::strcmp(limit, "default") != 0;
}

const Kernels &choose() {
#ifdef GFNODE_X86_KERNELS
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return avx512::table;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::table;
#endif
  return baseline::table;
}

}  // namespace

const Kernels &kernels() {
  static const Kernels &chosen = choose();
  return chosen;
}

}  // namespace gfnode
