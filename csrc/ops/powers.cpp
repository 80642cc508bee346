// gfnode_fast::powers_*: powers of linear dynamics on a state, readings and step control from them,
// and their adjoints, on the CPU in float32 and float64. What each computes: ../cpu/powers.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace {

using gfnode::padded, gfnode::reals, gfnode::Shape;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRowsPerPart = 192, kMoleculesPerPart = 32, kNumbersPerPart = 1 << 15;

// Equal ranges of `count` things, a function of their number alone.
template <typename Work>
void for_each_part(int64_t count, int64_t parts, const Work &work) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      work(part, count * part / parts, count * (part + 1) / parts);
  });
}

int64_t parts_of(int64_t count, int64_t least) {
  return std::clamp<int64_t>(count / least, 1, gfnode::kMaxParts);
}

template <typename Real>
const gfnode::PowersKernels<Real> &powers_kernels() {
  if constexpr (sizeof(Real) == sizeof(float))
    return gfnode::kernels().powers;
  else
    return gfnode::kernels().powers_double;
}

template <typename Real>
Real *written(const Tensor &tensor, const char *op, const char *name, const Shape &shape) {
  return const_cast<Real *>(reals<Real>(tensor, op, name, shape));
}

// Calls `work` with a zero of the tensor's type.
template <typename Work>
auto by_type(const Tensor &tensor, const char *op, const Work &work) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == ScalarType::Float || tensor.scalar_type() == ScalarType::Double, op,
      ": must be of float32 or float64");
  return tensor.scalar_type() == ScalarType::Float ? work(0.0f) : work(0.0);
}

void check_dims(const char *op, const char *name, const Tensor &tensor, int64_t dims,
                const char *shape) {
  STD_TORCH_CHECK(tensor.dim() == dims, op, ": `", name, "` must be ", shape, ", got ", tensor.dim(),
                  " dimensions");
}

Shape sizes(const Tensor &tensor) {
  Shape shape;
  for (int64_t i = 0; i < tensor.dim(); ++i) shape.push_back(tensor.size(i));
  return shape;
}

template <typename Real>
gfnode::Powers<Real> dynamics(const char *op, const Tensor &buffer, const Tensor &weight) {
  check_dims(op, "buffer", buffer, 4, "(K+1, R, M, C)");
  gfnode::Powers<Real> p{};
  p.degree = buffer.size(0) - 1;
  p.rows = buffer.size(1);
  p.modes = buffer.size(2);
  p.channels = buffer.size(3);
  STD_TORCH_CHECK(p.degree >= 1, op, ": `buffer` must hold 2 powers or more, got ", p.degree + 1);
  reals<Real>(weight, op, "weight", {p.modes, p.channels, p.channels});
  return p;
}

// W of each mode, or its transpose, rows padded with zeros.
template <typename Real>
std::vector<Real> packed(const Real *weight, int64_t modes, int64_t channels, bool transpose) {
  const int64_t P = padded(channels);
  std::vector<Real> result(modes * channels * P);
  for (int64_t m = 0; m < modes; ++m)
    for (int64_t i = 0; i < channels; ++i, weight += channels)
      for (int64_t j = 0; j < channels; ++j)
        result[(m * channels + (transpose ? j : i)) * P + (transpose ? i : j)] = weight[j];
  return result;
}

void powers_fill(Tensor buffer, Tensor weight, std::optional<Tensor> slope, double time, int64_t first) {
  const char *op = "powers_fill";
  by_type(buffer, op, [&](auto zero) {
    using Real = decltype(zero);
    gfnode::Powers<Real> p = dynamics<Real>(op, buffer, weight);
    STD_TORCH_CHECK(0 <= first && first <= p.degree, op, ": `first` must be 0 ... ", p.degree,
                    ", got ", first);
    p.buffer = written<Real>(buffer, op, "buffer", sizes(buffer));
    const auto rows =
        packed(static_cast<const Real *>(weight.const_data_ptr()), p.modes, p.channels, false);
    p.weight = rows.data();
    p.slope = slope ? reals<Real>(*slope, op, "slope", {p.modes, p.channels}) : nullptr;
    p.time = static_cast<Real>(time);
    p.first = first;
    for_each_part(p.rows, parts_of(p.rows, kRowsPerPart), [&](int64_t, int64_t begin, int64_t end) {
      powers_kernels<Real>().fill(p, begin, end);
    });
  });
}

// Gradients of W and b, the latter (0,) unless wanted; `grad[0]` becomes that of the state, and
// `grad[1]` that of P_1 if b's is wanted.
std::tuple<Tensor, Tensor> powers_pull(Tensor buffer, Tensor grad, Tensor weight, double time,
                                bool wants_slope) {
  const char *op = "powers_pull";
  return by_type(buffer, op, [&](auto zero) {
    using Real = decltype(zero);
    gfnode::Powers<Real> p = dynamics<Real>(op, buffer, weight);
    p.time = static_cast<Real>(time);
    const auto transposed =
        packed(static_cast<const Real *>(weight.const_data_ptr()), p.modes, p.channels, true);
    const int64_t P = padded(p.channels), parts = parts_of(p.rows, kRowsPerPart);
    const int64_t of_weight = p.modes * P * P, of_slope = wants_slope ? p.modes * P : 0;
    std::vector<Real> sums(parts * (of_weight + of_slope));
    p.buffer = written<Real>(buffer, op, "buffer", sizes(buffer));
    const gfnode::PowersGrads<Real> shared{
        transposed.data(), written<Real>(grad, op, "grad", sizes(buffer)), nullptr, nullptr};
    for_each_part(p.rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
      gfnode::PowersGrads<Real> g = shared;
      g.weight = sums.data() + part * (of_weight + of_slope);
      if (wants_slope) g.slope = g.weight + of_weight;
      powers_kernels<Real>().pull(p, g, begin, end);
    });
    Tensor grad_weight = torch::stable::new_zeros(weight, Shape{p.modes, p.channels, p.channels});
    Tensor grad_slope = torch::stable::new_zeros(
        weight, wants_slope ? Shape{p.modes, p.channels} : Shape{0});
    Real *into = static_cast<Real *>(grad_weight.mutable_data_ptr());
    Real *into_slope = static_cast<Real *>(grad_slope.mutable_data_ptr());
    for (int64_t part = 0; part < parts; ++part) {
      const Real *from = sums.data() + part * (of_weight + of_slope);
      for (int64_t m = 0; m < p.modes; ++m)
        for (int64_t i = 0; i < p.channels; ++i)
          for (int64_t j = 0; j < p.channels; ++j)
            into[(m * p.channels + i) * p.channels + j] += from[(m * P + i) * P + j];
      if (!wants_slope) continue;
      for (int64_t m = 0; m < p.modes; ++m)
        for (int64_t j = 0; j < p.channels; ++j)
          into_slope[m * p.channels + j] += from[of_weight + m * P + j];
    }
    return std::tuple<Tensor, Tensor>{grad_weight, grad_slope};
  });
}

template <typename Real>
gfnode::Readings<Real> readings(const char *op, const Tensor &buffer, const Tensor &weights,
                                const Tensor &values) {
  check_dims(op, "buffer", buffer, 4, "(K+1, R, M, C)");
  check_dims(op, "weights", weights, 3, "(B, T, K+1)");
  gfnode::Readings<Real> p{};
  p.batch = weights.size(0);
  p.times = weights.size(1);
  p.powers = buffer.size(0);
  const int64_t numbers = buffer.size(1) * buffer.size(2) * buffer.size(3);
  STD_TORCH_CHECK(p.batch ? buffer.size(1) % p.batch == 0 : numbers == 0, op,
                  ": `buffer` must have a multiple of ", p.batch, " rows, got ", buffer.size(1));
  p.width = p.batch ? numbers / p.batch : 0;
  p.weights = reals<Real>(weights, op, "weights", {p.batch, p.times, p.powers});
  reals<Real>(buffer, op, "buffer", sizes(buffer));
  if (p.batch) reals<Real>(values, op, "values", {p.batch, p.times, p.width});
  p.buffer = static_cast<Real *>(const_cast<void *>(buffer.const_data_ptr()));
  p.values = static_cast<Real *>(const_cast<void *>(values.const_data_ptr()));
  return p;
}

void powers_read(Tensor buffer, Tensor weights, Tensor values, bool add) {
  const char *op = "powers_read";
  by_type(buffer, op, [&](auto zero) {
    using Real = decltype(zero);
    auto p = readings<Real>(op, buffer, weights, values);
    p.add = add;
    for_each_part(p.batch, parts_of(p.batch, kMoleculesPerPart),
                  [&](int64_t, int64_t begin, int64_t end) {
                    powers_kernels<Real>().read(p, begin, end);
                  });
  });
}

// The gradient of `buffer`, of which only the shape is used, from that of the values.
Tensor powers_pull_readings(Tensor buffer, Tensor weights, Tensor grad_values) {
  const char *op = "powers_pull_readings";
  return by_type(buffer, op, [&](auto zero) {
    using Real = decltype(zero);
    auto p = readings<Real>(op, buffer, weights, grad_values);
    Tensor grad = torch::stable::new_empty(buffer, sizes(buffer));
    p.buffer = static_cast<Real *>(grad.mutable_data_ptr());
    for_each_part(p.batch, parts_of(p.batch, kMoleculesPerPart),
                  [&](int64_t, int64_t begin, int64_t end) {
                    powers_kernels<Real>().pull_readings(p, begin, end);
                  });
    return grad;
  });
}

// (B, T, K+1) in the type of `like` from times (B, T) and a table (terms, K+1), both float64.
Tensor powers_weights(Tensor times, Tensor table, double start, double size, double end,
                      Tensor like) {
  const char *op = "powers_weights";
  check_dims(op, "times", times, 2, "(B, T)");
  check_dims(op, "table", table, 2, "(terms, K+1)");
  return by_type(like, op, [&](auto zero) {
    using Real = decltype(zero);
    const int64_t count = times.size(0) * times.size(1);
    gfnode::Weighing<Real> p{};
    p.terms = table.size(0);
    p.powers = table.size(1);
    p.times = reals<double>(times, op, "times", sizes(times));
    const double *rows = reals<double>(table, op, "table", {p.terms, p.powers});
    std::vector<double> wide(p.terms * padded(p.powers));
    for (int64_t term = 0; term < p.terms; ++term)
      std::copy_n(rows + term * p.powers, p.powers, wide.data() + term * padded(p.powers));
    p.table = wide.data();
    p.start = start;
    p.size = size;
    p.end = end;
    Tensor weights =
        torch::stable::new_empty(like, Shape{times.size(0), times.size(1), p.powers});
    p.weights = static_cast<Real *>(weights.mutable_data_ptr());
    for_each_part(count, parts_of(count, kNumbersPerPart / 8),
                  [&](int64_t, int64_t begin, int64_t end) {
                    powers_kernels<Real>().weigh(p, begin, end);
                  });
    return weights;
  });
}

// sum_k table[0, k] P_k, and the mean squares (n,) float64 of all such sums relative to tolerance.
std::tuple<Tensor, Tensor> powers_measure(Tensor buffer, Tensor table, double rtol, double atol) {
  const char *op = "powers_measure";
  return by_type(buffer, op, [&](auto zero) {
    using Real = decltype(zero);
    check_dims(op, "buffer", buffer, 4, "(K+1, R, M, C)");
    check_dims(op, "table", table, 2, "(n, K+1)");
    gfnode::Measure<Real> p{};
    p.count = table.size(0);
    p.powers = buffer.size(0);
    p.size = buffer.size(1) * buffer.size(2) * buffer.size(3);
    p.table = reals<Real>(table, op, "table", {p.count, p.powers});
    p.buffer = reals<Real>(buffer, op, "buffer", sizes(buffer));
    p.rtol = static_cast<Real>(rtol);
    p.atol = static_cast<Real>(atol);
    Tensor combined = torch::stable::new_empty(
        buffer, Shape{buffer.size(1), buffer.size(2), buffer.size(3)});
    Tensor squares = torch::stable::new_zeros(buffer, Shape{p.count}, ScalarType::Double);
    p.combined = static_cast<Real *>(combined.mutable_data_ptr());
    const int64_t parts = parts_of(p.size, kNumbersPerPart);
    std::vector<double> sums(parts * p.count);
    for_each_part(p.size, parts, [&](int64_t part, int64_t begin, int64_t end) {
      powers_kernels<Real>().measure(p, sums.data() + part * p.count, begin, end);
    });
    double *into = static_cast<double *>(squares.mutable_data_ptr());
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < p.count; ++i) into[i] += sums[part * p.count + i] / p.size;
    return std::tuple<Tensor, Tensor>{combined, squares};
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def(
      "powers_fill(Tensor(a!) buffer, Tensor weight, Tensor? slope, float time, int first) -> ()");
  m.def(
      "powers_pull(Tensor buffer, Tensor(a!) grad, Tensor weight, float time, bool wants_slope) -> "
      "(Tensor, Tensor)");
  m.def("powers_read(Tensor buffer, Tensor weights, Tensor(a!) values, bool add) -> ()");
  m.def("powers_pull_readings(Tensor buffer, Tensor weights, Tensor grad_values) -> Tensor");
  m.def(
      "powers_weights(Tensor times, Tensor table, float start, float size, float end, Tensor like) "
      "-> Tensor");
  m.def("powers_measure(Tensor buffer, Tensor table, float rtol, float atol) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) {
  m.impl("powers_fill", TORCH_BOX(&powers_fill));
  m.impl("powers_pull", TORCH_BOX(&powers_pull));
  m.impl("powers_read", TORCH_BOX(&powers_read));
  m.impl("powers_pull_readings", TORCH_BOX(&powers_pull_readings));
  m.impl("powers_weights", TORCH_BOX(&powers_weights));
  m.impl("powers_measure", TORCH_BOX(&powers_measure));
}
