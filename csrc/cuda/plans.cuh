// Block sizes and shared memory of each kernel: chosen without a GPU, from what the compiler says and a count of bytes.
// tests/backends/cuda/test_cuda_compile.py holds them against ptxas; none has been timed yet.
#pragma once

namespace entrgi::cuda {

// `threads` a block, `blocks` a multiprocessor that registers and shared memory must leave room for.
struct Plan {
  int threads, blocks;
};

// One row slice a block. 4 x 256 threads with 4 x 16 bytes in flight each are 64 KiB a multiprocessor, twice what a
// latency of 700 ns at an H200's 4.8 TB/s needs; 64 registers a thread hold the unpacked entries without spilling.
constexpr Plan STATISTICS_PLAN{256, 4};
// A row is split over blocks only into slices at least this long: below it the merge costs as much as the reading.
constexpr int LEAST_SLICE = 8192, MOST_SPLITS = 64;

// One row a block. 512 threads, two blocks: the serial parts of one row (merge, scan) hide behind the reading of another.
constexpr Plan DRAW_PLAN{512, 2};
// Candidates on chip: 64 KiB of list and 12 KiB of histogram let two blocks share a multiprocessor of 163 KiB (sm_80).
// At top-p 0.95 and V = 151,936 that is all entries above probability 1.6e-7, as long as those are at most 5% of V.
#ifdef ENTRGI_DRAW_CAPACITY  // tests: a short list, so that rows of a few thousand entries overflow it
constexpr int DRAW_CAPACITY = ENTRGI_DRAW_CAPACITY;
#else
constexpr int DRAW_CAPACITY = 8192;
#endif
// Shared memory of a multiprocessor on the smallest architecture served (sm_80), 1 KiB a block reserved by the system.
constexpr int LEAST_SHARED = 164 << 10, RESERVED_SHARED = 1 << 10;

// Elementwise: 16 bytes in and out a thread and step, enough blocks to hide everything.
constexpr Plan ELEMENTWISE_PLAN{256, 4};
constexpr int ELEMENTWISE_SLICE = 8192;

}  // namespace entrgi::cuda
