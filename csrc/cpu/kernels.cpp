// The kernels for each instruction set, and the choice at run time.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "instruction_set.h"

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
#include "powers.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward, powers_table<float>,
                        powers_table<double>};
}  // namespace baseline

#ifdef GFNODE_X86_KERNELS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define GFNODE_LANES 8
#define GFNODE_TILE_ROWS 4
#include "tile.inc"
#include "edge_layers.inc"
#include "row_mlp.inc"
#include "synthesis.inc"
#include "powers.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward, powers_table<float>,
                        powers_table<double>};
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
#include "powers.inc"
#undef GFNODE_LANES
#undef GFNODE_TILE_ROWS
#undef GFNODE_INLINE
constexpr Kernels table{egnn_forward, egnn_backward, sum_forward,    sum_backward,
                        mlp_forward,  mlp_backward,  linear_forward, linear_backward,
                        synthesis_forward, synthesis_backward, powers_table<float>,
                        powers_table<double>};
}  // namespace avx512
#pragma GCC pop_options
#endif

const Kernels &choose() {
  switch (choose_instruction_set()) {
#ifdef GFNODE_X86_KERNELS
    case InstructionSet::avx512:
      return avx512::table;
    case InstructionSet::avx2:
      return avx2::table;
#endif
    default:
      return baseline::table;
  }
}

}  // namespace

const Kernels &kernels() {
  static const Kernels &chosen = choose();
  return chosen;
}

}  // namespace gfnode
