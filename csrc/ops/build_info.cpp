// gfnode_fast::build_info() -> str: what this binary was built from and for, as a JSON object.
//
// libtorch's stable ABI only, so that one binary serves every torch from TORCH_TARGET_VERSION on.
#include <torch/csrc/stable/library.h>

#include <cstdint>
#include <sstream>
#include <string>

#ifdef GFNODE_WITH_CUDA
#include "../cuda/build_info.h"
#endif

#define GFNODE_TEXT_OF(x) #x
#define GFNODE_TEXT(x) GFNODE_TEXT_OF(x)

#ifdef __clang__
#define GFNODE_COMPILER "clang " __clang_version__
#else
#define GFNODE_COMPILER "gcc " __VERSION__
#endif

namespace {

std::string build_info() {
  constexpr uint64_t target = TORCH_TARGET_VERSION;
  std::ostringstream json;
  json << R"({"version": ")" << GFNODE_TEXT(GFNODE_VERSION) << R"(", "compiler": ")" << GFNODE_COMPILER
       << R"(", "torch_abi": ")" << (target >> 56) << '.' << ((target >> 48) & 0xff) << '"';
#ifdef GFNODE_WITH_CUDA
  const int toolkit = gfnode_cuda_toolkit_version();
  json << R"(, "cuda": ")" << toolkit / 1000 << '.' << toolkit % 1000 / 10
       << R"(", "cuda_architectures": [)" << gfnode_cuda_architectures() << ']';
#else
  json << R"(, "cuda": null, "cuda_architectures": [])";
#endif
  json << '}';
  return json.str();
}

}  // namespace

STABLE_TORCH_LIBRARY(gfnode_fast, m) { m.def("build_info() -> str"); }

// Without a tensor argument there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(gfnode_fast, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
