// The sum that all depthwise kernels are made of, with the sliding window in registers.
//
// A thread computes R pixels of one column of one channel, `dilation` rows apart (a lattice), so
// that they share their input rows: of R + kh - 1 values loaded in a column of taps each is used by
// up to R sums. Lanes lie along what is adjacent in memory, columns or channels; a pixel is fetched
// from the first-level cache once for each column of taps, where a shuffle would cost as much.
#pragma once

#include "launch.h"
#include "tile.h"

namespace fastfusion::cuda {

enum class Activation { kNone, kRelu, kGelu, kSilu };

__device__ inline float normal_cdf(float x) { return 0.5f * erfcf(x * -0.70710678118654752f); }

__device__ inline float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? 0.0f : x;
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    default:
      return x;
  }
}

__device__ inline float slope(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu:
      return x > 0 ? 1.0f : 0.0f;
    case Activation::kGelu:
      return normal_cdf(x) + x * 0.39894228040143268f * expf(-0.5f * x * x);
    case Activation::kSilu: {
      const float share = 1.0f / (1.0f + expf(-x));
      return share * (1.0f + x * (1.0f - share));
    }
    default:
      return 1.0f;
  }
}

// A filter for each channel; `tap` is the step from one tap to the next and may be negative, which
// turns the filter round.
template <typename T>
struct Filter {
  const T* taps;
  const T* bias;  // null where there is none
  int64_t channel, tap;
  int rows, columns, row_dilation, column_dilation;
};

// Groups of R rows, `dilation` apart, of an image.
template <int R>
__device__ int first_row(int64_t group, int rows, int dilation) {
  const int phases = dilation < rows ? dilation : rows;
  return static_cast<int>(group % phases) + static_cast<int>(group / phases) * R * dilation;
}
template <int R>
int64_t row_groups(int64_t rows, int64_t dilation) {
  const int64_t phases = dilation < rows ? dilation : rows;
  return phases * divided(divided(rows, dilation), R);
}

// A column of K taps, `step` apart, to R sums; next() is the next of the R + K - 1 values that they
// see.
template <int R, int K, typename W, typename Next>
__device__ void add_column(const Next& next, const W* taps, int64_t step, float (&sum)[R]) {
  float window[R + K - 1];
#pragma unroll
  for (float& value : window) value = next();
#pragma unroll
  for (int p = 0; p < K; ++p) {
    const float tap = widen(taps[p * step]);
#pragma unroll
    for (int i = 0; i < R; ++i) sum[i] += tap * window[i + p];
  }
}

template <int R, typename W>
__device__ void add_bias(const Filter<W>& filter, int64_t channel, float (&sum)[R]) {
  if (filter.bias == nullptr) return;
  const float bias = widen(filter.bias[channel]);
#pragma unroll
  for (float& value : sum) value += bias;
}

// R sums from `row` of `column` on. K is the size of a square filter, or 0 for any.
template <int R, int K, typename T, typename W>
__device__ void correlate(const View<const T>& x, const Filter<W>& filter, const Shape& image,
                          int64_t batch, int64_t channel, int row, int column, float (&sum)[R]) {
  const int kh = K > 0 ? K : filter.rows, kw = K > 0 ? K : filter.columns;
  const int rows = static_cast<int>(image.rows), columns = static_cast<int>(image.columns);
  const int64_t row_step = filter.row_dilation * x.row;
#pragma unroll
  for (int i = 0; i < R; ++i) sum[i] = 0;
  // Larger filters column by column: unrolled, the compiler would load them all at once and spill.
#pragma unroll(K == 3 ? 3 : 1)
  for (int q = 0; q < kw; ++q) {
    const int from_column = column + (q - kw / 2) * filter.column_dilation;
    const bool seen = from_column >= 0 && from_column < columns;
    int from_row = row - kh / 2 * filter.row_dilation;
    const T* from = x.at(batch, channel, from_row, from_column);
    const W* taps = filter.taps + channel * filter.channel + q * filter.tap;
    const auto next = [&] {
      const bool inside = seen && from_row >= 0 && from_row < rows;
      const float value = inside ? widen(*from) : 0.0f;
      from += row_step;
      from_row += filter.row_dilation;
      return value;
    };
    if constexpr (K > 0) {
      add_column<R, K>(next, taps, K * filter.tap, sum);
    } else {
      float window[2 * R - 1];
#pragma unroll
      for (int i = 0; i < R - 1; ++i) window[i] = next();
      for (int first = 0; first < kh; first += R) {
#pragma unroll
        for (int i = 0; i < R; ++i) window[R - 1 + i] = next();
#pragma unroll
        for (int p = 0; p < R; ++p) {
          if (first + p >= kh) break;
          const float tap = widen(taps[static_cast<int64_t>(first + p) * kw * filter.tap]);
#pragma unroll
          for (int i = 0; i < R; ++i) sum[i] += tap * window[i + p];
        }
#pragma unroll
        for (int i = 0; i < R - 1; ++i) window[i] = window[i + R];
      }
    }
  }
  add_bias(filter, channel, sum);
}

}  // namespace fastfusion::cuda
