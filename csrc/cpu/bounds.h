// The larger and the smaller of two vectors of float by the processor's own instruction, where it
// has one: of `a > b ? a : b` the compiler makes a comparison and a choice. As there, the second is
// taken where either is NaN.
#pragma once

#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

template <typename V>
FF_INLINE V larger(V a, V b) {
  if constexpr (std::is_same_v<V, VectorF>) {
#if defined(__AVX512F__)
    return bit_cast<V>(_mm512_max_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
    return bit_cast<V>(_mm256_max_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__x86_64__)
    return bit_cast<V>(_mm_max_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#endif
  }
  return a > b ? a : b;
}

template <typename V>
FF_INLINE V smaller(V a, V b) {
  if constexpr (std::is_same_v<V, VectorF>) {
#if defined(__AVX512F__)
    return bit_cast<V>(_mm512_min_ps(bit_cast<__m512>(a), bit_cast<__m512>(b)));
#elif defined(__AVX2__)
    return bit_cast<V>(_mm256_min_ps(bit_cast<__m256>(a), bit_cast<__m256>(b)));
#elif defined(__x86_64__)
    return bit_cast<V>(_mm_min_ps(bit_cast<__m128>(a), bit_cast<__m128>(b)));
#endif
  }
  return a < b ? a : b;
}

}  // namespace fastfusion::FF_CAPABILITY
