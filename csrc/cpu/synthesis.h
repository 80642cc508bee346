// The inverse graph Fourier transform at T times with what follows it:
//   out[t, b, n, dc] = act(sum_m U[b, n, m] modes[b, t, d, m, c]) + signal[b, n, dc]
// and, after the D C channels, what stands beside them, the same for all atoms of a molecule: the
// decoder's first input in one piece. Raw pointers in, no torch headers.
//
// A molecule's modes at one time and its (N, D C) sums stay in cache; the output is written once and
// nothing of its size is kept: backward forms the argument of the activation again. 2 N M D C flops
// per molecule and time forward, twice that backward, beside the activation.
#pragma once
#include "activation.h"

namespace gfnode {

struct Synthesis {
  int64_t times, batch, atoms, modes, components, channels, beside_width;  // W
  Activation activation;
  const float *values;   // (B, T, D, M, C), as a solve gives it
  const float *eigvecs;  // (B, N, N), eigenvectors in columns
  const float *signal;   // (B, N, D C)
  const float *beside;   // (T, B, W)
  float *out;            // (T, B, N, D C + W)
};

struct SynthesisGrads {
  const float *out;       // (T, B, N, D C + W)
  float *values, *signal;  // as above, written
};

}  // namespace gfnode
