// What device code shares: element types, vector loads, shared memory, sums over a warp.
//
// The sources compile with nvcc and, for the tests, with the host compiler (tests/cuda_on_cpu).
// Arithmetic is in float; float16 and bfloat16 are widened as they are loaded and rounded as they
// are stored. Offsets are int64_t.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace fastfusion::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __half narrow<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N neighbours that are loaded or stored by one instruction.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <int N, typename T>
__device__ void load(const T* from, float (&to)[N]) {
  const auto pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.value[i]);
}

template <int N, typename T>
__device__ void store(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.value[i] = narrow<T>(from[i]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// All the shared memory of a kernel, as one struct. Nothing is in it before it is written.
template <typename T>
__device__ T& shared_memory() {
#if defined(__CUDACC__)
  __shared__ T memory;
  return memory;
#else
  return cuda_on_cpu::shared<T>();
#endif
}

// Asynchronous copies, from global to shared memory and past the registers, so that as many are on
// their way as memory needs. A thread starts some, commits them as a group, and waits until at most
// the newest PENDING groups are still on their way; others see its values behind a barrier.

// N neighbours, 4, 8 or 16 bytes and aligned to them; from `there` on zeros, which are not read.
template <int N, typename T>
__device__ void copy_async(T* to, const T* from, int there) {
  constexpr int kBytes = sizeof(T) * N;
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int read = static_cast<int>(sizeof(T)) * there;
#if defined(__CUDACC__)
  // CUDA's own function takes the bytes to read as a switch over constants: 100 instructions.
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(from), "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(place), "l"(from),
                 "n"(kBytes), "r"(read)
                 : "memory");
#else
  cuda_on_cpu::start_copy(to, from, kBytes, kBytes - read);
#endif
}
__device__ inline void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_on_cpu::commit_copies();
#endif
}
template <int PENDING>
__device__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#else
  cuda_on_cpu::wait_for_copies(PENDING);
#endif
}

// The sum over the lanes of a warp, in a fixed order, in every lane.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int bits = kWarp / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// An image batch (B, C, H, W) as it lies in memory: strides in elements.
template <typename T>
struct View {
  T* data;
  int64_t batch, channel, row, column;

  __device__ T* at(int64_t b, int64_t c, int64_t r, int64_t w) const {
    return data + b * batch + c * channel + r * row + w * column;
  }
};

struct Shape {
  int64_t batch, channels, rows, columns;
};

}  // namespace fastfusion::cuda
