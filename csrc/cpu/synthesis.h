// The inverse graph Fourier transform at T times with what follows it:
//   out[t, b, n, dc] = act(sum_m U[b, n, m] modes[b, t, d, m, c]) + signal[b, n, dc]
// and, after the D C channels, what stands beside them, the same for all atoms of a molecule: the
// decoder's first input in one piece. Molecules may differ in size: one of fewer atoms than modes has
// none of the later modes. Raw pointers in, no torch headers.
//
// A molecule's modes at one time and its (N, D C) sums stay in cache; the output is written once and
// nothing of its size is kept: backward forms the argument of the activation again. 2 N M D C flops
// per molecule and time forward, twice that backward, beside the activation.
#pragma once
#include "activation.h"

namespace gfnode {

struct Synthesis {
  int64_t times, batch, modes, components, channels, beside_width;  // W
  int64_t total, largest;                                           // atoms: of all, of one at most
  Activation activation;
  const int64_t *first_atom;   // (B + 1), among all atoms
  const int64_t *first_entry;  // (B), of the molecule's N x N among all eigvecs
  const float *values;         // (B, T, D, M, C), as a solve gives it
  const float *eigvecs;        // (sum of N^2), eigenvectors in columns
  const float *signal;         // (total, D C)
  const float *beside;         // (T, B, W)
  float *out;                  // (T, total, D C + W)
};

struct SynthesisGrads {
  const float *out;        // (T, total, D C + W)
  float *values, *signal;  // as above, written
};

}  // namespace gfnode
