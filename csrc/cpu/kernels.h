// The CPU kernels, compiled for several instruction sets.
#pragma once
#include "edge_layers.h"
#include "powers.h"
#include "row_mlp.h"
#include "synthesis.h"

namespace gfnode {

// `begin`, `end`: edges of every copy, rows, or molecules.
struct Kernels {
  void (*egnn_forward)(const EgnnEdges &, int64_t begin, int64_t end);
  void (*egnn_backward)(const EgnnEdges &, const EgnnGrads &, const EgnnWeightGrads &, int64_t begin,
                        int64_t end);
  void (*sum_forward)(const SumEdges &, int64_t begin, int64_t end);
  void (*sum_backward)(const SumEdges &, int64_t begin, int64_t end);
  void (*mlp_forward)(const RowMlp &, int64_t begin, int64_t end);
  void (*mlp_backward)(const RowMlp &, const RowMlpGrads &, int64_t begin, int64_t end);
  void (*linear_forward)(const RowLinear &, int64_t begin, int64_t end);
  void (*linear_backward)(const RowLinear &, float *weight, int64_t begin, int64_t end);
  void (*synthesis_forward)(const Synthesis &, int64_t begin, int64_t end);
  void (*synthesis_backward)(const Synthesis &, const SynthesisGrads &, int64_t begin, int64_t end);
  PowersKernels<float> powers;
  PowersKernels<double> powers_double;
};

// Those of the widest instruction set this processor has.
const Kernels &kernels();

}  // namespace gfnode
