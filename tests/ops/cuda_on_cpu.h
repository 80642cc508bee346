// What a CUDA kernel sees, on the CPU: every thread of a block is a fiber, and a collective operation
// is a barrier around an exchange. For small launches; one block after another.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
static Index threadIdx, blockIdx;

namespace cuda_on_cpu {

constexpr int kWarp = 32;

// Entered by its context, resumed by its jump buffer: swapcontext is a system call.
struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
  bool started = false, finished = false;
};

struct Barrier {
  int expected = 0, arrived = 0, generation = 0;
};

struct Slot {
  alignas(8) char bytes[8];
};

static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<Slot> slots;
static Barrier everyone;
static jmp_buf scheduler;
static std::function<void()> body;
static int current;

inline void wait(Barrier &barrier) {
  const int generation = barrier.generation, self = current;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation)
    if (_setjmp(fibers[self].resume) == 0) _longjmp(scheduler, 1);
}

inline void run_fiber() {
  body();
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

// Runs the current fiber up to its next barrier or its end.
inline void resume() {
  Fiber &fiber = fibers[current];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Values of all lanes of the warp, until the next exchange.
template <typename T, typename Use>
auto exchange(T value, const Use &use) {
  Barrier &warp = warps[current / kWarp];
  std::memcpy(slots[current].bytes, &value, sizeof value);
  wait(warp);
  const auto lane_value = [](int lane) {
    T result;
    std::memcpy(&result, slots[current / kWarp * kWarp + lane].bytes, sizeof result);
    return result;
  };
  const auto result = use(lane_value, current % kWarp);
  wait(warp);
  return result;
}

inline void launch(unsigned blocks, int threads, const std::function<void()> &kernel) {
  body = kernel;
  for (unsigned block = 0; block < blocks; ++block) {
    fibers = std::vector<Fiber>(threads);
    warps.assign(threads / kWarp, Barrier{kWarp});
    slots.assign(threads, Slot{});
    everyone = Barrier{threads};
    for (Fiber &fiber : fibers) {
      constexpr int bytes = 1 << 16;
      fiber.stack = std::make_unique<char[]>(bytes);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = bytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool more = true; more;) {
      more = false;
      for (current = 0; current < threads; ++current) {
        if (fibers[current].finished) continue;
        more = true;
        threadIdx.x = current;
        blockIdx.x = block;
        resume();
      }
    }
  }
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  return cuda_on_cpu::exchange(
      value, [=](auto of, int lane) { return of(lane / width * width + from % width); });
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::exchange(value, [=](auto of, int lane) { return of(lane ^ mask); });
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  return cuda_on_cpu::exchange(vote, [](auto of, int) {
    unsigned votes = 0;
    for (int lane = 0; lane < cuda_on_cpu::kWarp; ++lane) votes |= unsigned(of(lane)) << lane;
    return votes;
  });
}

inline void __syncwarp() { cuda_on_cpu::wait(cuda_on_cpu::warps[cuda_on_cpu::current / 32]); }

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::everyone); }

inline int __syncthreads_or(int vote) {
  cuda_on_cpu::slots[cuda_on_cpu::current].bytes[0] = vote != 0;
  __syncthreads();
  int any = 0;
  for (const auto &slot : cuda_on_cpu::slots) any |= slot.bytes[0];
  __syncthreads();
  return any;
}
