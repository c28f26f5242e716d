// What the kernels of SpeCAM's first stage share: an image split into its Haar bands and both of
// them filtered, tile by tile, without storing either.
//
// The tile is a strip of a plane (NCHW), or of a group of as many channels as a vector holds
// (NHWC). It is walked from top to bottom by pairs of rows. Each pair is split once into the means
// of its 2x2 blocks and the rest, which stay with those of the pairs above and below in a ring in
// the first-level cache. The low band is constant in each block, so that of its nine taps four
// remain, with weights added up beforehand; these differ for even and odd rows and columns.
#pragma once

#include <algorithm>
#include <vector>

#include "haar_blocks.h"
#include "spectral_stage.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

enum Band { kLow, kHigh };

// Zeros, aligned for vectors: a row that starts at a whole vector takes half of the accesses of one
// that does not.
template <typename A>
class Zeros {
 public:
  static constexpr int64_t kLine = 64 / sizeof(A);
  explicit Zeros(int64_t count) : lines_((count + kLine - 1) / kLine) {}
  A* data() { return lines_.data()->values; }
  static int64_t round_up(int64_t count) { return (count + kLine - 1) / kLine * kLine; }

 private:
  struct alignas(64) Line {
    A values[kLine];
  };
  std::vector<Line> lines_;
};

// Columns of a strip: its ring of rows stays in the first-level cache. Even.
template <bool planar>
constexpr int64_t kStripColumns = planar ? 512 : 32;

// -- the filters ----------------------------------------------------------------------------------

template <typename T>
struct Filters {
  using A = Accumulator<T>;
  const SpectralFilters& raw;

  A weight(Band band, int64_t c, int tap) const {
    return widen(static_cast<const T*>(raw.weight[band])[9 * c + tap]);
  }
  A bias(Band band, int64_t c) const {
    return raw.bias[band] == nullptr ? A(0) : widen(static_cast<const T*>(raw.bias[band])[c]);
  }
};

// The filters of the channels of a tile, one a lane, or (planar) one in all lanes.
template <typename T>
struct TileFilters {
  using A = Accumulator<T>;
  using V = Vector<A>;
  V high[9], bias[2];
  // folded[last_row][last_column]: the low band's weights of the blocks around an even or odd row
  // and column, as folded[..][..].tap[row][column][block above, below][block to the left, right].
  // The last row (column) is that of an odd image, which has no odd row (column) beside it.
  struct Folded {
    V tap[2][2][2][2];
  } folded[2][2];

  TileFilters(const Filters<T>& filters, int64_t channel, int64_t channels, bool planar) {
    const auto in_lanes = [&](const auto& value_of) {
      if (planar) return broadcast(value_of(channel));
      V lanes = {};
      for (int64_t lane = 0; lane < std::min<int64_t>(channels, kLanes<A>); ++lane)
        lanes[lane] = value_of(channel + lane);
      return lanes;
    };
    V low[9];
    for (int tap = 0; tap < 9; ++tap) {
      low[tap] = in_lanes([&](int64_t c) { return filters.weight(kLow, c, tap); });
      high[tap] = in_lanes([&](int64_t c) { return filters.weight(kHigh, c, tap); });
    }
    for (Band band : {kLow, kHigh})
      bias[band] = in_lanes([&](int64_t c) { return filters.bias(band, c); });
    // The taps, of three in a line, that fall on the block before or on that behind.
    const auto falls = [](int odd, int behind, int tap, int last) {
      if (odd) return behind ? tap == 2 : tap < 2;
      return behind ? tap == 1 || (tap == 2 && !last) : tap == 0;
    };
    for (int last_row = 0; last_row < 2; ++last_row)
      for (int last_column = 0; last_column < 2; ++last_column)
        for (int place = 0; place < 16; ++place) {
          const int row = place / 8, column = place / 4 % 2, below = place / 2 % 2,
                    right = place % 2;
          V sum = {};
          for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j)
              if (falls(row, below, i, last_row) && falls(column, right, j, last_column))
                sum += low[3 * i + j];
          folded[last_row][last_column].tap[row][column][below][right] = sum;
        }
  }
};

// -- a tile ---------------------------------------------------------------------------------------

template <typename T, bool planar>
class Tile {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t kColumns = planar ? kLanes<A> : 1;  // columns in a vector
  static constexpr int64_t kStep = planar ? 1 : kLanes<A>;     // elements from column to column

  Tile(const Image& x, const TileFilters<T>& filters, int64_t b, int64_t channel, int64_t first)
      : x_(x),
        filters_(filters),
        b_(b),
        channel_(channel),
        first_(first),
        columns_(std::min(kStripColumns<planar>, x.columns - first)),
        mean_room_(Zeros<A>::round_up(kMeanLead + (columns_ / 2 + 2) * kStep + kLanes<A>)),
        part_room_(Zeros<A>::round_up(kPartLead + (columns_ + 3) * kStep + kLanes<A>)),
        memory_(3 * mean_room_ + 6 * part_room_) {}

  // For each pair of rows in [begin, end), call consume(band, row, column, step, values, count) for
  // all its values before GELU: `count` columns of the strip from `column` on, `step` apart, of the
  // pair's first (0) or second row, in the lanes of a vector (planar; more lanes than the count
  // mean nothing), or one column of the channels. Then call finish(pair).
  template <typename Consume, typename Finish>
  FF_INLINE void walk(int64_t begin, int64_t end, const Consume& consume, const Finish& finish) {
    load_pair(begin - 1);
    load_pair(begin);
    for (int64_t pair = begin; pair < end; ++pair) {
      load_pair(pair + 1);
      convolve_low(pair, consume);
      convolve_high(pair, consume);
      finish(pair);
    }
  }

 private:
  // Elements before a row's first block, and before its first column: whole vectors.
  static constexpr int64_t kMeanLead = kLanes<A>, kPartLead = (planar ? 1 : 2) * kLanes<A>;

  bool has_below(int64_t pair) const { return 2 * pair + 1 < x_.rows; }

  // The rows of a pair, from the strip's first block (column) on; before it are one block (two
  // columns) more, and behind its last one as well.
  A* mean(int64_t pair) { return memory_.data() + (pair + 3) % 3 * mean_room_ + kMeanLead; }
  A* rest(int64_t pair, int row) {
    return memory_.data() + 3 * mean_room_ + ((pair + 3) % 3 * 2 + row) * part_room_ + kPartLead;
  }

  // Split a pair of rows of the strip with its margins. Outside the image is zero.
  FF_INLINE void load_pair(int64_t pair) {
    A *means = mean(pair), *above = rest(pair, 0), *below = rest(pair, 1);
    const bool outside = pair < 0 || 2 * pair >= x_.rows;
    const int64_t first = first_ > 0 ? -2 : 0;
    const int64_t last = outside ? first : std::min(columns_ + 2, x_.columns - first_);
    if (!outside) {
      const T* from_above = x_.at<T>(b_, channel_, 2 * pair, first_ + first);
      const T* from_below = has_below(pair) ? from_above + x_.row_stride : from_above;
      split(from_above, from_below, last - first, means + first / 2 * kStep, above + first * kStep,
            below + first * kStep);
    }
    const auto clear = [](A* row, int64_t from, int64_t to) {
      std::fill(row + from * kStep, row + to * kStep, A(0));
    };
    clear(means, -1, first / 2);
    clear(means, last / 2 + last % 2, columns_ / 2 + 2);  // last may be -2
    clear(above, -2, first);
    clear(above, last, columns_ + 3);
    clear(below, -2, first);
    clear(below, has_below(pair) ? last : first, columns_ + 3);
  }

  FF_INLINE void split(const T* from_above, const T* from_below, int64_t columns, A* means,
                       A* above, A* below) {
    const auto split_block = [&](auto block, auto p, auto q) FF_INLINED {
      const auto mean = (p.left + p.right + q.left + q.right) * A(0.25);
      block.put(means, mean);
      block.put_pair(above, Pair{p.left - mean, p.right - mean});
      block.put_pair(below, Pair{q.left - mean, q.right - mean});
    };
    if constexpr (planar) {
      const int64_t ahead = elements_ahead<T>(x_.columns, x_.row_stride);
      for_blocks<true, A>(columns, 1, [&](auto block) {
        split_block(block, block.get_pair(from_above, ahead), block.get_pair(from_below, ahead));
      });
    } else {
      const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, x_.channels - channel_));
      const auto get = [&](const T* row, int64_t column) FF_INLINED {
        const T* from = row + column * x_.column_stride;
        __builtin_prefetch(from + 2 * x_.row_stride);
        return count == kLanes<A> ? load(from) : load(from, count);
      };
      for (int64_t column = 0; column < columns; column += 2) {
        const bool edge = column + 1 == columns;
        const V a = get(from_above, column), b = edge ? a : get(from_above, column + 1);
        const V c = get(from_below, column), d = edge ? c : get(from_below, column + 1);
        // Of an edge block the right column is written too, and cleared afterwards.
        split_block(HaarBlock<false, true, false>{column / 2 * kStep, column * kStep, kStep},
                    Pair<V>{a, b}, Pair<V>{c, d});
      }
    }
  }

  template <typename F>
  FF_INLINE void convolve_low(int64_t pair, const F& consume) {
    const A* const rows[3] = {mean(pair - 1), mean(pair), mean(pair + 1)};
    const bool odd_row = has_below(pair);
    const auto around = [&](const auto& folded, int64_t block, int64_t count, bool odd_column)
                            FF_INLINED {
                              V m[3][3];
                              unroll<9>([&](auto i) FF_INLINED {
                                m[i / 3][i % 3] = load(rows[i / 3] + (block + i % 3 - 1) * kStep);
                              });
                              unroll<4>([&](auto i) FF_INLINED {
                                constexpr int row = i / 2, column = i % 2;
                                if ((row == 0 || odd_row) && (column == 0 || odd_column)) {
                                  const auto& tap = folded.tap[row][column];
                                  V p = fma(tap[0][0], m[row][column], filters_.bias[kLow]);
                                  p = fma(tap[0][1], m[row][column + 1], p);
                                  p = fma(tap[1][0], m[row + 1][column], p);
                                  p = fma(tap[1][1], m[row + 1][column + 1], p);
                                  consume(kLow, row, 2 * block + column, 2, p, count);
                                }
                              });
                            };
    const auto& folded = filters_.folded[!odd_row];
    const int64_t whole = columns_ / 2;
    for (int64_t block = 0; block < whole; block += kColumns)
      around(folded[0], block, std::min(kColumns, whole - block), true);
    if (columns_ % 2) around(folded[1], whole, 1, false);
  }

  template <typename F>
  FF_INLINE void convolve_high(int64_t pair, const F& consume) {
    const A* const rows[4] = {rest(pair - 1, 1), rest(pair, 0), rest(pair, 1), rest(pair + 1, 0)};
    const bool odd_row = has_below(pair);
    for (int64_t column = 0; column < columns_; column += kColumns) {
      V p[2] = {filters_.bias[kHigh], filters_.bias[kHigh]};
      unroll<12>([&](auto i) FF_INLINED {
        constexpr int row = i / 3, tap = i % 3;
        const V value = load(rows[row] + (column + tap - 1) * kStep);
        if constexpr (row < 3) p[0] = fma(filters_.high[3 * row + tap], value, p[0]);
        if constexpr (row > 0) p[1] = fma(filters_.high[3 * (row - 1) + tap], value, p[1]);
      });
      const int64_t count = std::min(kColumns, columns_ - column);
      consume(kHigh, 0, column, 1, p[0], count);
      if (odd_row) consume(kHigh, 1, column, 1, p[1], count);
    }
  }

  const Image& x_;
  const TileFilters<T>& filters_;
  const int64_t b_, channel_, first_, columns_, mean_room_, part_room_;
  Zeros<A> memory_;
};

}  // namespace fastfusion::FF_CAPABILITY
