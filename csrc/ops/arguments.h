// Tensors of the stable ABI as checked pointers, and sums over parts; for the operators of this folder.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "../cpu/activation.h"

namespace gfnode {

using torch::stable::Tensor;
using Shape = std::vector<int64_t>;

constexpr int64_t kMaxParts = 16;  // of one call; fixed, so that sums do not depend on threads

inline void check(const Tensor &tensor, const char *op, const char *name, const Shape &shape,
           torch::headeronly::ScalarType type) {
  bool matches = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; matches && i < shape.size(); ++i) matches = tensor.size(i) == shape[i];
  STD_TORCH_CHECK(matches, op, ": `", name, "` has the wrong shape, dimension 0 is ",
                  tensor.dim() ? tensor.size(0) : -1, "; expected ", shape[0]);
  STD_TORCH_CHECK(tensor.scalar_type() == type, op, ": `", name, "` has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), op, ": `", name,
                  "` must be contiguous on the CPU");
}

template <typename Real>
const Real *reals(const Tensor &tensor, const char *op, const char *name, const Shape &shape) {
  using torch::headeronly::ScalarType;
  check(tensor, op, name, shape,
        sizeof(Real) == sizeof(float) ? ScalarType::Float : ScalarType::Double);
  return static_cast<const Real *>(tensor.const_data_ptr());
}

inline const float *floats(const Tensor &tensor, const char *op, const char *name, const Shape &shape) {
  return reals<float>(tensor, op, name, shape);
}

inline const int64_t *longs(const Tensor &tensor, const char *op, const char *name, const Shape &shape) {
  check(tensor, op, name, shape, torch::headeronly::ScalarType::Long);
  return static_cast<const int64_t *>(tensor.const_data_ptr());
}

inline float *data(Tensor &tensor) { return static_cast<float *>(tensor.mutable_data_ptr()); }

inline Activation activation_of(const char *op, int64_t activation) {
  STD_TORCH_CHECK(activation == 0 || activation == 1, op, ": `activation` must be 0 or 1, got ",
                  activation);
  return static_cast<Activation>(activation);
}

inline Tensor zeros(const Tensor &like, const Shape &shape) {
  return torch::stable::new_zeros(like, shape);
}

// Float arrays of given lengths, one set per part, zero at first; added up in the order of the parts.
class PartSums {
 public:
  PartSums(int64_t parts, const Shape &lengths) : parts_(parts), offsets_{0} {
    for (const int64_t length : lengths) offsets_.push_back(offsets_.back() + length);
    data_.resize(parts * offsets_.back(), 0.0f);
  }

  float *at(int64_t part, int64_t index) {
    return data_.data() + part * offsets_.back() + offsets_[index];
  }

  // The leading (rows, columns) of array `index`, whose rows are `stride` long.
  Tensor total(const Tensor &like, int64_t index, int64_t rows, int64_t columns, int64_t stride) {
    Tensor result = zeros(like, {rows, columns});
    float *into = data(result);
    for (int64_t part = 0; part < parts_; ++part)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
          into[i * columns + j] += at(part, index)[i * stride + j];
    return result;
  }

  Tensor total(const Tensor &like, int64_t index, int64_t length) {
    Tensor result = zeros(like, {length});
    float *into = data(result);
    for (int64_t part = 0; part < parts_; ++part)
      for (int64_t i = 0; i < length; ++i) into[i] += at(part, index)[i];
    return result;
  }

 private:
  int64_t parts_;
  Shape offsets_;
  std::vector<float> data_;
};

}  // namespace gfnode
