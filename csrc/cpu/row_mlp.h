// On every row, an MLP: out = W2 act(z) + b2, z = W0 [a, b] + b0; or a product: out = W a. Raw
// pointers in, no torch headers.
//
// A tile of rows stays in cache from the inputs to the output. Widths are padded with zeros, to P, Q
// and R, in the weights and in the tile, never in the caller's a, b and out. Flops per row:
// 2 (in H + H out) forward, twice that backward. Weight gradients are sums over one range of rows.
#pragma once
#include "activation.h"

namespace gfnode {

struct RowMlp {
  int64_t a_width, b_width, hidden, out;  // true widths; in = a_width + b_width
  Activation activation;
  const float *a, *b;                  // (rows, a_width) (rows, b_width)
  const float *w0t, *b0, *w2t, *b2;    // (in, Q) (Q) (H, R) (R): transposed, padded
  float *z;                            // (rows, Q) kept for backward, or null
  float *result;                       // (rows, out)
};

struct RowMlpGrads {
  const float *result;          // (rows, out)
  const float *w0, *w2;         // (H, P) (out, Q): as given, padded
  float *a, *b;                 // (rows, a_width) (rows, b_width), written
  float *weight0, *bias0, *weight2, *bias2;  // (Q, P) (Q) (R, Q) (R), added to
};

struct RowLinear {
  int64_t in, out;
  const float *a;       // (rows, in)
  const float *wt;      // (in, R), padded
  float *result;        // (rows, out)
  // Backward only:
  const float *grad;    // (rows, out)
  const float *w;       // (out, P), padded
  float *grad_a;        // (rows, in), written
};

}  // namespace gfnode
