// Writing rows of results: narrowed to the element type, and past the caches where they are many.
//
// An ordinary store first reads its cache line from memory. For outputs larger than the caches
// that is a third of the traffic of a copy, so they are stored past them. Rows are computed into a
// buffer in the first-level cache and go out from there, whatever their alignment.
#pragma once

#include <algorithm>
#include <cstddef>

#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

// Outputs of so many bytes in all are stored past the caches.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Whether an operator that writes `count` elements should stream them.
template <typename T>
FF_INLINE bool should_stream(int64_t count) {
  return count * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Store a vector to an aligned place that will not be read soon. End with stream_fence().
template <typename V>
FF_INLINE void stream(void* to, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), bit_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), bit_cast<__m256i>(v));
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), bit_cast<__m128i>(v));
#else
  std::memcpy(to, &v, sizeof(v));
#endif
}

// Copy bytes to memory that will not be read soon. End with stream_fence() in the same thread.
inline void stream_copy(void* to, const void* from, size_t bytes) {
#if defined(__x86_64__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  const size_t head = std::min<size_t>(-reinterpret_cast<uintptr_t>(out) % kVectorBytes, bytes);
  std::memcpy(out, in, head);
  size_t i = head;
  for (; i + kVectorBytes <= bytes; i += kVectorBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
#endif
  }
  std::memcpy(out + i, in + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Make streamed bytes visible before the thread reports that it is done.
FF_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T>
inline void narrow_row(T* to, const Accumulator<T>* from, int64_t count) {
  constexpr int64_t lanes = kLanes<Accumulator<T>>;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = narrow<T>(from[i]);
}

// Write a row of results. `scratch` has room for `count` elements of T; float and double need none.
template <typename T>
inline void write_row(T* to, const Accumulator<T>* from, int64_t count, bool streaming,
                      T* scratch = nullptr) {
  if (!streaming) return narrow_row(to, from, count);
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    stream_copy(to, from, count * sizeof(T));
  } else {
    narrow_row(scratch, from, count);
    stream_copy(to, scratch, count * sizeof(T));
  }
}

}  // namespace fastfusion::FF_CAPABILITY
