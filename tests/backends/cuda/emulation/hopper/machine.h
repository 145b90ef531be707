// A part of a Hopper GPU on one CPU thread: what machine.cpp does, for the kernels' sources.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <functional>

namespace emulation {

// A tensor's map for the copy engine: bfloat16, two dimensions; sizes in entries, `stride` in bytes.
struct Map {
  const unsigned char* data;
  int64_t columns, rows, stride;
  int box_columns, box_rows, swizzle;
};

// Which of the planted faults (test_hopper_emulation.py) is on; 0: none.
extern int mutant;

// Runs a grid, clusters one after the other; false where the kernel breaks a rule, which `launch_error` then tells.
bool launch(const std::function<void()>& kernel, int blocks, int cluster, int threads, size_t shared);
const char* launch_error();
void set_seed(uint64_t seed);

unsigned thread_index();
unsigned block_index();
unsigned grid_size();
uint32_t cluster_rank();
void* dynamic_shared();
uint32_t shared_address(const void* pointer);

void touch(const void* place, size_t bytes);  // device memory
void meet_warp();
void meet_block(int barrier, int threads);  // 0 threads: all
void meet_cluster();
void set_registers(int count, bool more);

void init_barrier(uint64_t* barrier, int arrivals, const char* name);
void arrive(uint64_t* barrier, uint32_t rank);
void expect_bytes(uint64_t* barrier, uint32_t bytes);
void wait(uint64_t* barrier, uint32_t parity);
void copy(void* to, const Map& map, int column, int row, uint64_t* barrier, unsigned blocks);
void load_remote(void* to, uint32_t address, uint32_t rank, size_t bytes);
void store_shared(uint32_t address, const void* from, size_t bytes);

// A product's operand in shared memory: as in a descriptor, and whether its rows run over the dimension that is not summed.
struct Operand {
  uint32_t address, leading, stride;
  int swizzle;
  bool transposed;
};
void fence_registers();
void registers_written();  // of a product's operand
// sums[64][2 * count] (+)= a b, of which a thread holds `count`; `left`: four registers of a, else `a` is in shared memory.
void product(float* sums, int count, const Operand& a, const uint32_t* left, const Operand& b, bool add);
void commit_products();
void finish_products(int pending);
void load_matrices(uint32_t* to, uint32_t address);

}  // namespace emulation
