// 2x2 blocks of images, and vectors of them, in both layouts.
#pragma once

#include <type_traits>
#include <utility>

#include "shuffles.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

// How far ahead of its use a row is fetched, in bytes. The hardware's own prefetch stops at the end
// of a page and does not know of the second row: without this a transform takes twice the time.
constexpr int64_t kAhead = 6144;

// The same in elements: further along a long row, or to the same place some pairs of rows below.
template <typename T>
FF_INLINE int64_t elements_ahead(int64_t row_elements, int64_t row_stride) {
  const int64_t pair = 2 * row_elements * static_cast<int64_t>(sizeof(T));
  return pair < kAhead ? (kAhead + pair - 1) / pair * 2 * row_stride
                       : kAhead / static_cast<int64_t>(sizeof(T));
}

// Where one block, or (wide) a vector of neighbouring ones, lies in its rows: `band` in a row of a
// band, `left` in a row of the image, its right column `unit` further. In NCHW the unit is 1 and
// the two columns of neighbouring blocks alternate; in NHWC it is the number of channels. An edge
// block has no right column.
template <bool planar, bool wide, bool edge>
struct HaarBlock {
  static constexpr bool kEdge = edge;
  int64_t band, left, unit;

  template <typename T>
  FF_INLINE auto get(const T* row) const {
    if constexpr (wide)
      return load(row + band);
    else
      return widen(row[band]);
  }
  template <typename A, typename V>
  FF_INLINE void put(A* row, V value) const {
    if constexpr (wide)
      store(row + band, value);
    else
      row[band] = value;
  }
  // Both columns; of an edge block the left one twice. What lies `ahead` is fetched meanwhile.
  template <typename T>
  FF_INLINE auto get_pair(const T* row, int64_t ahead) const {
    if constexpr (wide) {
      __builtin_prefetch(row + left + ahead);
      if constexpr (!edge)
        __builtin_prefetch(row + left + (planar ? kLanes<Accumulator<T>> : unit) + ahead);
    }
    if constexpr (!wide) {
      const auto value = widen(row[left]);
      return Pair<decltype(value + 0)>{value, edge ? value : widen(row[left + (edge ? 0 : unit)])};
    } else {
      constexpr int lanes = kLanes<Accumulator<T>>;
      const auto value = load(row + left);
      if constexpr (edge)
        return Pair<Vector<Accumulator<T>>>{value, value};
      else if constexpr (planar)
        return deinterleave(value, load(row + left + lanes), std::make_index_sequence<lanes>());
      else
        return Pair<Vector<Accumulator<T>>>{value, load(row + left + unit)};
    }
  }
  template <typename A, typename V>
  FF_INLINE void put_pair(A* row, Pair<V> p) const {
    if constexpr (!wide) {
      row[left] = p.left;
      if constexpr (!edge) row[left + unit] = p.right;
    } else if constexpr (planar) {
      const Pair<V> mixed = interleave(p, std::make_index_sequence<kLanes<A>>());
      store(row + left, mixed.left);
      store(row + left + kLanes<A>, mixed.right);
    } else {
      store(row + left, p.left);
      if constexpr (!edge) store(row + left + unit, p.right);
    }
  }
};

// Call f(wide, index) so that all of [0, count) is covered: by vectors, the last of which may
// overlap the one before (results are written twice, alike), or one by one where there are fewer.
template <typename A, typename F>
FF_INLINE void cover(int64_t count, const F& f) {
  constexpr int64_t lanes = kLanes<A>;
  if (count < lanes) {
    for (int64_t i = 0; i < count; ++i) f(std::false_type(), i);
    return;
  }
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) f(std::true_type(), i);
  if (i < count) f(std::true_type(), count - lanes);
}

// Call f(block) for all blocks of a pair of rows of so many pixels.
template <bool planar, typename A, typename F>
FF_INLINE void for_blocks(int64_t pixels, int64_t unit, const F& f) {
  const int64_t whole = pixels / 2;
  if constexpr (planar) {
    cover<A>(whole, [&](auto wide, int64_t j) { f(HaarBlock<true, wide, false>{j, 2 * j, 1}); });
    if (pixels % 2) f(HaarBlock<true, false, true>{whole, pixels - 1, 1});
  } else {
    for (int64_t j = 0; j < whole; ++j)
      cover<A>(unit, [&](auto wide, int64_t c) {
        f(HaarBlock<false, wide, false>{j * unit + c, 2 * j * unit + c, unit});
      });
    if (pixels % 2)
      cover<A>(unit, [&](auto wide, int64_t c) {
        f(HaarBlock<false, wide, true>{whole * unit + c, 2 * whole * unit + c, unit});
      });
  }
}

}  // namespace fastfusion::FF_CAPABILITY
