// gfnode_fast::row_mlp, row_linear and their backward on the CPU, float32: Linear → activation →
// Linear, and one product, on rows.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace {

using gfnode::data, gfnode::floats, gfnode::padded, gfnode::PartSums, gfnode::RowLinear, gfnode::RowMlp;
using torch::stable::Tensor;

constexpr int64_t kRowsPerPart = 512;  // at least

// `matrix` (rows, columns), or its transpose, with zero columns up to `stride`.
std::vector<float> packed(const float *matrix, int64_t rows, int64_t columns, int64_t stride,
                          bool transpose) {
  std::vector<float> result((transpose ? columns : rows) * stride, 0.0f);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      result[transpose ? j * stride + i : i * stride + j] = matrix[i * columns + j];
  return result;
}

struct Arguments {
  RowMlp p;
  int64_t rows;
  std::vector<float> w0t, b0, w2t, b2;

  Arguments(const char *op, const Tensor &a, const Tensor &b, const Tensor &w0, const Tensor &b0_,
            const Tensor &w2, const Tensor &b2_, int64_t activation) {
    STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && w0.dim() == 2 && w2.dim() == 2, op,
                    ": `a`, `b`, `w0` and `w2` must be matrices");
    rows = a.size(0);
    p.a_width = a.size(1);
    p.b_width = b.size(1);
    p.hidden = w0.size(0);
    p.out = w2.size(0);
    p.activation = gfnode::activation_of(op, activation);
    p.a = floats(a, op, "a", {rows, p.a_width});
    p.b = floats(b, op, "b", {rows, p.b_width});
    const int64_t in = p.a_width + p.b_width, Q = padded(p.hidden), R = padded(p.out);
    w0t = packed(floats(w0, op, "w0", {p.hidden, in}), p.hidden, in, Q, true);
    b0 = packed(floats(b0_, op, "b0", {p.hidden}), 1, p.hidden, Q, false);
    w2t = packed(floats(w2, op, "w2", {p.out, p.hidden}), p.out, p.hidden, R, true);
    b2 = packed(floats(b2_, op, "b2", {p.out}), 1, p.out, R, false);
    p.w0t = w0t.data();
    p.b0 = b0.data();
    p.w2t = w2t.data();
    p.b2 = b2.data();
    p.z = p.result = nullptr;
  }
};

// Equal ranges of rows, a function of their number alone.
template <typename Work>
void for_each_part(int64_t rows, int64_t parts, const Work &work) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part)
      work(part, rows * part / parts, rows * (part + 1) / parts);
  });
}

int64_t parts_of(int64_t rows) {
  return std::clamp<int64_t>(rows / kRowsPerPart, 1, gfnode::kMaxParts);
}

std::tuple<Tensor, Tensor> row_mlp(Tensor a, Tensor b, Tensor w0, Tensor b0, Tensor w2, Tensor b2,
                                   int64_t activation, bool keep) {
  Arguments arguments("row_mlp", a, b, w0, b0, w2, b2, activation);
  RowMlp &p = arguments.p;
  Tensor result = torch::stable::new_empty(a, gfnode::Shape{arguments.rows, p.out});
  Tensor z = torch::stable::new_empty(
      a, gfnode::Shape{keep ? arguments.rows : 0, padded(p.hidden)});
  p.result = data(result);
  if (keep) p.z = data(z);
  for_each_part(arguments.rows, parts_of(arguments.rows), [&](int64_t, int64_t begin, int64_t end) {
    gfnode::kernels().mlp_forward(p, begin, end);
  });
  return {result, z};
}

// Gradients of a, b, w0, b0, w2, b2.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_mlp_backward(
    Tensor grad, Tensor a, Tensor b, Tensor w0, Tensor b0, Tensor w2, Tensor b2, Tensor z,
    int64_t activation) {
  const char *op = "row_mlp_backward";
  Arguments arguments(op, a, b, w0, b0, w2, b2, activation);
  RowMlp &p = arguments.p;
  const int64_t rows = arguments.rows, in = p.a_width + p.b_width;
  const int64_t P = padded(in), Q = padded(p.hidden), R = padded(p.out);
  p.z = const_cast<float *>(floats(z, op, "z", {rows, Q}));
  const std::vector<float> weight0 =
      packed(static_cast<const float *>(w0.const_data_ptr()), p.hidden, in, P, false);
  const std::vector<float> weight2 =
      packed(static_cast<const float *>(w2.const_data_ptr()), p.out, p.hidden, Q, false);
  Tensor grad_a = torch::stable::new_empty(a, gfnode::Shape{rows, p.a_width});
  Tensor grad_b = torch::stable::new_empty(b, gfnode::Shape{rows, p.b_width});
  const float *grad_result = floats(grad, op, "grad", {rows, p.out});

  enum { kW0, kB0, kW2, kB2 };
  const int64_t parts = parts_of(rows);
  PartSums sums(parts, {Q * P, Q, R * Q, R});
  float *into_a = data(grad_a), *into_b = data(grad_b);
  for_each_part(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    const gfnode::RowMlpGrads grads{grad_result,         weight0.data(),      weight2.data(),
                                    into_a,              into_b,              sums.at(part, kW0),
                                    sums.at(part, kB0),  sums.at(part, kW2),  sums.at(part, kB2)};
    gfnode::kernels().mlp_backward(p, grads, begin, end);
  });
  return {grad_a,
          grad_b,
          sums.total(a, kW0, p.hidden, in, P),
          sums.total(a, kB0, p.hidden),
          sums.total(a, kW2, p.out, p.hidden, Q),
          sums.total(a, kB2, p.out)};
}

Tensor row_linear(Tensor a, Tensor w) {
  STD_TORCH_CHECK(a.dim() == 2 && w.dim() == 2, "row_linear: `a` and `w` must be matrices");
  const int64_t rows = a.size(0);
  RowLinear p{};
  p.in = a.size(1);
  p.out = w.size(0);
  p.a = floats(a, "row_linear", "a", {rows, p.in});
  const std::vector<float> wt =
      packed(floats(w, "row_linear", "w", {p.out, p.in}), p.out, p.in, padded(p.out), true);
  p.wt = wt.data();
  Tensor result = torch::stable::new_empty(a, gfnode::Shape{rows, p.out});
  p.result = data(result);
  for_each_part(rows, parts_of(rows), [&](int64_t, int64_t begin, int64_t end) {
    gfnode::kernels().linear_forward(p, begin, end);
  });
  return result;
}

// Gradients of a, w.
std::tuple<Tensor, Tensor> row_linear_backward(Tensor grad, Tensor a, Tensor w) {
  const char *op = "row_linear_backward";
  STD_TORCH_CHECK(a.dim() == 2 && w.dim() == 2, op, ": `a` and `w` must be matrices");
  const int64_t rows = a.size(0), parts = parts_of(rows);
  RowLinear p{};
  p.in = a.size(1);
  p.out = w.size(0);
  p.a = floats(a, op, "a", {rows, p.in});
  p.grad = floats(grad, op, "grad", {rows, p.out});
  const int64_t P = padded(p.in);
  const std::vector<float> weight =
      packed(floats(w, op, "w", {p.out, p.in}), p.out, p.in, P, false);
  p.w = weight.data();
  Tensor grad_a = torch::stable::new_empty(a, gfnode::Shape{rows, p.in});
  p.grad_a = data(grad_a);
  PartSums sums(parts, {padded(p.out) * P});
  for_each_part(rows, parts, [&](int64_t part, int64_t begin, int64_t end) {
    gfnode::kernels().linear_backward(p, sums.at(part, 0), begin, end);
  });
  return {grad_a, sums.total(a, 0, p.out, p.in, P)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def(
      "row_mlp(Tensor a, Tensor b, Tensor w0, Tensor b0, Tensor w2, Tensor b2, int activation, "
      "bool keep) -> (Tensor, Tensor)");
  m.def(
      "row_mlp_backward(Tensor grad, Tensor a, Tensor b, Tensor w0, Tensor b0, Tensor w2, Tensor "
      "b2, Tensor z, int activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("row_linear(Tensor a, Tensor w) -> Tensor");
  m.def("row_linear_backward(Tensor grad, Tensor a, Tensor w) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) {
  m.impl("row_mlp", TORCH_BOX(&row_mlp));
  m.impl("row_mlp_backward", TORCH_BOX(&row_mlp_backward));
  m.impl("row_linear", TORCH_BOX(&row_linear));
  m.impl("row_linear_backward", TORCH_BOX(&row_linear_backward));
}
