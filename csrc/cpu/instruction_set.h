// The widest instruction set that this processor has, this compiler can target and the user allows.
#pragma once
#include <cstdlib>
#include <cstring>

// clang has no `#pragma GCC target`; there the compiler's own flags decide.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GFNODE_X86_KERNELS
#endif

namespace gfnode {

enum class InstructionSet { baseline, avx2, avx512 };  // 128, 256 and 512 bits

// ATen's own limit on instruction sets holds here too; a wrong value of it is ATen's to announce.
inline bool allowed(const char *instruction_set) {
  const char *limit = std::getenv("ATEN_CPU_CAPABILITY");
  if (!limit || std::strcmp(limit, "avx512") == 0) return true;
  if (std::strcmp(limit, "avx2") == 0) return std::strcmp(instruction_set, "avx2") == 0;
  return std::strcmp(limit, "default") != 0;
}

inline InstructionSet choose_instruction_set() {
#ifdef GFNODE_X86_KERNELS
  __builtin_cpu_init();
  if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return InstructionSet::avx512;
  if (allowed("avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace gfnode
