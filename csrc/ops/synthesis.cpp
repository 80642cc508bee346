// gfnode_fast::synthesis_beside and its backward on the CPU, float32: the inverse graph Fourier
// transform of a solve, its activation, the sum with the given signal, and what stands beside it.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace {

using gfnode::data, gfnode::floats, gfnode::Shape, gfnode::Synthesis;
using torch::stable::Tensor;

Synthesis arguments(const char *op, const Tensor &values, const Tensor &eigvecs,
                    const Tensor &signal, const Tensor &beside, int64_t activation) {
  STD_TORCH_CHECK(values.dim() == 5 && eigvecs.dim() == 3 && beside.dim() == 3, op,
                  ": `values` must be (B, T, D, M, C), `eigvecs` (B, N, N), `beside` (T, B, W)");
  Synthesis p{};
  p.batch = values.size(0);
  p.times = values.size(1);
  p.components = values.size(2);
  p.modes = values.size(3);
  p.channels = values.size(4);
  p.atoms = eigvecs.size(1);
  p.activation = gfnode::activation_of(op, activation);
  STD_TORCH_CHECK(p.modes >= 1 && p.modes <= p.atoms, op, ": `values` must have 1 to ", p.atoms,
                  " modes, got ", p.modes);
  p.values = floats(values, op, "values",
                    {p.batch, p.times, p.components, p.modes, p.channels});
  p.eigvecs = floats(eigvecs, op, "eigvecs", {p.batch, p.atoms, p.atoms});
  p.signal = floats(signal, op, "signal", {p.batch, p.atoms, p.components * p.channels});
  p.beside_width = beside.size(2);
  p.beside = floats(beside, op, "beside", {p.times, p.batch, p.beside_width});
  return p;
}

Shape out_shape(const Synthesis &p) {
  return {p.times, p.batch, p.atoms, p.components * p.channels + p.beside_width};
}

Tensor synthesis(Tensor values, Tensor eigvecs, Tensor signal, Tensor beside, int64_t activation) {
  Synthesis p = arguments("synthesis_beside", values, eigvecs, signal, beside, activation);
  Tensor out = torch::stable::new_empty(values, out_shape(p));
  p.out = data(out);
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    gfnode::kernels().synthesis_forward(p, begin, end);
  });
  return out;
}

// Gradients of values, signal.
std::tuple<Tensor, Tensor> synthesis_backward(Tensor grad, Tensor values, Tensor eigvecs,
                                              Tensor signal, Tensor beside, int64_t activation) {
  const char *op = "synthesis_beside_backward";
  const Synthesis p = arguments(op, values, eigvecs, signal, beside, activation);
  Tensor grad_values = torch::stable::new_empty(
      values, Shape{p.batch, p.times, p.components, p.modes, p.channels});
  Tensor grad_signal =
      torch::stable::new_empty(values, Shape{p.batch, p.atoms, p.components * p.channels});
  const gfnode::SynthesisGrads grads{
      floats(grad, op, "grad", out_shape(p)), data(grad_values), data(grad_signal)};
  torch::stable::parallel_for(0, p.batch, 1, [&](int64_t begin, int64_t end) {
    gfnode::kernels().synthesis_backward(p, grads, begin, end);
  });
  return {grad_values, grad_signal};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def(
      "synthesis_beside(Tensor values, Tensor eigvecs, Tensor signal, Tensor beside, int "
      "activation) -> Tensor");
  m.def(
      "synthesis_beside_backward(Tensor grad, Tensor values, Tensor eigvecs, Tensor signal, Tensor "
      "beside, int activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) {
  m.impl("synthesis_beside", TORCH_BOX(&synthesis));
  m.impl("synthesis_beside_backward", TORCH_BOX(&synthesis_backward));
}
