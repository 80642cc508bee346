// What nvcc alone knows: its own version and the architectures it was asked for.
#include <cuda_runtime_api.h>

#include "build_info.h"

#define GFNODE_TEXT_OF(...) #__VA_ARGS__
#define GFNODE_TEXT(...) GFNODE_TEXT_OF(__VA_ARGS__)

extern "C" int gfnode_cuda_toolkit_version() { return CUDART_VERSION; }

extern "C" const char* gfnode_cuda_architectures() { return GFNODE_TEXT(__CUDA_ARCH_LIST__); }
