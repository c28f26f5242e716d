// The library _C_cpu: the choice of the instruction set, and torch's threads. The operators
// register themselves, each in its file in bindings/.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "cpu/capability.h"
#include "cpu/parallel.h"

namespace fastfusion {
namespace {

const char* const kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

Capability supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx2 && avx512 && __builtin_cpu_supports("avx512bf16")) return Capability::kAvx512Bf16;
  if (avx2 && avx512) return Capability::kAvx512;
  if (avx2) return Capability::kAvx2;
#endif
  return Capability::kBaseline;
}

Capability chosen() {
  const char* wish = std::getenv("FASTFUSION_CPU_CAPABILITY");
  if (wish == nullptr || *wish == '\0') return supported();
  const std::string name = wish;
  for (Capability level :
       {Capability::kBaseline, Capability::kAvx2, Capability::kAvx512, Capability::kAvx512Bf16}) {
    if (name != kNames[static_cast<int>(level)]) continue;
    return level < supported() ? level : supported();
  }
  STD_TORCH_CHECK(
      false, "FASTFUSION_CPU_CAPABILITY must be default, avx2, avx512 or avx512_bf16, got ", name);
}

std::string capability_name() { return kNames[static_cast<int>(capability())]; }

}  // namespace

Capability capability() {
  static const Capability level = [] {
    const Capability found = chosen();
    bfloat16_instructions = found == Capability::kAvx512Bf16;
    return found;
  }();
  return level;
}

#if defined(FASTFUSION_OWN_THREADS)
// For ThreadSanitizer (tests/sanitize.py), which cannot see who waits for whom in torch's pool.
void run_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  const int64_t ranges = std::clamp<int64_t>((end - begin) / std::max<int64_t>(grain, 1), 1, 3);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < ranges; ++i) {
    threads.emplace_back(function, begin + (end - begin) * i / ranges,
                         begin + (end - begin) * (i + 1) / ranges, context);
  }
  for (std::thread& thread : threads) thread.join();
}
#else
void run_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
}
#endif

STABLE_TORCH_LIBRARY(fastfusion_cpu, m) { m.def("capability() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CompositeExplicitAutograd, m) {
  m.impl("capability", TORCH_BOX(&capability_name));
}

}  // namespace fastfusion
