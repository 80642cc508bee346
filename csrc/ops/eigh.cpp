// gfnode_fast::eigh_batched: eigenvalues, ascending, and eigenvectors of symmetric matrices, whose
// lower triangles are read. Checks, and the division of the batch into groups and among threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/eigh.h"

#ifdef GFNODE_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/eigh.h"
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxParts = 64;  // ranges of groups handed to threads

struct Problem {
  int64_t count, rows;  // matrices, N
  Tensor matrices, values, vectors;
  const int64_t *sizes = nullptr;  // (count), or null where every size is N
  Tensor kept_sizes;
};

Problem prepare(const Tensor &A, const std::optional<Tensor> &sizes) {
  STD_TORCH_CHECK(A.dim() >= 2 && A.size(-1) == A.size(-2),
                  "eigh_batched: `A` must be (..., n, n), got ", A.dim(), " dimensions, the last of ",
                  A.dim() ? A.size(-1) : 0);
  STD_TORCH_CHECK(A.scalar_type() == ScalarType::Float || A.scalar_type() == ScalarType::Double,
                  "eigh_batched: `A` must be float32 or float64");
  Problem problem;
  problem.rows = A.size(-1);
  std::vector<int64_t> shape;
  problem.count = 1;
  for (int64_t i = 0; i < A.dim(); ++i) {
    shape.push_back(A.size(i));
    if (i < A.dim() - 2) problem.count *= A.size(i);
  }
  problem.matrices = torch::stable::contiguous(A);
  const std::vector<int64_t> value_shape(shape.begin(), shape.end() - 1);
  if (!sizes) {
    problem.values = torch::stable::new_empty(A, value_shape);
    problem.vectors = torch::stable::new_empty(A, shape);
    return problem;
  }
  problem.values = torch::stable::new_zeros(A, value_shape);
  problem.vectors = torch::stable::new_zeros(A, shape);
  STD_TORCH_CHECK(sizes->scalar_type() == ScalarType::Long,
                  "eigh_batched: `sizes` must be int64");
  STD_TORCH_CHECK(sizes->numel() == problem.count, "eigh_batched: `sizes` must have one entry for each of ",
                  problem.count, " matrices, got ", sizes->numel());
  problem.kept_sizes = torch::stable::contiguous(*sizes);
  problem.sizes = static_cast<const int64_t *>(problem.kept_sizes.const_data_ptr());
  return problem;
}

// Indices of the matrices by size, in the order of the batch within a size.
std::vector<int64_t> order_by_size(const Problem &problem) {
  std::vector<int64_t> order(problem.count);
  std::iota(order.begin(), order.end(), 0);
  if (!problem.sizes) return order;
  for (int64_t b = 0; b < problem.count; ++b)
    STD_TORCH_CHECK(problem.sizes[b] >= 0 && problem.sizes[b] <= problem.rows,
                    "eigh_batched: `sizes` must lie in 0 ... ", problem.rows, ", got ",
                    problem.sizes[b], " at matrix ", b);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return problem.sizes[a] < problem.sizes[b]; });
  return order;
}

std::vector<gfnode::EighGroup> divide(const Problem &problem, const std::vector<int64_t> &order,
                                      int64_t lanes) {
  std::vector<gfnode::EighGroup> groups;
  const auto size_of = [&](int64_t b) { return problem.sizes ? problem.sizes[b] : problem.rows; };
  for (int64_t first = 0, next; first < problem.count; first = next) {
    const int64_t size = size_of(order[first]);
    for (next = first + 1; next < problem.count && next < first + lanes; ++next)
      if (size_of(order[next]) != size) break;
    if (size > 0) groups.push_back({size, order.data() + first, next - first});
  }
  return groups;
}

// Starts of ranges of groups that cost about the same, and the end of the last.
std::vector<int64_t> equal_parts(const std::vector<gfnode::EighGroup> &groups) {
  double total = 0, sum = 0;
  const auto cost = [](const gfnode::EighGroup &group) {
    const double n = static_cast<double>(group.size);
    return n * n * (n + 16);
  };
  for (const auto &group : groups) total += cost(group);
  std::vector<int64_t> starts{0};
  for (size_t g = 0; g < groups.size(); ++g) {
    sum += cost(groups[g]);
    if (sum * kMaxParts >= total * static_cast<double>(starts.size())) starts.push_back(g + 1);
  }
  if (starts.back() != static_cast<int64_t>(groups.size())) starts.push_back(groups.size());
  return starts;
}

template <typename Real, typename Solve>
void solve(Problem &problem, int64_t lanes, Solve solve_groups) {
  const gfnode::EighBatch<Real> batch{
      problem.rows, static_cast<const Real *>(problem.matrices.const_data_ptr()),
      static_cast<Real *>(problem.values.mutable_data_ptr()),
      static_cast<Real *>(problem.vectors.mutable_data_ptr())};
  const std::vector<int64_t> order = order_by_size(problem);
  const std::vector<gfnode::EighGroup> groups = divide(problem, order, lanes);
  const std::vector<int64_t> starts = equal_parts(groups);
  const int64_t parts = static_cast<int64_t>(starts.size()) - 1;
  std::vector<int64_t> failed(parts, gfnode::kEighConverged);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    failed[begin] = solve_groups(batch, groups.data(), starts[begin], starts[end]);
  });
  for (const int64_t matrix : failed)
    STD_TORCH_CHECK(matrix == gfnode::kEighConverged, "eigh_batched: matrix ", matrix,
                    " of `A` did not converge; call torch.linalg.eigh for it");
}

std::tuple<Tensor, Tensor> eigh_batched(Tensor A, std::optional<Tensor> sizes) {
  Problem problem = prepare(A, sizes);
  const gfnode::EighKernels &kernels = gfnode::eigh_kernels();
  if (A.scalar_type() == ScalarType::Float)
    solve<float>(problem, kernels.lanes, kernels.single);
  else
    solve<double>(problem, kernels.lanes / 2, kernels.twofold);
  return {problem.values, problem.vectors};
}

#ifdef GFNODE_WITH_CUDA
// torch's current stream; looked up at run time, because a CPU build of torch has no such function.
void *current_stream(int32_t device) {
  using Get = int32_t (*)(int32_t, void **);
  static const Get get =
      reinterpret_cast<Get>(dlsym(RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  STD_TORCH_CHECK(get, "eigh_batched: needs a CUDA build of torch for tensors on a GPU");
  void *stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "eigh_batched: torch has no stream on GPU ", device);
  return stream;
}

std::tuple<Tensor, Tensor> eigh_batched_cuda(Tensor A, std::optional<Tensor> sizes) {
  const int32_t device = A.get_device_index();
  STD_TORCH_CHECK(!sizes || (sizes->is_cuda() && sizes->get_device_index() == device),
                  "eigh_batched: `sizes` must be on the device of `A`, GPU ", device);
  STD_TORCH_CHECK(A.dim() < 2 || A.size(-1) <= kCudaEighRows, "eigh_batched: `A` must have at most ",
                  kCudaEighRows, " rows on a GPU, got ", A.size(-1));
  const torch::stable::accelerator::DeviceGuard guard(device);
  Problem problem = prepare(A, sizes);
  void *stream = current_stream(device);
  const void *matrices = problem.matrices.const_data_ptr();
  void *values = problem.values.mutable_data_ptr(), *vectors = problem.vectors.mutable_data_ptr();
  const int code =
      A.scalar_type() == ScalarType::Float
          ? gfnode_cuda_eigh_float(static_cast<const float *>(matrices), static_cast<float *>(values),
                                   static_cast<float *>(vectors), problem.sizes, problem.count,
                                   problem.rows, stream)
          : gfnode_cuda_eigh_double(static_cast<const double *>(matrices),
                                    static_cast<double *>(values), static_cast<double *>(vectors),
                                    problem.sizes, problem.count, problem.rows, stream);
  STD_TORCH_CHECK(code == 0, "eigh_batched: the launch failed: ", gfnode_cuda_error(code));
  return {problem.values, problem.vectors};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(gfnode_fast, m) {
  m.def("eigh_batched(Tensor A, Tensor? sizes=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CPU, m) { m.impl("eigh_batched", TORCH_BOX(&eigh_batched)); }

#ifdef GFNODE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CUDA, m) {
  m.impl("eigh_batched", TORCH_BOX(&eigh_batched_cuda));
}
#endif
