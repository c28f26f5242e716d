// Loops over torch's own thread pool.
#pragma once

#include <cstdint>

namespace fastfusion {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);

// Defined in library.cpp by torch, and by threads of its own in the test module.
void run_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

// Call f(first, last) on disjoint ranges that make up [begin, end), none smaller than `grain` but
// the last. The ranges depend on the number of threads: a sum that must not, keeps a partial sum
// for each index, or for each of a fixed number of chunks, and adds these up afterwards.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  if (begin >= end) return;
  run_ranges(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        (*static_cast<const F*>(context))(first, last);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace fastfusion
