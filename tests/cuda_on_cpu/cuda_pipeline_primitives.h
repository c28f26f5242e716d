// Asynchronous copies of CUDA's headers for the host compiler: test only.
//
// What is copied is not there before the thread that asked for it has waited for it: until then the
// place holds 0xFF bytes (NaN), so that a wait that is missing, or too early, shows in the result.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size,
                                    size_t zeros = 0) {
  cuda_on_cpu::start_copy(shared, global, size, zeros);
}
inline void __pipeline_commit() { cuda_on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(size_t pending) { cuda_on_cpu::wait_for_copies(pending); }
