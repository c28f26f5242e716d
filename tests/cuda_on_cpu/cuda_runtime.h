// What the device sources use of CUDA, for the host compiler: test only.
//
// The sources in csrc/cuda are compiled unchanged with this folder in the place of CUDA's headers.
// Blocks run one after another, the threads of a block as fibers on one thread of the processor. A
// fiber runs until it ends or waits at a barrier; a shuffle is two barriers of its warp. The order
// in which the fibers of a block take their turns is set by CUDA_ON_CPU_ORDER (forward, reverse or
// random): a result that depends on it has a race. Shared memory is filled with 0xFF bytes (NaN)
// for each block, in an allocation of exactly its size with a guard behind it, so that neither what
// a block before has left nor the place beyond can be used unseen.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern thread_local uint3 threadIdx, blockIdx;
extern thread_local dim3 blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid configuration argument"; }

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

// Run `thread` once for each thread of each block. Throws std::runtime_error where threads wait
// for ever, where a block has written beyond its shared memory, or where a copy is wrong.
void run(dim3 grid, dim3 block, const std::function<void()>& thread);

void block_barrier();
void warp_barrier();

// The block's piece of shared memory for one kernel's struct, told apart by `key`.
void* shared(const void* key, size_t size, size_t alignment);

template <typename T>
T& shared() {
  static const char key = 0;
  return *static_cast<T*>(shared(&key, sizeof(T), alignof(T)));
}

// The calling thread's asynchronous copies: `size` bytes, the last `zeros` of which are not read
// but become 0; those since the last commit form a group. What is copied is not there before the
// thread has waited for it: until then the place holds 0xFF bytes (NaN), so that a wait that is
// missing, or too early, shows in the result. A copy that is misaligned, that goes elsewhere than
// to the block's shared memory, or that nobody waits for is told by `run`.
void start_copy(void* to, const void* from, size_t size, size_t zeros);
void commit_copies();
void wait_for_copies(size_t pending_groups);

// What the lanes of the calling thread's warp have put down for an exchange.
uint64_t* slots();
unsigned lane();

template <typename T>
T exchange(unsigned mask, T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xFFFFFFFFu) __builtin_trap();  // whole warps only
  std::memcpy(&slots()[lane()], &value, sizeof(T));
  warp_barrier();
  T result;
  std::memcpy(&result, &slots()[from], sizeof(T));
  warp_barrier();  // nobody puts down the next value before all have read this one
  return result;
}

}  // namespace cuda_on_cpu

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7FFFFFFFu || grid.y == 0 ||
      grid.y > 65535 || grid.z == 0 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  cuda_on_cpu::run(grid, block, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline void __syncthreads() { cuda_on_cpu::block_barrier(); }
inline void __syncwarp() { cuda_on_cpu::warp_barrier(); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int from) {
  return cuda_on_cpu::exchange(mask, value, from % cuda_on_cpu::kWarp);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_on_cpu::exchange(mask, value, cuda_on_cpu::lane() ^ bits);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = cuda_on_cpu::lane();
  return cuda_on_cpu::exchange(mask, value, lane < by ? lane : lane - by);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by) {
  const unsigned lane = cuda_on_cpu::lane(), from = lane + by;
  return cuda_on_cpu::exchange(mask, value, from < cuda_on_cpu::kWarp ? from : lane);
}
inline unsigned __ballot_sync(unsigned mask, int holds) {
  unsigned bits = 0;
  for (unsigned from = 0; from < cuda_on_cpu::kWarp; ++from)
    bits |= unsigned(cuda_on_cpu::exchange(mask, holds, from) != 0) << from;
  return bits;
}

template <typename T>
T atomicAdd(T* place, T value) {  // no other fiber runs meanwhile
  const T before = *place;
  *place = before + value;
  return before;
}

inline int __clz(unsigned value) { return value == 0 ? 32 : __builtin_clz(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
