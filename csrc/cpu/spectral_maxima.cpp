// SpeCAM's first stage on the CPU: split, two depthwise 3x3 convolutions, GELU and spatial maxima
// in one pass over the image, of which only the maxima are written.
//
// GELU falls to its minimum at -0.7518 and rises from there, so over any set of numbers its
// maximum is that of the largest or that of the smallest number: only these two are tracked, and
// GELU is taken of two numbers a channel instead of every pixel.
//
// The tile is a strip of a plane (NCHW), or of a group of as many channels as a vector holds
// (NHWC). It is walked from top to bottom by pairs of rows. Each pair is split once into the means
// of its 2x2 blocks and the rest, which stay with those of the pairs above and below in a ring in
// the first-level cache. The low band is constant in each block, so that of its nine taps four
// remain, with weights added up beforehand; these differ for even and odd rows and columns.
#include "spectral_maxima.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "haar_blocks.h"
#include "parallel.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

enum Band { kLow, kHigh };

// Columns of a strip: its ring of rows stays in the first-level cache. Even.
template <bool planar>
constexpr int64_t kStripColumns = planar ? 512 : 32;

// -- GELU -----------------------------------------------------------------------------------------

// By erfc, where 1 + erf would cancel. Minus infinity gives NaN, as in torch.
double gelu(double p) { return p * 0.5 * std::erfc(-p * std::sqrt(0.5)); }

double gelu_slope(double p) {
  const double density = std::exp(-0.5 * p * p) * 0.5 * std::sqrt(0.5) * M_2_SQRTPI;
  return 0.5 * std::erfc(-p * std::sqrt(0.5)) + p * density;
}

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
        mean_room_((columns_ / 2 + 3) * kStep + kLanes<A>),
        part_room_((columns_ + 5) * kStep + kLanes<A>),
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
  bool has_below(int64_t pair) const { return 2 * pair + 1 < x_.rows; }

  // The rows of a pair, from the strip's first block (column) on; before it are one block (two
  // columns) more, and behind its last one as well.
  A* mean(int64_t pair) { return &memory_[(pair + 3) % 3 * mean_room_ + kStep]; }
  A* rest(int64_t pair, int row) {
    return &memory_[3 * mean_room_ + ((pair + 3) % 3 * 2 + row) * part_room_ + 2 * kStep];
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
    clear(means, (last + 1) / 2, columns_ / 2 + 2);
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
        split_block(Block<false, true, false>{column / 2 * kStep, column * kStep, kStep},
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
  std::vector<A> memory_;
};

// -- extrema --------------------------------------------------------------------------------------

// The largest and the smallest of the values that each lane has seen, with the first pair of rows
// that holds them. A sum tells whether all values were finite.
template <typename A>
struct Extrema {
  using V = Vector<A>;
  using Index = Vector<std::conditional_t<sizeof(A) == 8, int64_t, int32_t>>;
  V largest = broadcast(-std::numeric_limits<A>::infinity());
  V smallest = broadcast(std::numeric_limits<A>::infinity());
  V sum = {};
  Index largest_pair = {}, smallest_pair = {};

  FF_INLINE void add(V values) {
    largest = max(largest, values);
    smallest = min(smallest, values);
    sum += values;
  }
  FF_INLINE void merge(const Extrema& of_pair, int64_t pair) {
    const Index here = Index{} + static_cast<decltype(Index{}[0] + 0)>(pair);
    largest_pair = of_pair.largest > largest ? here : largest_pair;
    smallest_pair = of_pair.smallest < smallest ? here : smallest_pair;
    largest = max(largest, of_pair.largest);
    smallest = min(smallest, of_pair.smallest);
    sum += of_pair.sum;
  }
};

// What a channel's maximum comes from: its value before GELU, and its pair of rows.
struct Peak {
  double value;
  int64_t pair;
  bool largest;  // or the smallest value there
  bool finite;   // else value and pair mean nothing
};

// Where that is.
struct Pixel {
  int64_t row, column;
  double value;
};

template <typename T, bool planar>
class Finder {
 public:
  using A = Accumulator<T>;
  using Walk = Tile<T, planar>;

  Finder(const Image& x, const SpectralFilters& filters)
      : x_(x),
        filters_{filters},
        groups_(planar ? x.channels : (x.channels + kLanes<A> - 1) / kLanes<A>),
        strips_((x.columns + kStripColumns<planar> - 1) / kStripColumns<planar>),
        extrema_(x.batch * groups_ * strips_) {
    const int64_t pairs = (x.rows + 1) / 2;
    parallel_for(0, x.batch * groups_ * strips_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t strip = task % strips_, group = task / strips_ % groups_;
        const TileFilters<T> tile_filters = filters_of(group);
        Walk tile(x_, tile_filters, task / strips_ / groups_, first_channel(group),
                  strip * kStripColumns<planar>);
        Extrema<A> all[2], of_pair[2];
        tile.walk(
            0, pairs,
            [&](Band band, int row, int64_t column, int step, Vector<A> values, int64_t count)
                FF_INLINED { of_pair[band].add(first_lanes(values, count)); },
            [&](int64_t pair) FF_INLINED {
              for (Band band : {kLow, kHigh}) {
                all[band].merge(of_pair[band], pair);
                of_pair[band] = Extrema<A>();
              }
            });
        for (Band band : {kLow, kHigh}) extrema_[task][band] = all[band];
      }
    });
  }

  Peak peak(int64_t b, int64_t c, Band band) const {
    Peak largest{-std::numeric_limits<double>::infinity(), 0, true, true};
    Peak smallest{std::numeric_limits<double>::infinity(), 0, false, true};
    bool finite = true;
    for (int64_t strip = 0; strip < strips_; ++strip) {
      const Extrema<A>& found = extrema_[(b * groups_ + group_of(c)) * strips_ + strip][band];
      for (int64_t lane = planar ? 0 : c % kLanes<A>; lane < kLanes<A>; ++lane) {
        finite = finite && std::isfinite(found.sum[lane]);
        const auto improve = [](Peak& peak, double value, int64_t pair, bool better) {
          if (better)
            peak.value = value, peak.pair = pair;
          else if (value == peak.value)
            peak.pair = std::min(peak.pair, pair);
        };
        improve(largest, found.largest[lane], found.largest_pair[lane],
                found.largest[lane] > largest.value);
        improve(smallest, found.smallest[lane], found.smallest_pair[lane],
                found.smallest[lane] < smallest.value);
        if (!planar) break;
      }
    }
    Peak chosen = gelu(largest.value) >= gelu(smallest.value) ? largest : smallest;
    chosen.finite = finite;
    return chosen;
  }

  // The first pixel, row by row, that has the peak's value.
  Pixel locate(int64_t b, int64_t c, Band band) const {
    const Peak found = peak(b, c, band);
    if (!found.finite) return locate_slowly(b, c, band);
    std::vector<A> values[2] = {std::vector<A>(x_.columns), std::vector<A>(x_.columns)};
    const TileFilters<T> tile_filters = filters_of(group_of(c));
    for (int64_t first = 0; first < x_.columns; first += kStripColumns<planar>) {
      Walk tile(x_, tile_filters, b, first_channel(group_of(c)), first);
      tile.walk(
          found.pair, found.pair + 1,
          [&](Band of, int row, int64_t column, int step, Vector<A> v, int64_t count) {
            if (of != band) return;
            for (int64_t i = 0; i < count; ++i)
              values[row][first + column + i * step] = v[planar ? i : c % kLanes<A>];
          },
          [](int64_t) {});
    }
    Pixel best{2 * found.pair, 0, values[0][0]};
    for (int row = 0; row < 2 && 2 * found.pair + row < x_.rows; ++row)
      for (int64_t column = 0; column < x_.columns; ++column) {
        const double value = values[row][column];
        if (found.largest ? value > best.value : value < best.value)
          best = {2 * found.pair + row, column, value};
      }
    return best;
  }

  // The same pixel by pixel, after torch's rules for infinity and NaN: the first NaN is a maximum.
  Pixel locate_slowly(int64_t b, int64_t c, Band band) const {
    std::vector<A> part(x_.rows * x_.columns);
    for (int64_t row = 0; row < x_.rows; ++row)
      for (int64_t column = 0; column < x_.columns; ++column)
        part[row * x_.columns + column] = part_at(b, c, band, row, column);
    Pixel best{0, 0, 0};
    double best_gelu = 0;
    for (int64_t row = 0; row < x_.rows; ++row)
      for (int64_t column = 0; column < x_.columns; ++column) {
        A value = filters_.bias(band, c);
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t i = row + tap / 3 - 1, j = column + tap % 3 - 1;
          const bool inside = i >= 0 && i < x_.rows && j >= 0 && j < x_.columns;
          value += filters_.weight(band, c, tap) * (inside ? part[i * x_.columns + j] : A(0));
        }
        const double now = gelu(value);
        const bool first = row == 0 && column == 0;
        if (first || now > best_gelu || (std::isnan(now) && !std::isnan(best_gelu)))
          best = {row, column, value}, best_gelu = now;
        if (std::isnan(best_gelu)) return best;
      }
    return best;
  }

  // A pixel of the low or of the high band.
  A part_at(int64_t b, int64_t c, Band band, int64_t row, int64_t column) const {
    const int64_t above = row & ~int64_t{1}, below = std::min(above + 1, x_.rows - 1);
    const int64_t left = column & ~int64_t{1}, right = std::min(left + 1, x_.columns - 1);
    const auto at = [&](int64_t i, int64_t j) { return widen(*x_.at<T>(b, c, i, j)); };
    const A mean = (at(above, left) + at(above, right) + at(below, left) + at(below, right)) / 4;
    return band == kLow ? mean : at(row, column) - mean;
  }

 private:
  static int64_t group_of(int64_t c) { return planar ? c : c / kLanes<A>; }
  static int64_t first_channel(int64_t group) { return planar ? group : group * kLanes<A>; }
  TileFilters<T> filters_of(int64_t group) const {
    return TileFilters<T>(filters_, first_channel(group), x_.channels - first_channel(group),
                          planar);
  }

  // Lanes that mean nothing repeat the first one.
  static FF_INLINE Vector<A> first_lanes(Vector<A> values, int64_t count) {
    if (count == Walk::kColumns) return values;
    Vector<A> lane;
    unroll<kLanes<A>>([&](auto i) FF_INLINED { lane[int{i}] = static_cast<A>(int{i}); });
    return lane < static_cast<A>(count) ? values : broadcast(A(values[0]));
  }

  struct OfBands {
    Extrema<A> band[2];
    Extrema<A>& operator[](Band i) { return band[i]; }
    const Extrema<A>& operator[](Band i) const { return band[i]; }
  };

  const Image& x_;
  const Filters<T> filters_;
  const int64_t groups_, strips_;
  std::vector<OfBands> extrema_;
};

// -- gradients ------------------------------------------------------------------------------------

// The few pixels of a plane that have a gradient; those named twice are added up.
template <typename A>
class SparsePlane {
 public:
  void add(int64_t row, int64_t column, A value) {
    for (Entry& entry : entries_)
      if (entry.row == row && entry.column == column) {
        entry.value += value;
        return;
      }
    entries_.push_back({row, column, value});
  }
  template <typename T>
  void write(const Image& to, int64_t b, int64_t c) const {
    for (const Entry& entry : entries_)
      *to.at<T>(b, c, entry.row, entry.column) = narrow<T>(entry.value);
  }

 private:
  struct Entry {
    int64_t row, column;
    A value;
  };
  std::vector<Entry> entries_;
};

// The split's adjoint on one pixel of the gradient of a band.
template <typename A>
void add_split(SparsePlane<A>& plane, const Image& x, Band band, int64_t row, int64_t column,
               A value) {
  const int64_t above = row & ~int64_t{1}, below = std::min(above + 2, x.rows);
  const int64_t left = column & ~int64_t{1}, right = std::min(left + 2, x.columns);
  const A share = value / static_cast<A>((below - above) * (right - left));
  for (int64_t i = above; i < below; ++i)
    for (int64_t j = left; j < right; ++j) plane.add(i, j, band == kLow ? share : -share);
  if (band == kHigh) plane.add(row, column, value);
}

template <typename T, bool planar>
void backward(const T* grad, const Image& x, const SpectralFilters& raw, const Image& grad_x,
              const SpectralGradients& gradients) {
  using A = Accumulator<T>;
  const Finder<T, planar> finder(x, raw);
  const Filters<T> filters{raw};
  std::vector<double> weights(2 * x.channels * 9), biases(2 * x.channels);
  for (int64_t b = 0; b < x.batch; ++b)
    for (int64_t c = 0; c < x.channels; ++c) {
      SparsePlane<A> plane;
      for (Band band : {kLow, kHigh}) {
        const int64_t channel = band * x.channels + c;
        const Pixel pixel = finder.locate(b, c, band);
        const double slope = widen(grad[b * 2 * x.channels + channel]) * gelu_slope(pixel.value);
        biases[channel] += slope;
        for (int tap = 0; tap < 9; ++tap) {
          const int64_t row = pixel.row + tap / 3 - 1, column = pixel.column + tap % 3 - 1;
          if (row < 0 || row >= x.rows || column < 0 || column >= x.columns) continue;
          weights[9 * channel + tap] += slope * finder.part_at(b, c, band, row, column);
          add_split(plane, x, band, row, column,
                    static_cast<A>(slope * filters.weight(band, c, tap)));
        }
      }
      if (grad_x.data != nullptr) plane.template write<T>(grad_x, b, c);
    }
  const auto write = [](void* to, const double* from, int64_t count) {
    for (int64_t i = 0; i < count && to != nullptr; ++i)
      static_cast<T*>(to)[i] = narrow<T>(static_cast<A>(from[i]));
  };
  for (Band band : {kLow, kHigh}) {
    write(gradients.weight[band], &weights[9 * band * x.channels], 9 * x.channels);
    write(gradients.bias[band], &biases[band * x.channels], x.channels);
  }
}

template <typename T, bool planar>
void forward(const Image& x, const SpectralFilters& filters, T* maxima) {
  using A = Accumulator<T>;
  const Finder<T, planar> finder(x, filters);
  for (int64_t b = 0; b < x.batch; ++b)
    for (Band band : {kLow, kHigh})
      for (int64_t c = 0; c < x.channels; ++c) {
        const Peak peak = finder.peak(b, c, band);
        const double value = peak.finite ? peak.value : finder.locate_slowly(b, c, band).value;
        *maxima++ = narrow<T>(static_cast<A>(gelu(value)));
      }
}

}  // namespace

void spectral_maxima(Type type, bool planar, const Image& x, const SpectralFilters& filters,
                     void* maxima) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (planar)
      forward<T, true>(x, filters, static_cast<T*>(maxima));
    else
      forward<T, false>(x, filters, static_cast<T*>(maxima));
  });
}

void spectral_maxima_backward(Type type, bool planar, const void* grad, const Image& x,
                              const SpectralFilters& filters, const Image& grad_x,
                              const SpectralGradients& gradients) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    const T* typed = static_cast<const T*>(grad);
    if (planar)
      backward<T, true>(typed, x, filters, grad_x, gradients);
    else
      backward<T, false>(typed, x, filters, grad_x, gradients);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
