// Blocks one after another, threads as fibers: see cuda_runtime.h.
#include "cuda_runtime.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

namespace cuda_on_cpu {
namespace {

constexpr size_t kStack = 128 << 10;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // the sanitizer's own stands right behind the allocation
#else
constexpr size_t kGuard = 64;
#endif
constexpr unsigned char kPoison = 0xFF;

// -- fibers: a stack each, and a way to change from one to another -------------------------------

#if defined(__x86_64__)
using Context = void*;  // the stack pointer, above the registers that a call must keep

extern "C" void cuda_on_cpu_switch(Context* from, Context to);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

void change(Context& from, Context& to) { cuda_on_cpu_switch(&from, to); }

void prepare(Context& context, char* stack, void (*entry)()) {
  // The entry is returned to, and finds the stack as after a call: 8 bytes off a multiple of 16.
  void** top = reinterpret_cast<void**>(stack + kStack) - 2;
  *top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;

void change(Context& from, Context& to) { swapcontext(&from, &to); }

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack = {stack, 0, kStack};
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}
#endif

// -- a block -------------------------------------------------------------------------------------

// The n-th time that `expected` threads have come, all may go on.
struct Barrier {
  unsigned expected = 0, come = 0;
  uint64_t passed = 0;
};

struct Copy {
  unsigned char* to;
  const void* from;
  size_t size, zeros;
  uint64_t group;
};

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  uint3 index;
  Barrier* barrier;  // at which it waits
  uint64_t round;    // until the barrier has been passed more often
  bool done;
  std::vector<Copy> copies;  // that have not arrived
  uint64_t groups;           // of copies, committed

  bool ready() const { return !done && (barrier == nullptr || barrier->passed > round); }
};

struct Warp {
  Barrier barrier;
  uint64_t slots[kWarp];
};

struct SharedMemory {
  std::unique_ptr<unsigned char[]> bytes;
  size_t size;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  std::map<const void*, SharedMemory> shared;
  Context scheduler;
  Fiber* current = nullptr;
  const char* fault = nullptr;  // told when the fiber that met it gives up its turn
  const std::function<void()>* thread = nullptr;
};

thread_local Block block;

void enter() {
  (*block.thread)();
  if (!block.current->copies.empty()) block.fault = "a thread ended before its copies arrived";
  block.current->done = true;
  change(block.current->context, block.scheduler);
}

unsigned number(const Fiber& fiber) { return static_cast<unsigned>(&fiber - block.fibers.data()); }

void wait(Barrier& barrier) {
  Fiber& fiber = *block.current;
  fiber.barrier = &barrier;
  fiber.round = barrier.passed;
  if (++barrier.come == barrier.expected) {
    barrier.come = 0;
    ++barrier.passed;
  }
  change(fiber.context, block.scheduler);
}

void put_in_order(std::vector<unsigned>& order, std::minstd_rand& random) {
  const char* wish = std::getenv("CUDA_ON_CPU_ORDER");
  const std::string name = wish == nullptr ? "forward" : wish;
  std::iota(order.begin(), order.end(), 0u);
  if (name == "reverse") std::reverse(order.begin(), order.end());
  if (name == "random") std::shuffle(order.begin(), order.end(), random);
}

// Fibers are left where they are when this throws: their stacks are used anew by the next block.
void run_block(unsigned threads, std::minstd_rand& random) {
  block.shared.clear();
  block.barrier = {threads, 0, 0};
  for (unsigned first = 0; first < threads; first += kWarp)
    block.warps[first / kWarp].barrier = {std::min(kWarp, threads - first), 0, 0};
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fiber.barrier = nullptr;
    fiber.done = false;
    fiber.copies.clear();
    fiber.groups = 0;
#if defined(__SANITIZE_ADDRESS__)
    // A fiber never returns from its first function, whose guards would stay.
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack.get(), kStack);
#endif
    prepare(fiber.context, fiber.stack.get(), enter);
  }
  std::vector<unsigned> order(threads);
  for (unsigned left = threads; left > 0;) {
    put_in_order(order, random);
    bool moved = false;
    for (unsigned i : order) {
      Fiber& fiber = block.fibers[i];
      if (!fiber.ready()) continue;
      moved = true;
      block.current = &fiber;
      threadIdx = fiber.index;
      change(block.scheduler, fiber.context);
      left -= fiber.done;
      if (const char* fault = std::exchange(block.fault, nullptr)) throw std::runtime_error(fault);
    }
    if (!moved) throw std::runtime_error("threads wait at a barrier that others never reach");
  }
  for (const auto& [key, memory] : block.shared) {
    const unsigned char* end = memory.bytes.get() + memory.size;
    if (std::any_of(end, end + kGuard, [](unsigned char byte) { return byte != kPoison; }))
      throw std::runtime_error("a block has written beyond its shared memory");
  }
}

}  // namespace

void block_barrier() { wait(block.barrier); }

void warp_barrier() { wait(block.warps[number(*block.current) / kWarp].barrier); }

void start_copy(void* to, const void* from, size_t size, size_t zeros) {
  unsigned char* place = static_cast<unsigned char*>(to);
  const auto holds = [&](const auto& piece) {
    const unsigned char* begin = piece.second.bytes.get();
    return place >= begin && place + size <= begin + piece.second.size;
  };
  const auto misaligned = [&](const void* at) {
    return reinterpret_cast<uintptr_t>(at) % size != 0;
  };
  if ((size != 4 && size != 8 && size != 16) || zeros > size)
    block.fault = "a copy of other than 4, 8 or 16 bytes";
  else if (misaligned(to) || (zeros < size && misaligned(from)))
    block.fault = "a copy between misaligned addresses";
  else if (std::none_of(block.shared.begin(), block.shared.end(), holds))
    block.fault = "a copy to a place that is not shared memory";
  if (block.fault != nullptr) return;
  std::memset(place, kPoison, size);
  block.current->copies.push_back({place, from, size, zeros, block.current->groups});
}

void commit_copies() { ++block.current->groups; }

void wait_for_copies(size_t pending_groups) {
  Fiber& fiber = *block.current;
  size_t kept = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group + pending_groups < fiber.groups) {
      const size_t read = copy.size - copy.zeros;
      if (read > 0) std::memcpy(copy.to, copy.from, read);
      std::memset(copy.to + read, 0, copy.zeros);
    } else {
      fiber.copies[kept++] = copy;
    }
  }
  fiber.copies.resize(kept);
}

uint64_t* slots() { return block.warps[number(*block.current) / kWarp].slots; }

unsigned lane() { return number(*block.current) % kWarp; }

void* shared(const void* key, size_t size, size_t alignment) {
  if (alignment > alignof(std::max_align_t)) throw std::runtime_error("shared memory: alignment");
  SharedMemory& memory = block.shared[key];
  if (memory.bytes == nullptr) {
    memory = {std::unique_ptr<unsigned char[]>(new unsigned char[size + kGuard]), size};
    std::memset(memory.bytes.get(), kPoison, size + kGuard);
  }
  return memory.bytes.get();
}

void run(dim3 grid, dim3 block_size, const std::function<void()>& thread) {
  const unsigned threads = block_size.x * block_size.y * block_size.z;
  if (block.fibers.size() < threads) block.fibers.resize(threads);
  if (block.warps.size() * kWarp < threads) block.warps.resize((threads + kWarp - 1) / kWarp);
  block.thread = &thread;
  gridDim = grid;
  blockDim = block_size;
  std::minstd_rand random(7);
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads, random);
}

}  // namespace cuda_on_cpu
