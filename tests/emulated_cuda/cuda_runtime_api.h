// CUDA on a CPU, as far as csrc/cuda needs it: a block is an OS thread, its CUDA threads are fibers of it that
// take turns, and wait where a warp, a block or the grid meets. For the logic of a kernel, not for its races.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <barrier>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x;
  explicit dim3(unsigned count) : x(count) {}
};
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 256 * 1024;

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t context;
  jmp_buf resume;
  bool started = false, done = false;
  int64_t meetings = 0;  // of its warp, and of its block: how many it has come to
  int64_t block_meetings = 0;
};

// One block: who runs, who waits, and what a warp exchanges.
struct Block {
  unsigned index, blocks;
  std::vector<Fiber> fibers;
  std::vector<float> exchanged;
  std::vector<unsigned> votes;
  std::barrier<>* grid;
  std::function<void()> body;
  int current = 0, running = 0;
  jmp_buf scheduler;

  // Lets the others run until `there` says that all have come.
  template <class There>
  void wait(There there) {
    while (!there()) {
      const int self = current;
      if (_setjmp(fibers[self].resume) == 0) _longjmp(scheduler, 1);
    }
  }
  void meet_warp() {
    const int first = current / kWarp * kWarp;
    const int64_t mine = ++fibers[current].meetings;
    wait([this, first, mine] {
      for (int i = first; i < first + kWarp; ++i)
        if (!fibers[i].done && fibers[i].meetings < mine) return false;
      return true;
    });
  }
  void meet_block() {
    const int64_t mine = ++fibers[current].block_meetings;
    wait([this, mine] {
      for (const Fiber& fiber : fibers)
        if (!fiber.done && fiber.block_meetings < mine) return false;
      return true;
    });
  }
  void run();
};

inline thread_local Block* block = nullptr;

struct Index {
  unsigned x;
};
inline Index thread_index() { return {static_cast<unsigned>(block->current)}; }
inline Index block_index() { return {block->index}; }
inline Index grid_size() { return {block->blocks}; }

inline void enter() {
  block->body();
  block->fibers[block->current].done = true;
  --block->running;
  _longjmp(block->scheduler, 1);
}

inline void Block::run() {
  running = static_cast<int>(fibers.size());
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  // Members, not locals: they outlive the jumps.
  while (running > 0) {
    for (current = 0; current < static_cast<int>(fibers.size()); ++current) {
      if (fibers[current].done || _setjmp(scheduler) != 0) continue;
      Fiber& fiber = fibers[current];
      if (fiber.started) _longjmp(fiber.resume, 1);
      fiber.started = true;
      setcontext(&fiber.context);
    }
  }
}

inline void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& body) {
  std::barrier<> grid(blocks);
  std::vector<std::thread> running;
  for (unsigned index = 0; index < blocks; ++index)
    running.emplace_back([=, &grid, &body] {
      Block here{index, blocks, std::vector<Fiber>(threads), std::vector<float>(threads), {}, &grid, body};
      here.votes.resize(threads);
      block = &here;
      here.run();
    });
  for (std::thread& thread : running) thread.join();
}

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define gridDim (emulated::grid_size())

inline void __syncthreads() { emulated::block->meet_block(); }

inline float __shfl_xor_sync(unsigned, float value, int offset) {
  emulated::Block& b = *emulated::block;
  b.exchanged[b.current] = value;
  b.meet_warp();
  const float other = b.exchanged[b.current ^ offset];
  b.meet_warp();
  return other;
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  emulated::Block& b = *emulated::block;
  b.votes[b.current] = vote;
  b.meet_warp();
  unsigned found = 0;
  const int first = b.current / emulated::kWarp * emulated::kWarp;
  for (int i = 0; i < emulated::kWarp; ++i) found |= b.votes[first + i] << i;
  b.meet_warp();
  return found;
}

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }

inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
// Few, so that every block has several units of work.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 3;
  return cudaSuccess;
}
