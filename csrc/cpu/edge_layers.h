// The edge phase of the graph layers on a CPU: raw pointers in, no torch headers.
//
// EGNN, for edge e = (row i, col j) of every copy t, H, W, C hidden, message and coordinate width:
//   r = x_i - x_j;  q = |r|²  (norm: q / max(q, 1e-12))
//   z1 = node_i[:H] + node_j[H:] + edge_e + q wq;  a1 = act(z1)
//   m  = act(z2), z2 = W2 a1 + b2;  a3 = act(z3), z3 = Wc m + bc;  f = wo·a3 + bo
//   sum_i += m;  shift_i += r f
// GraphSAGE and GCN: sum_i += act(z1) without q.
//
// One range of edges owns whole connected parts of the graph, so it alone writes to their nodes, in
// the order of the edges: no atomics, and the same bits for any number of threads. All copies of an
// edge belong to the same range, whose sum over copies is local too. The tile of edges between two
// products stays in cache. Flops per edge: 2 (H W + W C) forward, four times that backward and half
// of it again when z2, z3 were not kept. Bytes: node states, plus 8 (W + C) per edge when kept.
#pragma once
#include "activation.h"

namespace gfnode {

struct Graph {
  int64_t copies, nodes, edges;
  const int64_t *row, *col;  // (E) sorted by row
};

struct EgnnEdges {
  Graph graph;
  int64_t hidden, width, coordinate;  // H, W, C
  Activation activation;
  bool norm;
  const float *x;     // (T, n, 3)
  const float *node;  // (T, n, 2H)
  const float *edge;  // (E, H)
  const float *wq, *w2, *b2, *wc, *bc, *wo, *bo;  // (H) (W, H) (W) (C, W) (C) (C) (1)
  const float *w2t, *wct;                         // transposed
  float *sum, *shift;                             // (T, n, W) (T, n, 3); zero before forward
  float *z2, *z3;                                 // (T, E, W) (T, E, C), or null: not kept
};

// Sums over one range; the caller adds those of all ranges in order.
struct EgnnWeightGrads {
  float *wq, *w2, *b2, *wc, *bc, *wo, *bo;
};

struct EgnnGrads {
  const float *sum, *shift;   // (T, n, W) (T, n, 3)
  float *x, *node, *edge;     // (T, n, 3) (T, n, 2H) (E, H), zero before
};

struct SumEdges {
  Graph graph;
  int64_t hidden;
  Activation activation;
  const float *node, *edge;  // (T, n, 2H) (E, H)
  float *sum;                // (T, n, H), zero before forward
  const float *grad_sum;     // backward only
  float *grad_node, *grad_edge;
};

}  // namespace gfnode
