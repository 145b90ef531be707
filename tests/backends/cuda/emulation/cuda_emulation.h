// Runs CUDA kernels on one CPU thread: just enough of CUDA for csrc/cuda, so that tests execute the kernels' own text on
// machines without a GPU.
//
// A block's threads are fibers (ucontext). Each runs until it waits at __syncthreads or at a warp collective; the warp,
// or the block, goes on when all have arrived. Blocks run one after the other. The order in which fibers, warps and
// blocks are run can be changed (emulation::order): a kernel whose result hangs on it has a race. Shared memory is filled
// with NaN patterns before each block, and its end is guarded. Left out: divergence within a warp is not checked beyond
// "all lanes meet at the same collectives", and there is no memory model: writes are seen at once.
#pragma once
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <numeric>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct Index3 {
  unsigned x, y, z;
};
typedef int cudaError_t;
typedef void* cudaStream_t;
enum : int { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid value"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

namespace emulation {

constexpr int WARP = 32;
constexpr size_t STACK = 128 << 10, GUARD = 64;
constexpr unsigned char POISON = 0xff;  // NaN as float, -1 as an integer

enum class State { runnable, at_warp, at_block, done };

struct Fiber {
  ucontext_t context;
  jmp_buf resume;
  std::vector<unsigned char> stack = std::vector<unsigned char>(STACK);
  State state = State::done;
  bool started = false;
  unsigned collectives = 0;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<unsigned char> shared;
  std::vector<uint64_t> exchange;  // [warps][2][WARP]: what lanes give each other; two sides, used in turn
  size_t shared_size = 0;
  Index3 block{0, 0, 0}, threads{0, 1, 1};
  int current = 0;
  jmp_buf scheduler;
  std::function<void()> body;
  // 0: rising, 1: falling, else a shuffle with this seed; of lanes, of warps and of blocks.
  unsigned order = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* why) {
  fprintf(stderr, "cuda emulation: %s (block %u, thread %d)\n", why, machine.block.x, machine.current);
  abort();
}

inline std::vector<int> ordered(int count) {
  std::vector<int> list(count);
  std::iota(list.begin(), list.end(), 0);
  if (machine.order == 1)
    for (int i = 0; i < count; i++) list[i] = count - 1 - i;
  if (machine.order > 1) {
    uint64_t state = machine.order;
    for (int i = count - 1; i > 0; i--) {
      state = state * 6364136223846793005ull + 1442695040888963407ull;
      const int other = static_cast<int>((state >> 33) % (i + 1));
      std::swap(list[i], list[other]);
    }
  }
  return list;
}

inline void enter() {
  machine.body();
  machine.fibers[machine.current].state = State::done;
  _longjmp(machine.scheduler, 1);
}

// From a fiber to the scheduler and back.
inline void wait(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  if (_setjmp(fiber.resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void run(int index) {
  Fiber& fiber = machine.fibers[index];
  machine.current = index;
  if (_setjmp(machine.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.context);
  fail("setcontext returned");
}

inline void run_block(const std::vector<int>& warps, const std::vector<int>& lanes) {
  const int threads = static_cast<int>(machine.threads.x);
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = machine.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::runnable;
    fiber.started = false;
    fiber.collectives = 0;
  }
  for (int done = 0; done < threads;) {
    int at_block = 0;
    done = 0;
    for (int warp : warps) {
      for (bool again = true; again;) {
        int waiting = 0;
        for (int lane : lanes) {
          const int i = warp * WARP + lane;
          if (machine.fibers[i].state == State::runnable) run(i);
          waiting += machine.fibers[i].state == State::at_warp;
        }
        again = waiting == WARP;
        if (waiting != 0 && waiting != WARP) fail("some lanes of a warp are at a collective that others do not reach");
        for (int lane = 0; lane < WARP && again; lane++) machine.fibers[warp * WARP + lane].state = State::runnable;
      }
      for (int lane = 0; lane < WARP; lane++) {
        at_block += machine.fibers[warp * WARP + lane].state == State::at_block;
        done += machine.fibers[warp * WARP + lane].state == State::done;
      }
    }
    if (at_block != 0 && at_block != threads) fail("some threads wait at __syncthreads that others do not reach");
    for (int i = 0; i < threads && at_block; i++) machine.fibers[i].state = State::runnable;
  }
}

template <typename Kernel, typename Job>
cudaError_t launch(Kernel kernel, int64_t blocks, int threads, size_t shared, const Job& job) {
  if (threads % WARP) fail("a block is a whole number of warps here");
  machine.threads.x = threads;
  if (static_cast<int>(machine.fibers.size()) < threads) machine.fibers = std::vector<Fiber>(threads);
  machine.exchange.assign(static_cast<size_t>(threads) * 2, 0);
  machine.shared_size = shared;
  machine.body = [&] { kernel(job); };
  const std::vector<int> warps = ordered(threads / WARP), lanes = ordered(WARP);
  for (int block : ordered(static_cast<int>(blocks))) {
    machine.block.x = block;
    machine.shared.assign(shared + GUARD, POISON);
    run_block(warps, lanes);
    for (size_t i = shared; i < shared + GUARD; i++)
      if (machine.shared[i] != POISON) fail("a write past the end of shared memory");
  }
  return cudaSuccess;
}

// Dynamic shared memory. A kernel may be given less than its whole structure: what lies beyond is guarded.
inline void* shared_memory(size_t) { return machine.shared.data(); }

inline float half_value(uint16_t bits) {
  _Float16 x;
  memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline uint16_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}

template <typename V>
V shuffle(unsigned mask, V value, int delta) {
  static_assert(sizeof(V) <= 8);
  if (mask != 0xffffffffu) fail("a collective of a part of a warp");
  Fiber& fiber = machine.fibers[machine.current];
  const int lane = machine.current % WARP;
  uint64_t* side = machine.exchange.data() + (machine.current / WARP * 2 + fiber.collectives++ % 2) * WARP;
  memcpy(side + lane, &value, sizeof(V));
  wait(State::at_warp);
  const int source = lane + delta;
  if (source >= 0 && source < WARP) memcpy(&value, side + source, sizeof(V));
  return value;
}

}  // namespace emulation

#define threadIdx (Index3{static_cast<unsigned>(emulation::machine.current), 0, 0})
#define blockIdx (emulation::machine.block)

inline void __syncthreads() { emulation::wait(emulation::State::at_block); }
inline void __threadfence() {}
template <typename V>
V __shfl_down_sync(unsigned mask, V value, int delta) {
  return emulation::shuffle(mask, value, delta);
}
template <typename V>
V __shfl_up_sync(unsigned mask, V value, int delta) {
  return emulation::shuffle(mask, value, -delta);
}
template <typename V, typename U>
V atomicAdd(V* to, U value) {
  const V before = *to;
  *to = before + static_cast<V>(value);
  return before;
}
template <typename V>
V atomicMin(V* to, V value) {
  const V before = *to;
  if (value < before) *to = value;
  return before;
}
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
