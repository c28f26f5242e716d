// SpeCAM's first stage on the CPU: split, two depthwise 3x3 convolutions, GELU and spatial maxima
// in one pass over the image, of which only the maxima are written.
//
// GELU falls to its minimum at -0.7518 and rises from there, so over any set of numbers its
// maximum is that of the largest or that of the smallest number: only these two are tracked, and
// GELU is taken of two numbers a channel instead of every pixel.
#include "spectral_stage.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "bounds.h"
#include "parallel.h"
#include "spectral_tile.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// -- GELU -----------------------------------------------------------------------------------------

// By erfc, where 1 + erf would cancel. Minus infinity gives NaN, as in torch.
double gelu(double p) { return p * 0.5 * std::erfc(-p * std::sqrt(0.5)); }

double gelu_slope(double p) {
  const double density = std::exp(-0.5 * p * p) * 0.5 * std::sqrt(0.5) * M_2_SQRTPI;
  return 0.5 * std::erfc(-p * std::sqrt(0.5)) + p * density;
}

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
    largest = larger(largest, values);
    smallest = smaller(smallest, values);
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
