// gfnode_fast::synthesis and its backward on the CPU, float32: the inverse graph Fourier
// transform of a solve, its activation, the sum with the given signal, and what stands beside it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace {

using gfnode::data, gfnode::floats, gfnode::Shape, gfnode::Synthesis;
using torch::stable::Tensor;

// A call's arguments; `kernel` points into the offsets, so that this stays where it is.
struct Problem {
  Synthesis kernel{};
  bool ragged;  // whether (sum of N) atoms and (sum of N^2) entries have one dimension each
  std::vector<int64_t> first_atom{0}, first_entry;

  Problem(const char *op, const Tensor &values, const Tensor &eigvecs, const Tensor &signal,
          const Tensor &beside, int64_t activation, const std::optional<Tensor> &ptr);
  Problem(const Problem &) = delete;

  Shape signal_shape() const { return rows({}, kernel.components * kernel.channels); }
  Shape out_shape() const {
    return rows({kernel.times}, kernel.components * kernel.channels + kernel.beside_width);
  }

 private:
  Shape rows(Shape leading, int64_t width) const {
    if (!ragged) leading.push_back(kernel.batch);
    leading.push_back(ragged ? kernel.total : kernel.largest);
    leading.push_back(width);
    return leading;
  }
};

Problem::Problem(const char *op, const Tensor &values, const Tensor &eigvecs, const Tensor &signal,
                 const Tensor &beside, int64_t activation, const std::optional<Tensor> &ptr)
    : ragged(ptr.has_value()) {
  STD_TORCH_CHECK(values.dim() == 5 && eigvecs.dim() == (ragged ? 1 : 3) && beside.dim() == 3, op,
                  ": `values` must be (B, T, D, M, C), `eigvecs` ",
                  ragged ? "(sum of N^2)" : "(B, N, N)", ", `beside` (T, B, W)");
  Synthesis &p = kernel;
  p.batch = values.size(0);
  p.times = values.size(1);
  p.components = values.size(2);
  p.modes = values.size(3);
  p.channels = values.size(4);
  p.activation = gfnode::activation_of(op, activation);
  const int64_t *offsets = ragged ? gfnode::longs(*ptr, op, "ptr", {p.batch + 1}) : nullptr;
  STD_TORCH_CHECK(!ragged || offsets[0] == 0, op, ": `ptr` must begin with 0, got ",
                  ragged ? offsets[0] : 0);
  int64_t entries = 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t atoms = ragged ? offsets[b + 1] - offsets[b] : eigvecs.size(1);
    STD_TORCH_CHECK(atoms >= 0, op, ": `ptr` must ascend, got ", atoms, " atoms of molecule ", b);
    first_entry.push_back(entries);
    first_atom.push_back(first_atom.back() + atoms);
    entries += atoms * atoms;
    p.largest = std::max(p.largest, atoms);
  }
  if (!ragged) p.largest = eigvecs.size(1);
  p.total = first_atom.back();
  p.first_atom = first_atom.data();
  p.first_entry = first_entry.data();
  STD_TORCH_CHECK(p.modes >= 1, op, ": `values` must have modes, got none");
  STD_TORCH_CHECK(ragged || p.modes <= p.largest, op, ": `values` must have 1 to ", p.largest,
                  " modes, got ", p.modes);
  p.values = floats(values, op, "values",
                    {p.batch, p.times, p.components, p.modes, p.channels});
  p.eigvecs = floats(eigvecs, op, "eigvecs",
                     ragged ? Shape{entries} : Shape{p.batch, p.largest, p.largest});
  p.signal = floats(signal, op, "signal", signal_shape());
  p.beside_width = beside.size(2);
  p.beside = floats(beside, op, "beside", {p.times, p.batch, p.beside_width});
}

Tensor synthesis(Tensor values, Tensor eigvecs, Tensor signal, Tensor beside, int64_t activation,
                 std::optional<Tensor> ptr) {
  Problem problem("synthesis", values, eigvecs, signal, beside, activation, ptr);
  Tensor out = torch::stable::new_empty(values, problem.out_shape());
  problem.kernel.out = data(out);
  torch::stable::parallel_for(0, problem.kernel.batch, 1, [&](int64_t begin, int64_t end) {
    gfnode::kernels().synthesis_forward(problem.kernel, begin, end);
  });
  return out;
}

// Gradients of values, signal.
std::tuple<Tensor, Tensor> synthesis_backward(Tensor grad, Tensor values, Tensor eigvecs,
                                              Tensor signal, Tensor beside, int64_t activation,
                                              std::optional<Tensor> ptr) {
  const char *op = "synthesis_backward";
  const Problem problem(op, values, eigvecs, signal, beside, activation, ptr);
  const Synthesis &p = problem.kernel;
  Tensor grad_values = torch::stable::new_empty(
      values, Shape{p.batch, p.times, p.components, p.modes, p.channels});
  Tensor grad_signal = torch::stable::new_empty(values, problem.signal_shape());
  const gfnode::SynthesisGrads grads{floats(grad, op, "grad", problem.out_shape()),
                                     data(grad_values), data(grad_signal)};
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    gfnode::kernels().synthesis_backward(p, grads, begin, end);
  });
  return {grad_values, grad_signal};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def(
      "synthesis(Tensor values, Tensor eigvecs, Tensor signal, Tensor beside, int "
      "activation, Tensor? ptr=None) -> Tensor");
  m.def(
      "synthesis_backward(Tensor grad, Tensor values, Tensor eigvecs, Tensor signal, Tensor "
      "beside, int activation, Tensor? ptr=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) {
  m.impl("synthesis", TORCH_BOX(&synthesis));
  m.impl("synthesis_backward", TORCH_BOX(&synthesis_backward));
}
