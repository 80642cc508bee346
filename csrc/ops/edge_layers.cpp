// gfnode_fast::egnn_edges, egnn_edges_backward, sum_edges, sum_edges_backward on the CPU, float32.
//
// Shapes and checks of what the Python side (gfnode_fast/ops/graph_layers_cpp.py) passes, the
// division of the edges among threads, and the sum of the weight gradients over its parts.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace {

using gfnode::EgnnEdges;
using gfnode::Graph;
using gfnode::SumEdges;
using gfnode::activation_of, gfnode::check, gfnode::data, gfnode::floats, gfnode::longs;
using gfnode::PartSums, gfnode::Shape, gfnode::zeros;
using torch::stable::Tensor;

// Parts are at least this long, so that zeroing and adding their weight gradients stays small.
constexpr int64_t kEdgesPerPart = 1024;  // over all copies

Graph graph_of(const char *op, const Tensor &node, const Tensor &row, const Tensor &col) {
  STD_TORCH_CHECK(node.dim() == 3, op, ": `node` must be (T, n, 2H)");
  const Graph graph{node.size(0), node.size(1), row.size(0), longs(row, op, "row", {row.size(0)}),
                    longs(col, op, "col", {row.size(0)})};
  for (int64_t e = 0; e < graph.edges; ++e)
    STD_TORCH_CHECK(graph.row[e] >= 0 && graph.row[e] < graph.nodes && graph.col[e] >= 0 &&
                        graph.col[e] < graph.nodes && (e == 0 || graph.row[e - 1] <= graph.row[e]),
                    op, ": edges must be sorted by row and within the ", graph.nodes,
                    " nodes, got edge ", e, " from ", graph.row[e], " to ", graph.col[e]);
  return graph;
}

int64_t width_of(const Tensor &weight, const char *op, const char *name, int64_t dimension) {
  const int64_t width = weight.size(dimension);
  STD_TORCH_CHECK(width % gfnode::kWidthMultiple == 0, op, ": `", name,
                  "` must have widths that are multiples of ", gfnode::kWidthMultiple, ", got ",
                  width);
  return width;
}

// Starts of ranges of edges that share no node with each other, and the end of the last. A function
// of the graph alone: results do not depend on the number of threads.
std::vector<int64_t> divide(const Graph &graph) {
  const int64_t wanted =
      std::min(gfnode::kMaxParts, std::max<int64_t>(1, graph.edges * graph.copies / kEdgesPerPart));
  std::vector<int64_t> lowest(graph.edges + 1, graph.nodes);  // node of edges e and later
  for (int64_t e = graph.edges - 1; e >= 0; --e)
    lowest[e] = std::min({lowest[e + 1], graph.row[e], graph.col[e]});
  std::vector<int64_t> starts{0};
  int64_t highest = -1;  // node of edges before e
  for (int64_t e = 0; e < graph.edges; ++e) {
    const int64_t target = graph.edges * static_cast<int64_t>(starts.size()) / wanted;
    if (e >= target && e > starts.back() && highest < lowest[e]) starts.push_back(e);
    highest = std::max({highest, graph.row[e], graph.col[e]});
  }
  starts.push_back(graph.edges);
  return starts;
}

template <typename Work>
void for_each_part(const std::vector<int64_t> &starts, const Work &work) {
  const int64_t parts = static_cast<int64_t>(starts.size()) - 1;
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) work(part, starts[part], starts[part + 1]);
  });
}

std::vector<float> transposed(const float *matrix, int64_t rows, int64_t columns) {
  std::vector<float> result(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) result[j * rows + i] = matrix[i * columns + j];
  return result;
}

// The forward arguments, checked, with the transposes the kernels read.
struct EgnnArguments {
  EgnnEdges p;
  std::vector<float> w2t, wct;

  EgnnArguments(const char *op, const Tensor &x, const Tensor &node, const Tensor &edge,
                const Tensor &row, const Tensor &col, const Tensor &wq, const Tensor &w2,
                const Tensor &b2, const Tensor &wc, const Tensor &bc, const Tensor &wo,
                const Tensor &bo, int64_t activation, bool norm) {
    p.graph = graph_of(op, node, row, col);
    const int64_t H = p.hidden = width_of(w2, op, "w2", 1);
    const int64_t W = p.width = width_of(w2, op, "w2", 0);
    const int64_t C = p.coordinate = width_of(wc, op, "wc", 0);
    p.activation = activation_of(op, activation);
    p.norm = norm;
    p.x = floats(x, op, "x", {p.graph.copies, p.graph.nodes, 3});
    p.node = floats(node, op, "node", {p.graph.copies, p.graph.nodes, 2 * H});
    p.edge = floats(edge, op, "edge", {p.graph.edges, H});
    p.wq = floats(wq, op, "wq", {H});
    p.w2 = floats(w2, op, "w2", {W, H});
    p.b2 = floats(b2, op, "b2", {W});
    p.wc = floats(wc, op, "wc", {C, W});
    p.bc = floats(bc, op, "bc", {C});
    p.wo = floats(wo, op, "wo", {C});
    p.bo = floats(bo, op, "bo", {1});
    w2t = transposed(p.w2, W, H);
    wct = transposed(p.wc, C, W);
    p.w2t = w2t.data();
    p.wct = wct.data();
    p.sum = p.shift = p.z2 = p.z3 = nullptr;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> egnn_edges(Tensor x, Tensor node, Tensor edge, Tensor row,
                                                      Tensor col, Tensor wq, Tensor w2, Tensor b2,
                                                      Tensor wc, Tensor bc, Tensor wo, Tensor bo,
                                                      int64_t activation, bool norm, bool keep) {
  EgnnArguments arguments("egnn_edges", x, node, edge, row, col, wq, w2, b2, wc, bc, wo, bo,
                          activation, norm);
  EgnnEdges &p = arguments.p;
  Tensor sum = zeros(x, {p.graph.copies, p.graph.nodes, p.width});
  Tensor shift = zeros(x, {p.graph.copies, p.graph.nodes, 3});
  const int64_t kept = keep ? p.graph.edges : 0;
  Tensor z2 = torch::stable::new_empty(x, Shape{p.graph.copies, kept, p.width});
  Tensor z3 = torch::stable::new_empty(x, Shape{p.graph.copies, kept, p.coordinate});
  p.sum = data(sum);
  p.shift = data(shift);
  if (keep) {
    p.z2 = data(z2);
    p.z3 = data(z3);
  }
  for_each_part(divide(p.graph), [&](int64_t, int64_t begin, int64_t end) {
    gfnode::kernels().egnn_forward(p, begin, end);
  });
  return {sum, shift, z2, z3};
}

// Gradients of x, node, edge, wq, w2, b2, wc, bc, wo, bo.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
egnn_edges_backward(Tensor grad_sum, Tensor grad_shift, Tensor x, Tensor node, Tensor edge,
                    Tensor row, Tensor col, Tensor wq, Tensor w2, Tensor b2, Tensor wc, Tensor bc,
                    Tensor wo, Tensor bo, Tensor z2, Tensor z3, int64_t activation, bool norm) {
  const char *op = "egnn_edges_backward";
  EgnnArguments arguments(op, x, node, edge, row, col, wq, w2, b2, wc, bc, wo, bo, activation, norm);
  EgnnEdges &p = arguments.p;
  const int64_t H = p.hidden, W = p.width, C = p.coordinate;
  if (z2.size(1) == p.graph.edges) {
    p.z2 = const_cast<float *>(floats(z2, op, "z2", {p.graph.copies, p.graph.edges, W}));
    p.z3 = const_cast<float *>(floats(z3, op, "z3", {p.graph.copies, p.graph.edges, C}));
  }
  Tensor grad_x = zeros(x, {p.graph.copies, p.graph.nodes, 3});
  Tensor grad_node = zeros(x, {p.graph.copies, p.graph.nodes, 2 * H});
  Tensor grad_edge = zeros(x, {p.graph.edges, H});
  const gfnode::EgnnGrads grads{
      floats(grad_sum, op, "grad_sum", {p.graph.copies, p.graph.nodes, W}),
      floats(grad_shift, op, "grad_shift", {p.graph.copies, p.graph.nodes, 3}), data(grad_x),
      data(grad_node), data(grad_edge)};

  const std::vector<int64_t> starts = divide(p.graph);
  enum { kWq, kW2, kB2, kWc, kBc, kWo, kBo };
  PartSums sums(static_cast<int64_t>(starts.size()) - 1, {H, W * H, W, C * W, C, C, 1});
  for_each_part(starts, [&](int64_t part, int64_t begin, int64_t end) {
    const gfnode::EgnnWeightGrads weights{sums.at(part, kWq), sums.at(part, kW2), sums.at(part, kB2),
                                          sums.at(part, kWc), sums.at(part, kBc), sums.at(part, kWo),
                                          sums.at(part, kBo)};
    gfnode::kernels().egnn_backward(p, grads, weights, begin, end);
  });
  return {grad_x,
          grad_node,
          grad_edge,
          sums.total(x, kWq, H),
          sums.total(x, kW2, W, H, H),
          sums.total(x, kB2, W),
          sums.total(x, kWc, C, W, W),
          sums.total(x, kBc, C),
          sums.total(x, kWo, C),
          sums.total(x, kBo, 1)};
}

SumEdges sum_arguments(const char *op, const Tensor &node, const Tensor &edge, const Tensor &row,
                       const Tensor &col, int64_t activation) {
  SumEdges p{};
  p.graph = graph_of(op, node, row, col);
  p.hidden = width_of(edge, op, "edge", 1);
  p.activation = activation_of(op, activation);
  p.node = floats(node, op, "node", {p.graph.copies, p.graph.nodes, 2 * p.hidden});
  p.edge = floats(edge, op, "edge", {p.graph.edges, p.hidden});
  return p;
}

Tensor sum_edges(Tensor node, Tensor edge, Tensor row, Tensor col, int64_t activation) {
  SumEdges p = sum_arguments("sum_edges", node, edge, row, col, activation);
  Tensor sum = zeros(node, {p.graph.copies, p.graph.nodes, p.hidden});
  p.sum = data(sum);
  for_each_part(divide(p.graph), [&](int64_t, int64_t begin, int64_t end) {
    gfnode::kernels().sum_forward(p, begin, end);
  });
  return sum;
}

std::tuple<Tensor, Tensor> sum_edges_backward(Tensor grad_sum, Tensor node, Tensor edge, Tensor row,
                                              Tensor col, int64_t activation) {
  const char *op = "sum_edges_backward";
  SumEdges p = sum_arguments(op, node, edge, row, col, activation);
  p.grad_sum = floats(grad_sum, op, "grad_sum", {p.graph.copies, p.graph.nodes, p.hidden});
  Tensor grad_node = zeros(node, {p.graph.copies, p.graph.nodes, 2 * p.hidden});
  Tensor grad_edge = zeros(node, {p.graph.edges, p.hidden});
  p.grad_node = data(grad_node);
  p.grad_edge = data(grad_edge);
  for_each_part(divide(p.graph), [&](int64_t, int64_t begin, int64_t end) {
    gfnode::kernels().sum_backward(p, begin, end);
  });
  return {grad_node, grad_edge};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def(
      "egnn_edges(Tensor x, Tensor node, Tensor edge, Tensor row, Tensor col, Tensor wq, Tensor w2, "
      "Tensor b2, Tensor wc, Tensor bc, Tensor wo, Tensor bo, int activation, bool norm, bool keep) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "egnn_edges_backward(Tensor grad_sum, Tensor grad_shift, Tensor x, Tensor node, Tensor edge, "
      "Tensor row, Tensor col, Tensor wq, Tensor w2, Tensor b2, Tensor wc, Tensor bc, Tensor wo, "
      "Tensor bo, Tensor z2, Tensor z3, int activation, bool norm) -> (Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("sum_edges(Tensor node, Tensor edge, Tensor row, Tensor col, int activation) -> Tensor");
  m.def(
      "sum_edges_backward(Tensor grad_sum, Tensor node, Tensor edge, Tensor row, Tensor col, int "
      "activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) {
  m.impl("egnn_edges", TORCH_BOX(&egnn_edges));
  m.impl("egnn_edges_backward", TORCH_BOX(&egnn_edges_backward));
  m.impl("sum_edges", TORCH_BOX(&sum_edges));
  m.impl("sum_edges_backward", TORCH_BOX(&sum_edges_backward));
}
