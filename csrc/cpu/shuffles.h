// Exchanges between the lanes of vectors.
#pragma once

#include <utility>

#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

template <typename V>
struct Pair {
  V left, right;
};
template <typename V>
Pair(V, V) -> Pair<V>;

template <typename V, size_t... I>
FF_INLINE Pair<V> deinterleave(V first, V second, std::index_sequence<I...>) {
  return {__builtin_shufflevector(first, second, (2 * I)...),
          __builtin_shufflevector(first, second, (2 * I + 1)...)};
}

template <typename V, size_t... I>
FF_INLINE Pair<V> interleave(Pair<V> p, std::index_sequence<I...>) {
  constexpr size_t n = sizeof...(I), half = n / 2;
  return {__builtin_shufflevector(p.left, p.right, (I / 2 + (I % 2) * n)...),
          __builtin_shufflevector(p.left, p.right, (half + I / 2 + (I % 2) * n)...)};
}

// Vectors of alternating elements as those of the even and those of the odd places, and back.
template <typename A>
FF_INLINE Pair<Vector<A>> deinterleave(Vector<A> first, Vector<A> second) {
  return deinterleave(first, second, std::make_index_sequence<kLanes<A>>());
}
template <typename A>
FF_INLINE Pair<Vector<A>> interleave(Vector<A> even, Vector<A> odd) {
  return interleave(Pair<Vector<A>>{even, odd}, std::make_index_sequence<kLanes<A>>());
}

template <typename V, size_t... I>
FF_INLINE V reverse(V v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (sizeof...(I) - 1 - I)...);
}
template <typename A>
FF_INLINE Vector<A> reverse(Vector<A> v) {
  return reverse(v, std::make_index_sequence<kLanes<A>>());
}

}  // namespace fastfusion::FF_CAPABILITY
