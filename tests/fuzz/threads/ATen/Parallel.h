// Stands in for torch's header of this name where csrc/cpu/ops.cpp is compiled under ThreadSanitizer: threads that the
// sanitizer sees, in place of an OpenMP runtime that it does not (every one of whose barriers would be a report).
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace at {

inline int threads_of_the_test = 4;
inline int get_num_threads() { return threads_of_the_test; }

template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += grain)
    threads.emplace_back([&f, first, last = std::min(end, first + grain)] { f(first, last); });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace at
