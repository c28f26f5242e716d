// The inner loop that all depthwise kernels share: some output rows of one channel (vectors lie
// along the columns) or of a block of channels (vectors lie across the channels) at a time.
//
// With dilation d, output rows d apart share input rows: a "lattice" of such rows is convolved as
// if there were no dilation. A tile holds R lattice rows x V vectors of sums in registers; each
// input vector is loaded once for a tap column and used for all R rows. Rows of the image's zero
// padding are left out, columns of it are zeros in memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "depthwise.h"
#include "types.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Memory for vectors, uninitialised.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : data_(static_cast<A*>(::operator new(count * sizeof(A), std::align_val_t{64}))) {}
  A* get() const { return data_.get(); }
  A& operator[](int64_t index) const { return data_.get()[index]; }

 private:
  struct Free {
    void operator()(A* data) const { ::operator delete(data, std::align_val_t{64}); }
  };
  std::unique_ptr<A, Free> data_;
};

// A filter packed for the tiles, tap column by tap column: (C, columns, rows) for vectors along the
// columns; (C / lanes, columns, rows, lanes), filled up with zeros, for vectors across the
// channels.
template <typename A>
struct Filter {
  FilterShape shape;
  bool across;
  Buffer<A> weight, bias;

  template <typename T>
  static Filter pack(const FilterView& view, int64_t channels, bool across, bool flip);

  const A* weight_of(int64_t channel) const {
    return &weight[channel * shape.rows * shape.columns];
  }
  const A* bias_of(int64_t channel) const { return &bias[channel]; }
};

template <typename A>
template <typename T>
Filter<A> Filter<A>::pack(const FilterView& view, int64_t channels, bool across, bool flip) {
  const auto [rows, columns, row_dilation, column_dilation] = view.shape;
  const int64_t lanes = across ? kLanes<A> : 1, taps = rows * columns;
  const int64_t blocks = (channels + lanes - 1) / lanes;
  Filter<A> f{view.shape, across, Buffer<A>(blocks * taps * lanes), Buffer<A>(blocks * lanes)};
  const T* weight = static_cast<const T*>(view.weight);
  const T* bias = static_cast<const T*>(view.bias);
  for (int64_t channel = 0; channel < blocks * lanes; ++channel) {
    const int64_t block = channel / lanes, lane = channel % lanes;
    const bool real = channel < channels;
    f.bias[channel] = real && bias != nullptr ? widen(bias[channel]) : A(0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t from = row * columns + column, tap = flip ? taps - 1 - from : from;
        f.weight[((block * columns + column) * rows + row) * lanes + lane] =
            real ? widen(weight[channel * taps + tap]) : A(0);
      }
    }
  }
  return f;
}

// -- copies of the input --------------------------------------------------------------------------

// Columns first .. first + count - 1 of a row of one channel, widened; zeros beyond the edges.
template <typename T, typename A>
void copy_columns(const Image& x, int64_t b, int64_t channel, int64_t row, int64_t first,
                  int64_t count, A* to) {
  const int64_t begin = std::clamp<int64_t>(-first, 0, count);
  const int64_t end = std::clamp<int64_t>(x.columns - first, begin, count);
  const T* from = x.at<T>(b, channel, row) + first * x.column_stride;
  std::fill(to, to + begin, A(0));
  int64_t i = begin;
  if (x.column_stride == 1) {
    for (; i + kLanes<A> <= end; i += kLanes<A>) store(to + i, load(from + i));
  }
  for (; i < end; ++i) to[i] = widen(from[i * x.column_stride]);
  std::fill(to + end, to + count, A(0));
}

// Pixels first .. first + count - 1 of a row, `channels` of each, in the type of the copy and
// filled up with zeros to whole vectors; zeros beyond the edges too. `step` is from a pixel to the
// next in the copy.
template <typename T, typename W>
void copy_pixels(const Image& x, int64_t b, int64_t channel, int64_t channels, int64_t row,
                 int64_t first, int64_t count, W* to, int64_t step) {
  using A = Accumulator<W>;
  constexpr int kLane = kLanes<A>;
  for (int64_t i = 0; i < count; ++i, to += step) {
    const int64_t column = first + i;
    const bool inside = column >= 0 && column < x.columns;
    const T* from = inside ? x.at<T>(b, channel, row, column) : nullptr;
    for (int64_t c = 0; c < channels; c += kLane) {
      const int lanes = static_cast<int>(std::min<int64_t>(kLane, channels - c));
      if (!inside) {
        store(to + c, Vector<A>{});
      } else if (x.channels_dense()) {
        store(to + c, lanes == kLane ? load(from + c) : load(from + c, lanes));
      } else {
        for (int lane = 0; lane < kLane; ++lane)
          to[c + lane] =
              narrow<W>(lane < lanes ? widen(from[(c + lane) * x.channel_stride]) : A(0));
      }
    }
  }
}

// -- the tiles ------------------------------------------------------------------------------------

// Sums in registers: 24 of the 32 that AVX-512 and Arm have, 12 of the 16 of the others; the rest
// holds a vector of weights and those of the input. The more rows, the fewer loads for each sum.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 6, kTileVectors = 4;
#else
constexpr int kTileRows = 6, kTileVectors = 2;
#endif

// Rows of the output (of one lattice) that are made at a time: as many as a tile can take.
inline int64_t group_of(const FilterShape& shape) { return shape.rows < 3 ? 1 : kTileRows; }

// A piece of some lattice rows of the output. X and Y are the types of the input and the output:
// along the columns both that of the sums; across the channels X may be narrower, and Y may be X.
template <typename X, typename Y = X>
struct Piece {
  // Of the output's first row and those `row_dilation` apart: count + filter.shape.rows - 1 input
  // rows, each at the place of the first tap of the first column; null where they lie outside the
  // image.
  const X* const* input;
  int64_t count;    // output rows
  int64_t columns;  // output columns
  // How far neighbouring columns are apart: 1 along the columns, more across the channels.
  int64_t input_step, output_step;
  Y* output;
  int64_t output_row_step;
  // Across the channels: how many are taken, block by block for each tile. Where the last block is
  // not full, its input is read as if it were.
  int64_t channels;
  // Along the columns: where the input of the rows after these comes from, to be fetched ahead.
  const void* ahead = nullptr;
  int64_t ahead_row_step = 0, ahead_step = 0;  // in bytes
  // Store whole vectors past the caches; they must be aligned, and Y that of the sums. The caller
  // calls stream_fence().
  bool stream = false;
};

// Convolve a piece for `channel`, or for the channels that start there.
template <typename X, typename Y>
void convolve(const Filter<Accumulator<X>>& filter, int64_t channel, const Piece<X, Y>& piece);

// The gradients of filters and biases, (C, 1, rows, columns) and (C); either may be null. T and G,
// the types of `x` and `grad`, are W or wider.
template <typename W, typename T, typename G>
void weight_gradient(const Image& x, const Image& grad, const FilterShape& shape, bool across,
                     W* grad_weight, W* grad_bias);

}  // namespace fastfusion::FF_CAPABILITY
