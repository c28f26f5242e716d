// Small kernels, right ones and wrong ones, run by name: what test_runtime.py looks at.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include "../../csrc/cuda/device.h"

namespace {

using namespace fastfusion::cuda;

constexpr int kThreads = 64;

template <typename... Parameters, typename... Arguments>
void launch(unsigned blocks, dim3 threads, void (*kernel)(Parameters...), Arguments... arguments) {
  const cudaLaunchConfig_t config{dim3(blocks), threads, 0, nullptr};
  if (cudaLaunchKernelEx(&config, kernel, arguments...) != cudaSuccess) std::puts("not launched");
}

struct Row {
  float value[kThreads];
};

// Each block turns its row round, through shared memory.
template <bool BARRIER>
__global__ void turn(const float* x, float* y) {
  Row& row = shared_memory<Row>();
  const int i = threadIdx.x, first = blockIdx.x * kThreads;
  row.value[i] = x[first + i];
  if (BARRIER) __syncthreads();
  y[first + i] = row.value[kThreads - 1 - i];
}

// The same by asynchronous copies of four, the last four of which are cut short, in two groups.
template <int PENDING, bool BARRIER>
__global__ void copied(const float* x, float* y) {
  Row& row = shared_memory<Row>();
  const int i = threadIdx.x, first = blockIdx.x * kThreads;
  if (i % 4 == 0) copy_async<4>(row.value + i, x + first + i, i + 4 < kThreads ? 4 : 1);
  commit_copies();
  commit_copies();  // of nothing
  wait_for_copies<PENDING>();
  if (BARRIER) __syncthreads();
  y[first + i] = row.value[kThreads - 1 - i];
  __syncthreads();
  wait_for_copies<0>();
}

__global__ void never_waits(const float* x) {
  copy_async<1>(shared_memory<Row>().value + threadIdx.x, x, 1);
  commit_copies();
}

__global__ void copies_elsewhere(const float* x, float* y) { copy_async<1>(y, x, 1); }

__global__ void copies_four(const float* x, int count) {
  copy_async<4>(shared_memory<Row>().value, x, count);
  commit_copies();
  wait_for_copies<0>();
}

// Lane by lane: from the left, from the right, the sum of all, and who holds an odd number.
__global__ void exchange(float* y) {
  const unsigned i = threadIdx.x + blockDim.x * threadIdx.y;
  const float x = static_cast<float>(i % kWarp);
  const float up = __shfl_up_sync(kAllLanes, x, 1), down = __shfl_down_sync(kAllLanes, x, 2);
  const float first = __shfl_sync(kAllLanes, x, 3);
  const unsigned odd = __ballot_sync(kAllLanes, static_cast<int>(x) & 1);
  y[i] = up + 100 * down + 1e4f * first + (odd == 0xAAAAAAAAu ? 0.5f : 0) +
         (warp_sum(x) == 496 ? 0.25f : 0);
}

__global__ void unwritten(float* y) { y[threadIdx.x] = shared_memory<Row>().value[threadIdx.x]; }

__global__ void beyond_shared() { shared_memory<Row>().value[threadIdx.x + 1] = 1; }

__global__ void beyond_output(float* y) { y[threadIdx.x + 1] = 1; }

__global__ void half_wait() {
  if (threadIdx.x < kThreads / 2) __syncthreads();
}

__global__ void count(int* n) { atomicAdd(n, 1); }

__global__ void fours(const float* x, float* y) {
  float four[4];
  load(x + 4 * threadIdx.x, four);
  for (float& value : four) value *= 2;
  store(y + 4 * threadIdx.x, four);
}

__global__ void rounded(const float* x, float* y) {
  y[2 * threadIdx.x] = widen(narrow<__half>(x[threadIdx.x]));
  y[2 * threadIdx.x + 1] = widen(narrow<__nv_bfloat16>(x[threadIdx.x]));
}

int run(const std::string& name) {
  std::vector<float> x(2 * kThreads), y(2 * kThreads);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  if (name == "turn") launch(2, kThreads, turn<true>, x.data(), y.data());
  if (name == "race") launch(2, kThreads, turn<false>, x.data(), y.data());
  if (name == "copied") launch(2, kThreads, copied<1, true>, x.data(), y.data());
  if (name == "copied too late") launch(2, kThreads, copied<2, true>, x.data(), y.data());
  if (name == "copied, no barrier") launch(2, kThreads, copied<0, false>, x.data(), y.data());
  if (name == "never waits") launch(1, kThreads, never_waits, x.data());
  if (name == "copies elsewhere") launch(1, 1, copies_elsewhere, x.data(), y.data());
  if (name == "copies misaligned") launch(1, 1, copies_four, x.data() + 1, 4);
  if (name == "copies nothing") launch(1, 1, copies_four, nullptr, 0);
  if (name == "copies beyond") launch(1, 1, copies_four, x.data() + x.size(), 4);
  if (name == "exchange") launch(1, dim3(16, 4), exchange, y.data());
  if (name == "unwritten") launch(1, kThreads, unwritten, y.data());
  if (name == "beyond shared") launch(1, kThreads, beyond_shared);
  if (name == "beyond output") launch(1, 2 * kThreads, beyond_output, y.data());
  if (name == "half wait") launch(1, kThreads, half_wait);
  if (name == "fours") launch(1, 8, fours, x.data(), y.data());
  if (name == "misaligned") launch(1, 8, fours, x.data() + 1, y.data());
  if (name == "too large") launch(1, 2048, unwritten, y.data());
  if (name == "rounded") {
    x = {1.0f, 1.0f + 1.0f / 4096, 65520.0f, 3.14159265f};
    launch(1, 4, rounded, x.data(), y.data());
    y.resize(8);
  }
  if (name == "count") {
    int n = 0;
    launch(3, 7, count, &n);
    y = {static_cast<float>(n)};
  }
  for (float value : y) std::printf("%.9g ", value);
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  try {
    return run(arguments[1]);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 1;
  }
}
