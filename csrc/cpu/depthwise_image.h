// Depthwise convolution of whole images, for the kernels that are made of several, and what they do
// with lines and elements.
#pragma once

#include <algorithm>

#include "depthwise_tile.h"
#include "parallel.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {

// y = filter * x + bias, or with the filter turned (`flip`). W is the type of the filter, T that of
// x; that of y, Y, is the type sums are made in.
template <typename W, typename T, typename Y>
void convolve_image(const Image& x, const FilterView& filter, bool flip, bool across,
                    const Image& y);

// Whether whole vectors of y should go past the caches, and can: all of them are aligned.
template <typename A>
bool can_stream(const Image& y) {
  const auto aligned = [&](int64_t stride) { return stride % kLanes<A> == 0; };
  return should_stream<A>(y.batch * y.channels * y.rows * y.columns) &&
         reinterpret_cast<uintptr_t>(y.data) % kVectorBytes == 0 && aligned(y.batch_stride) &&
         aligned(y.row_stride) && aligned(std::max(y.column_stride, y.channel_stride));
}

// A line of sums as the tiles leave it: `columns` of one channel at (b, channel, row, column), or
// as many pixels of `channels` channels, `step` apart.
template <typename A>
struct Line {
  const A* sums;
  int64_t b, channel, row, column, columns, channels, step;
};

// Call f(vector of sums, where it lies, offset from the line's first element in `image`, count of
// valid lanes).
template <bool kAcross, typename A, typename F>
FF_INLINE void for_vectors(const Line<A>& line, const Image& image, const F& f) {
  constexpr int64_t kLane = kLanes<A>;
  if constexpr (kAcross) {
    for (int64_t p = 0; p < line.columns; ++p)
      for (int64_t c = 0; c < line.channels; c += kLane) {
        const A* sums = line.sums + p * line.step + c;
        f(load(sums), sums, p * image.column_stride + c,
          static_cast<int>(std::min(kLane, line.channels - c)));
      }
  } else {
    for (int64_t i = 0; i < line.columns; i += kLane)
      f(load(line.sums + i), line.sums + i, i, static_cast<int>(std::min(kLane, line.columns - i)));
  }
}

// Call f(first, count) for the vectors of `size` elements, the last of which may not be full.
template <typename A, typename F>
void for_elements(int64_t size, const F& f) {
  constexpr int64_t kLane = kLanes<A>;
  parallel_for(0, (size + kLane - 1) / kLane, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      f(i * kLane, static_cast<int>(std::min(kLane, size - i * kLane)));
  });
}

}  // namespace fastfusion::FF_CAPABILITY
