// What the operators and the kernels agree on.
#pragma once
#include <cstdint>

namespace gfnode {

constexpr int64_t kWidthMultiple = 16;  // of the rows that products write: the longest vector

inline int64_t padded(int64_t width) {
  return (width + kWidthMultiple - 1) / kWidthMultiple * kWidthMultiple;
}

enum class Activation : int64_t { silu = 0, tanh = 1 };

}  // namespace gfnode
