// The nvcc side knows no torch header, and the torch side no CUDA header: they meet in plain C.
#pragma once

extern "C" int gfnode_cuda_toolkit_version();           // 1000 * major + 10 * minor
extern "C" const char* gfnode_cuda_architectures();     // "800, 900, 1000"
