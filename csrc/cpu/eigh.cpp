// The eigensolver for each instruction set, and the choice at run time.
#include "eigh.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "instruction_set.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

#define GFNODE_INLINE static GFNODE_INLINE_MEMBER
#define GFNODE_INLINE_MEMBER inline __attribute__((always_inline))

namespace gfnode {
namespace {

namespace baseline {  // 128-bit vectors: every x86-64 and arm64
#define GFNODE_LANES 4
#include "eigh_vectors.inc"
#include "eigh_tridiagonal.inc"
#include "eigh_ql.inc"
#include "eigh.inc"
#undef GFNODE_LANES
}  // namespace baseline

#ifdef GFNODE_X86_KERNELS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#define GFNODE_LANES 8
#include "eigh_vectors.inc"
#include "eigh_tridiagonal.inc"
#include "eigh_ql.inc"
#include "eigh.inc"
#undef GFNODE_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma,prefer-vector-width=512")
namespace avx512 {
#define GFNODE_LANES 16
#include "eigh_vectors.inc"
#include "eigh_tridiagonal.inc"
#include "eigh_ql.inc"
#include "eigh.inc"
#undef GFNODE_LANES
}  // namespace avx512
#pragma GCC pop_options
#endif

const EighKernels &choose() {
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

const EighKernels &eigh_kernels() {
  static const EighKernels &chosen = choose();
  return chosen;
}

}  // namespace gfnode
