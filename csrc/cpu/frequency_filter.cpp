// The frequency filter on the CPU.
//
// Zeros: spectrum.cpp transforms, and filters each plane on its way back; here is what mixes. For
// sizes that it does not take torch transforms, a plane at a time while it is in the second-level
// cache, and the kernels here bring it from one's layout to the other's there. Back along the rows,
// two rows share one complex transform: it takes four fifths of the time of the real one, and its
// result does not depend on the number of threads, as that of the real one does.
//
// Circular: no transform. Row h and its mirror -h are walked together: the even and the odd part of
// the two make one row each, so that mixing has half of the work. A tile of a few rows goes from
// pixels to results at once. The windows are never stored: C[h, w] = sum_dy cos(dy h') A_dy[w] -
// sin(dy h') B_dy[w], h' = 2 pi h / H, needs m products a pixel from 2 m rows that stay in the
// cache.
#include "frequency_filter.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "block.h"
#include "parallel.h"
#include "shuffles.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Call f(zero) with float or double.
template <typename F>
void with_real(bool is_double, const F& f) {
  if (is_double)
    f(double());
  else
    f(float());
}

// -- mixing ---------------------------------------------------------------------------------------

// Pixels that are mixed at once: so many of 64 channels take a fifth of the second-level cache.
constexpr int64_t kMixedPixels = 768;

// One of the two mixing matrices (2, filters, channels), with its bias (2, filters) or none.
template <typename A>
Panels<A> pack_part(Scratch<A>& memory, const A* mixing, const A* bias, int64_t part, int filters,
                    int channels) {
  return pack(
      memory.take(Panels<A>::size(filters, channels)), filters, channels,
      [&](int row, int k) { return mixing[(part * filters + row) * channels + k]; },
      [&](int row) { return bias == nullptr ? A(0) : bias[part * filters + row]; });
}

template <typename A>
void mix(const MixingShape& shape, const A* mixing, const A* bias, const A* parts, A* mixed) {
  constexpr int64_t lane = kLanes<A>;
  const int filters = static_cast<int>(shape.filters), channels = static_cast<int>(shape.channels);
  Scratch<A> weights(2 * Scratch<A>::round_up(Panels<A>::size(filters, channels)));
  Panels<A> panels[2];
  for (int part : {0, 1}) panels[part] = pack_part(weights, mixing, bias, part, filters, channels);
  const int64_t chunks = (shape.pixels + kMixedPixels - 1) / kMixedPixels;
  parallel_for(0, shape.batch * 2 * chunks, 1, [&](int64_t begin, int64_t end) {
    // The block that is mixed lies in the cache, its rows filled up with zeros: so the result may
    // go where the parts came from.
    Scratch<A> scratch((channels * kMixedPixels + filters * lane));
    const Block<A> from{scratch.take(channels * kMixedPixels), kMixedPixels, lane};
    const Block<A> edge = dense_block(scratch.take(filters * lane), 1);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / chunks, first = task % chunks * kMixedPixels;
      const int64_t count = std::min(kMixedPixels, shape.pixels - first);
      const int whole = static_cast<int>(count / lane), rest = static_cast<int>(count % lane);
      const A* in = parts + image * channels * shape.pixels + first;
      for (int c = 0; c < channels; ++c, in += shape.pixels) {
        for (int i = 0; i < whole; ++i) store(from.at(c, i), load(in + i * lane));
        if (rest > 0) store(from.at(c, whole), load(in + whole * lane, rest));
      }
      const Block<A> out{mixed + image * filters * shape.pixels + first, shape.pixels, lane};
      const Panels<A>& matrix = panels[image % 2];
      project(matrix, from, whole, out);
      if (rest == 0) continue;
      project(matrix, Block<A>{from.at(0, whole), from.row, lane}, 1, edge);
      for (int d = 0; d < filters; ++d) store(out.at(d, whole), load(edge.at(d, 0)), rest);
    }
  });
}

// -- half spectra ---------------------------------------------------------------------------------

bool is_edge(const SpectrumShape& shape, int64_t bin) {
  return bin == 0 || 2 * bin == shape.columns;
}

template <typename A>
void parts_of(const SpectrumShape& shape, const A* spectrum, A edge, A inner, A* real, A* imag) {
  const int64_t bins = shape.bins();
  for (int64_t row = 0; row < shape.rows; ++row) {
    int64_t bin = 0;
    for (; bin + kLanes<A> <= bins; bin += kLanes<A>) {
      const auto [re, im] =
          deinterleave<A>(load(spectrum + 2 * bin), load(spectrum + 2 * bin + kLanes<A>));
      store(real + bin, re * inner);
      store(imag + bin, im * inner);
    }
    const auto scaled = [&](int64_t i, A factor) {
      real[i] = spectrum[2 * i] * factor;
      imag[i] = spectrum[2 * i + 1] * factor;
    };
    for (; bin < bins; ++bin) scaled(bin, inner);
    scaled(0, edge);
    if (is_edge(shape, bins - 1)) scaled(bins - 1, edge);
    real += bins;
    imag += bins;
    spectrum += 2 * bins;
  }
}

// Its inverse, with other factors.
template <typename A>
void spectrum_of(const SpectrumShape& shape, const A* real, const A* imag, A edge, A inner,
                 A* spectrum) {
  const int64_t bins = shape.bins();
  for (int64_t row = 0; row < shape.rows; ++row) {
    int64_t bin = 0;
    for (; bin + kLanes<A> <= bins; bin += kLanes<A>) {
      const auto [low, high] = interleave<A>(load(real + bin) * inner, load(imag + bin) * inner);
      store(spectrum + 2 * bin, low);
      store(spectrum + 2 * bin + kLanes<A>, high);
    }
    const auto scaled = [&](int64_t i, A factor) {
      spectrum[2 * i] = real[i] * factor;
      spectrum[2 * i + 1] = imag[i] * factor;
    };
    for (; bin < bins; ++bin) scaled(bin, inner);
    scaled(0, edge);
    if (is_edge(shape, bins - 1)) scaled(bins - 1, edge);
    real += bins;
    imag += bins;
    spectrum += 2 * bins;
  }
}

// Rows a and b of half spectra as one whole row z of a + i b: a transform of z gives the real row
// of a as its real part and that of b as its imaginary part.
template <typename A>
void pair_row(const SpectrumShape& shape, const A* a, const A* b, A* z) {
  const int64_t bins = shape.bins(), width = shape.columns;
  z[0] = a[0];
  z[1] = b[0];
  const int64_t inner = (width + 1) / 2;  // bins [1, inner) stand for two columns
  int64_t bin = 1;
  for (; bin + kLanes<A> <= inner; bin += kLanes<A>) {
    const auto p = deinterleave<A>(load(a + 2 * bin), load(a + 2 * bin + kLanes<A>));
    const auto q = deinterleave<A>(load(b + 2 * bin), load(b + 2 * bin + kLanes<A>));
    const auto here = interleave<A>(p.left - q.right, p.right + q.left);
    store(z + 2 * bin, here.left);
    store(z + 2 * bin + kLanes<A>, here.right);
    const auto mirrored = interleave<A>(reverse<A>(p.left + q.right), reverse<A>(q.left - p.right));
    A* to = z + 2 * (width - bin - kLanes<A> + 1);
    store(to, mirrored.left);
    store(to + kLanes<A>, mirrored.right);
  }
  for (; bin < inner; ++bin) {
    const A re = a[2 * bin], im = a[2 * bin + 1], other_re = b[2 * bin], other_im = b[2 * bin + 1];
    z[2 * bin] = re - other_im;
    z[2 * bin + 1] = im + other_re;
    z[2 * (width - bin)] = re + other_im;
    z[2 * (width - bin) + 1] = other_re - im;
  }
  if (bins > inner) {
    z[width] = a[2 * inner];
    z[width + 1] = b[2 * inner];
  }
}

template <typename A>
void pairs_of(const SpectrumShape& shape, const A* spectrum, A* pairs) {
  const int64_t bins = shape.bins();
  const std::vector<A> nothing(shape.rows % 2 ? 2 * bins : 0);
  for (int64_t pair = 0; pair < shape.pairs(); ++pair) {
    const A* above = spectrum + 4 * pair * bins;
    const A* below = 2 * pair + 1 < shape.rows ? above + 2 * bins : nothing.data();
    pair_row(shape, above, below, pairs + 2 * pair * shape.columns);
  }
}

template <typename A>
void rows_of(const SpectrumShape& shape, const A* pairs, A* image) {
  const int64_t width = shape.columns;
  for (int64_t pair = 0; pair < shape.pairs(); ++pair) {
    const A* from = pairs + 2 * pair * width;
    A* above = image + 2 * pair * width;
    A* below = above + width;
    const bool both = 2 * pair + 1 < shape.rows;
    int64_t column = 0;
    for (; column + kLanes<A> <= width; column += kLanes<A>) {
      const auto [a, b] =
          deinterleave<A>(load(from + 2 * column), load(from + 2 * column + kLanes<A>));
      store(above + column, a);
      if (both) store(below + column, b);
    }
    for (; column < width; ++column) {
      above[column] = from[2 * column];
      if (both) below[column] = from[2 * column + 1];
    }
  }
}

// A constant 1 in the half spectrum is 1 at the origin; a constant i is in row 0, at column w,
// -(2/W) times the sum of sin(2 pi k w / W) over the columns k that stand for two.
template <typename A>
void constants_of(const SpectrumShape& shape, int64_t batch, int64_t channels, const A* grad,
                  A* constants) {
  std::vector<double> response(shape.columns);
  for (int64_t w = 0; w < shape.columns; ++w)
    for (int64_t bin = 0; bin < shape.bins(); ++bin)
      if (!is_edge(shape, bin))
        response[w] -= 2 * std::sin(2 * M_PI * static_cast<double>(bin * w % shape.columns) /
                                    static_cast<double>(shape.columns));
  for (int64_t c = 0; c < channels; ++c) {
    double real = 0, imag = 0;
    for (int64_t b = 0; b < batch; ++b) {
      const A* row = grad + (b * channels + c) * shape.rows * shape.columns;
      real += row[0];
      for (int64_t w = 0; w < shape.columns; ++w)
        imag += row[w] * response[w] / static_cast<double>(shape.columns);
    }
    constants[c] = static_cast<A>(real);
    constants[channels + c] = static_cast<A>(imag);
  }
}

// -- the circular form ----------------------------------------------------------------------------

// Call f(wide, i) for i in [0, count) by vectors, and then one by one.
template <typename A, typename F>
FF_INLINE void each(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) f(std::true_type(), i);
  for (; i < count; ++i) f(std::false_type(), i);
}

template <typename A>
FF_INLINE auto get(std::true_type, const A* from) {
  return load(from);
}
template <typename A>
FF_INLINE A get(std::false_type, const A* from) {
  return *from;
}
template <typename A>
FF_INLINE void put(std::true_type, A* to, Vector<A> value) {
  store(to, value);
}
template <typename A>
FF_INLINE void put(std::false_type, A* to, A value) {
  *to = value;
}

// to[w] = from[-w], indices modulo the count.
template <typename A>
FF_INLINE void mirror(const A* from, int64_t count, A* to) {
  to[0] = from[0];
  each<A>(count - 1, [&](auto wide, int64_t i) FF_INLINED {
    if constexpr (wide)
      store(to + 1 + i, reverse<A>(load(from + count - i - kLanes<A>)));
    else
      to[1 + i] = from[count - 1 - i];
  });
}

// cos(2 pi d i / n) and sin(2 pi d i / n): a row of i in [0, n) for each d in [0, reach].
class Waves {
 public:
  Waves(int64_t reach, int64_t n) : n_(n), cosine_((reach + 1) * n), sine_((reach + 1) * n) {
    std::vector<double> cosine(n), sine(n);
    for (int64_t i = 0; i < n; ++i) {
      const double angle = 2 * M_PI * static_cast<double>(i) / static_cast<double>(n);
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
    for (int64_t d = 0; d <= reach; ++d)
      for (int64_t i = 0, turn = 0; i < n; ++i) {
        cosine_[d * n + i] = cosine[turn];
        sine_[d * n + i] = sine[turn];
        turn += d % n;
        if (turn >= n) turn -= n;
      }
  }
  const double* cos(int64_t d) const { return &cosine_[d * n_]; }
  const double* sin(int64_t d) const { return &sine_[d * n_]; }

 private:
  int64_t n_;
  std::vector<double> cosine_, sine_;
};

// The factors of the windows' terms in row h: cosines, then sines.
template <typename A>
void set_factors(const Waves& rows, int64_t reach, int64_t h, A* factors) {
  for (int64_t dy = 0; dy <= reach; ++dy) {
    factors[dy] = static_cast<A>(rows.cos(dy)[h]);
    if (dy > 0) factors[reach + dy] = static_cast<A>(rows.sin(dy)[h]);
  }
}

// The window of one filter, C[h, w] = sum over d of filter[d] cos(2 pi d . (h/H, w/W)), as the
// `terms` = m products of a function of h and a row of w: cosines, then sines.
template <typename A>
class Window {
 public:
  Window(const CircularShape& shape, const Waves& rows, const Waves& columns)
      : reach_(shape.filter / 2),
        width_(shape.columns),
        rows_(rows),
        columns_(columns),
        table_(shape.filter * width_),
        factor_(shape.filter) {}

  // Opposite taps share a cosine, and a sine but for its sign.
  void set(const A* filter) {
    std::vector<double> cosine(width_), sine(width_);
    for (int64_t dy = 0; dy <= reach_; ++dy) {
      std::fill(cosine.begin(), cosine.end(), 0.0);
      std::fill(sine.begin(), sine.end(), 0.0);
      for (int64_t dx = 0; dx <= reach_; ++dx) {
        const double right = filter[tap(dy, dx)], left = dx == 0 ? 0 : filter[tap(dy, -dx)];
        const double above_right = dy == 0 ? 0 : filter[tap(-dy, dx)];
        const double above_left = dy == 0 || dx == 0 ? 0 : filter[tap(-dy, -dx)];
        const double even = right + left + above_right + above_left;
        const double odd = right - left - (above_right - above_left);
        const double *c = columns_.cos(dx), *s = columns_.sin(dx);
        for (int64_t w = 0; w < width_; ++w) {
          cosine[w] += even * c[w];
          sine[w] -= odd * s[w];
        }
      }
      for (int64_t w = 0; w < width_; ++w) {
        table_[dy * width_ + w] = static_cast<A>(cosine[w]);
        if (dy > 0) table_[(reach_ + dy) * width_ + w] = static_cast<A>(sine[w]);
      }
    }
  }
  const A* term(int64_t index) const { return &table_[index * width_]; }

  // The window's row h, which is then in row().
  void move(int64_t h) {
    set_factors(rows_, reach_, h, factor_.data());
    row_.resize(width_);
    each<A>(width_, [&](auto wide, int64_t w) FF_INLINED {
      auto sum = get(wide, &table_[w]) * factor_[0];
      for (int64_t term = 1; term < terms(); ++term)
        sum += get(wide, &table_[term * width_ + w]) * factor_[term];
      put(wide, &row_[w], sum);
    });
  }
  const A* row() const { return row_.data(); }

  // The other way round: add a row's gradient to `sums` (terms, W), and bring these to the
  // filter's.
  void collect(int64_t h, const A* grad, A* sums) {
    set_factors(rows_, reach_, h, factor_.data());
    for (int64_t term = 0; term < terms(); ++term) {
      A* to = sums + term * width_;
      each<A>(width_, [&](auto wide, int64_t w) FF_INLINED {
        put(wide, to + w, get(wide, to + w) + get(wide, grad + w) * factor_[term]);
      });
    }
  }
  void finish(const A* sums, A* grad_filter) const {
    for (int64_t dy = 0; dy <= reach_; ++dy)
      for (int64_t dx = 0; dx <= reach_; ++dx) {
        const A *even = sums + dy * width_, *odd = sums + (reach_ + dy) * width_;
        const double *c = columns_.cos(dx), *s = columns_.sin(dx);
        double cosine = 0, sine = 0;
        for (int64_t w = 0; w < width_; ++w) cosine += even[w] * c[w];
        if (dy > 0)
          for (int64_t w = 0; w < width_; ++w) sine += odd[w] * s[w];
        grad_filter[tap(dy, dx)] = grad_filter[tap(-dy, -dx)] = static_cast<A>(cosine - sine);
        grad_filter[tap(dy, -dx)] = grad_filter[tap(-dy, dx)] = static_cast<A>(cosine + sine);
      }
  }
  int64_t terms() const { return 2 * reach_ + 1; }

 private:
  int64_t tap(int64_t dy, int64_t dx) const { return (dy + reach_) * terms() + dx + reach_; }

  const int64_t reach_, width_;
  const Waves &rows_, &columns_;
  std::vector<A> table_, factor_, row_;
};

// The row that mirrors row h of an image.
int64_t mirror_row(const CircularShape& shape, int64_t h) { return h == 0 ? 0 : shape.rows - h; }

// The even and the odd part of a row and its mirror, times a factor.
template <typename A>
FF_INLINE void fold_row(const CircularShape& shape, const A* plane, int64_t h, A factor,
                        A* mirrored, A* even, A* odd) {
  const A* row = plane + h * shape.columns;
  mirror(plane + mirror_row(shape, h) * shape.columns, shape.columns, mirrored);
  each<A>(shape.columns, [&](auto wide, int64_t w) FF_INLINED {
    const auto a = get(wide, row + w), b = get(wide, mirrored + w);
    put(wide, even + w, (a + b) * factor);
    put(wide, odd + w, (a - b) * factor);
  });
}

template <typename A>
void fold(const CircularShape& shape, const A* x, A weight, A* parts) {
  const int64_t size = shape.rows * shape.columns, half = shape.half() * shape.columns;
  parallel_for(0, shape.batch * shape.channels, 1, [&](int64_t first, int64_t last) {
    std::vector<A> mirrored(shape.columns);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / shape.channels, c = plane % shape.channels;
      A* even = parts + (b * 2 * shape.channels + c) * half;
      A* odd = even + shape.channels * half;
      for (int64_t h = 0; h < shape.half(); ++h)
        fold_row(shape, x + plane * size, h, (mirror_row(shape, h) == h ? 1 : weight) * A(0.5),
                 mirrored.data(), even + h * shape.columns, odd + h * shape.columns);
    }
  });
}

// The sum of an even and an odd part.
template <typename A>
void unfold(const CircularShape& shape, const A* parts, A* x) {
  const int64_t width = shape.columns, size = shape.rows * width, half = shape.half() * width;
  parallel_for(0, shape.batch * shape.channels, 1, [&](int64_t first, int64_t last) {
    std::vector<A> below(width);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / shape.channels, c = plane % shape.channels;
      const A* even = parts + (b * 2 * shape.channels + c) * half;
      const A* odd = even + shape.channels * half;
      for (int64_t h = 0; h < shape.half(); ++h, even += width, odd += width) {
        A* above = x + plane * size + h * width;
        each<A>(width, [&](auto wide, int64_t w) FF_INLINED {
          const auto p = get(wide, even + w), q = get(wide, odd + w);
          put(wide, above + w, p + q);
          put(wide, &below[w], p - q);
        });
        const int64_t other = mirror_row(shape, h);
        if (other != h) mirror(below.data(), width, x + plane * size + other * width);
      }
    }
  });
}

// The whole filter, tile by tile: kTileRows rows of the upper half with their mirror images, of
// kTileColumns columns and all channels, go from pixels to results within the second-level cache.
// What else it reads are the windows' rows of these columns, which the next tile needs again.
constexpr int64_t kTileRows = 3, kTileColumns = 64;

// The lanes [0, count) of a row at -(first + lane), indices modulo `width`.
template <typename T>
FF_INLINE Vector<Accumulator<T>> load_mirrored(const T* row, int64_t width, int64_t first,
                                               int count) {
  using A = Accumulator<T>;
  if (first > 0 && count == kLanes<A>) return reverse<A>(load(row + width - first - kLanes<A> + 1));
  Vector<A> values{};
  for (int i = 0; i < count; ++i) values[i] = widen(row[first + i == 0 ? 0 : width - first - i]);
  return values;
}
template <typename T>
FF_INLINE void store_mirrored(T* row, int64_t width, int64_t first, Vector<Accumulator<T>> values,
                              int count) {
  using A = Accumulator<T>;
  if (first > 0 && count == kLanes<A>)
    return store(row + width - first - kLanes<A> + 1, reverse<A>(values));
  for (int i = 0; i < count; ++i)
    row[first + i == 0 ? 0 : width - first - i] = narrow<T>(values[i]);
}

template <typename T>
class CircularFilter {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t kLane = kLanes<A>;

  CircularFilter(const CircularShape& shape, int64_t inputs, const T* x, const A* mixing,
                 const A* filters, const A* mixing_bias, const A* last_bias, T* y)
      : shape_(shape),
        inputs_(inputs),
        chunks_((shape.columns + kTileColumns - 1) / kTileColumns),
        bands_((shape.half() + kTileRows - 1) / kTileRows),
        x_(x),
        mixing_bias_(mixing_bias),
        last_bias_(last_bias),
        y_(y),
        rows_(shape.filter / 2, shape.rows),
        weights_(2 * Scratch<A>::round_up(Panels<A>::size(shape.channels, inputs))),
        windows_(chunks_ * shape.channels * 2 * shape.filter * kTileColumns),
        poison_(shape.batch * chunks_ * bands_) {
    for (int part : {0, 1})
      panels_[part] = pack_part<A>(weights_, mixing, nullptr, part,
                                   static_cast<int>(shape.channels), static_cast<int>(inputs));
    make_windows(filters);
  }

  void run() {
    parallel_for(0, shape_.batch * chunks_ * bands_, 1, [&](int64_t begin, int64_t end) {
      Tile tile(*this);
      for (int64_t task = begin; task < end; ++task)
        poison_[task] = tile.run(task / bands_ / chunks_, task / bands_ % chunks_ * kTileColumns,
                                 task % bands_ * kTileRows);
    });
    // The transform would spread what is not finite over its image.
    const int64_t tiles = chunks_ * bands_, size = shape_.channels * shape_.rows * shape_.columns;
    for (int64_t b = 0; b < shape_.batch; ++b) {
      A everywhere = 0;
      for (int64_t tile = 0; tile < tiles; ++tile) everywhere += poison_[b * tiles + tile];
      if (everywhere != everywhere) std::fill_n(y_ + b * size, size, narrow<T>(everywhere));
    }
  }

 private:
  // The windows' terms as the tiles read them: (chunk, channel, part, term, kTileColumns).
  A* window(int64_t chunk, int64_t channel, int64_t part) {
    return &windows_[((chunk * shape_.channels + channel) * 2 + part) * shape_.filter *
                     kTileColumns];
  }
  void make_windows(const A* filters) {
    const Waves columns(shape_.filter / 2, shape_.columns);
    const int64_t taps = shape_.filter * shape_.filter;
    parallel_for(0, 2 * shape_.channels, 1, [&](int64_t first, int64_t last) {
      Window<A> made(shape_, rows_, columns);
      for (int64_t index = first; index < last; ++index) {
        made.set(filters + index * taps);
        for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
          A* to = window(chunk, index % shape_.channels, index / shape_.channels);
          const int64_t begin = chunk * kTileColumns;
          const int64_t count = std::min(kTileColumns, shape_.columns - begin);
          for (int64_t term = 0; term < shape_.filter; ++term)
            std::copy_n(made.term(term) + begin, count, to + term * kTileColumns);
        }
      }
    });
  }

  class Tile {
   public:
    explicit Tile(CircularFilter& of)
        : of_(of),
          shape_(of.shape_),
          memory_((2 * kPixels) * (of.inputs_ + shape_.channels)),
          in_{memory_.take(of.inputs_ * kPixels), memory_.take(of.inputs_ * kPixels)},
          mixed_{memory_.take(shape_.channels * kPixels), memory_.take(shape_.channels * kPixels)},
          factors_(kTileRows * shape_.filter) {}

    // Filter a tile; NaN where not all of its pixels are finite, else 0.
    A run(int64_t b, int64_t column, int64_t row) {
      first_ = column;
      row_ = row;
      count_ = std::min(kTileColumns, shape_.columns - column);
      vectors_ = (count_ + kLane - 1) / kLane;
      rows_ = std::min(kTileRows, shape_.half() - row);
      V nothing{};
      for (int64_t c = 0; c < of_.inputs_; ++c)
        fold_channel(of_.x_ + (b * of_.inputs_ + c) * shape_.rows * shape_.columns, c * kPixels,
                     nothing);
      for (int part : {0, 1})
        project(of_.panels_[part], Block<A>{in_[part], kPixels, kLane},
                static_cast<int>(rows_ * vectors_), Block<A>{mixed_[part], kPixels, kLane});
      for (int64_t r = 0; r < kTileRows; ++r)
        set_factors(of_.rows_, shape_.filter / 2, std::min(row + r, shape_.half() - 1),
                    &factors_[r * shape_.filter]);
      for (int64_t d = 0; d < shape_.channels; ++d)
        unfold_channel(d, of_.y_ + (b * shape_.channels + d) * shape_.rows * shape_.columns);
      return sum(nothing);
    }

   private:
    static constexpr int64_t kPixels = kTileRows * kTileColumns;

    void fold_channel(const T* plane, int64_t place, V& nothing) {
      for (int64_t r = 0; r < rows_; ++r) {
        const T* row = plane + (row_ + r) * shape_.columns + first_;
        const T* other = plane + mirror_row(shape_, row_ + r) * shape_.columns;
        for (int64_t i = 0; i < vectors_; ++i) {
          const int64_t left = count_ - i * kLane, at = place + (r * vectors_ + i) * kLane;
          const int count = static_cast<int>(std::min(kLane, left));
          const V a = count == kLane ? load(row + i * kLane) : load(row + i * kLane, count);
          const V b = load_mirrored(other, shape_.columns, first_ + i * kLane, count);
          const V even = (a + b) * A(0.5);
          nothing += even * A(0);
          store(in_[0] + at, even);
          store(in_[1] + at, (a - b) * A(0.5));
        }
      }
    }

    void unfold_channel(int64_t d, T* plane) {
      const int64_t terms = shape_.filter, place = d * kPixels;
      const A* even_window = of_.window(first_ / kTileColumns, d, 0);
      const A* odd_window = of_.window(first_ / kTileColumns, d, 1);
      A everywhere = 0;
      for (const A* bias : {of_.mixing_bias_, of_.last_bias_})
        if (bias != nullptr) everywhere += (bias[d] + bias[shape_.channels + d]) * A(0);
      const bool origin = row_ == 0 && first_ == 0;
      if (origin && of_.mixing_bias_ != nullptr) mixed_[0][place] += of_.mixing_bias_[d];
      for (int64_t i = 0; i < vectors_; ++i) {
        V even[kTileRows] = {}, odd[kTileRows] = {};
        for (int64_t term = 0; term < terms; ++term) {
          const V e = load(even_window + term * kTileColumns + i * kLane);
          const V o = load(odd_window + term * kTileColumns + i * kLane);
          unroll<kTileRows>([&](auto r) FF_INLINED {
            even[r] = fma(e, broadcast(factors_[r * terms + term]), even[r]);
            odd[r] = fma(o, broadcast(factors_[r * terms + term]), odd[r]);
          });
        }
        const int count = static_cast<int>(std::min(kLane, count_ - i * kLane));
        unroll<kTileRows>([&](auto r) FF_INLINED {
          if (r >= rows_) return;
          const int64_t at = place + (r * vectors_ + i) * kLane;
          const V p = load(mixed_[0] + at) * even[r] + everywhere;
          const V q = load(mixed_[1] + at) * odd[r];
          T* to = plane + (row_ + r) * shape_.columns + first_ + i * kLane;
          V above = p + q;
          if (origin && r == 0 && i == 0 && of_.last_bias_ != nullptr)
            above[0] += of_.last_bias_[d];
          if (count == kLane)
            store(to, above);
          else
            store(to, above, count);
          const int64_t other = mirror_row(shape_, row_ + r);
          if (other != row_ + r)
            store_mirrored(plane + other * shape_.columns, shape_.columns, first_ + i * kLane,
                           p - q, count);
        });
      }
    }

    CircularFilter& of_;
    const CircularShape& shape_;
    Scratch<A> memory_;
    A *in_[2], *mixed_[2];
    std::vector<A> factors_;
    int64_t first_ = 0, row_ = 0, count_ = 0, vectors_ = 0, rows_ = 0;
  };

  const CircularShape shape_;
  const int64_t inputs_, chunks_, bands_;
  const T* const x_;
  const A *const mixing_bias_, *const last_bias_;
  T* const y_;
  const Waves rows_;
  Scratch<A> weights_;
  Panels<A> panels_[2];
  std::vector<A> windows_, poison_;
};

template <typename A>
void windows_backward(const CircularShape& shape, const A* grad, const A* parts, const A* filters,
                      const A* mixing_bias, A* grad_parts, A* grad_filters) {
  const int64_t width = shape.columns, size = shape.rows * width, half = shape.half() * width;
  const Waves rows(shape.filter / 2, shape.rows), columns(shape.filter / 2, width);
  const int64_t taps = shape.filter * shape.filter;
  // A channel at a time, so that sums over the batch have an order.
  parallel_for(0, shape.channels, 1, [&](int64_t first, int64_t last) {
    Window<A> window[2] = {{shape, rows, columns}, {shape, rows, columns}};
    std::vector<A> mirrored(width), folded(2 * width), of_window(width);
    std::vector<A> sums[2] = {std::vector<A>(shape.filter * width),
                              std::vector<A>(shape.filter * width)};
    for (int64_t d = first; d < last; ++d) {
      for (int part : {0, 1}) {
        window[part].set(filters + (part * shape.channels + d) * taps);
        std::fill(sums[part].begin(), sums[part].end(), A(0));
      }
      for (int64_t b = 0; b < shape.batch; ++b)
        for (int64_t h = 0; h < shape.half(); ++h) {
          const A share = mirror_row(shape, h) == h ? 1 : 2;
          fold_row(shape, grad + (b * shape.channels + d) * size, h, A(0.5), mirrored.data(),
                   folded.data(), folded.data() + width);
          for (int part : {0, 1}) {
            const int64_t place = ((b * 2 + part) * shape.channels + d) * half + h * width;
            const A *g = &folded[part * width], *from = parts + place;
            A* to = grad_parts + place;
            window[part].move(h);
            const A* row = window[part].row();
            each<A>(width, [&](auto wide, int64_t w) FF_INLINED {
              put(wide, to + w, get(wide, g + w) * get(wide, row + w));
              put(wide, &of_window[w], get(wide, g + w) * get(wide, from + w) * share);
            });
            if (part == 0 && h == 0 && mixing_bias != nullptr)
              of_window[0] += g[0] * mixing_bias[d];
            window[part].collect(h, of_window.data(), sums[part].data());
          }
        }
      for (int part : {0, 1})
        window[part].finish(sums[part].data(), grad_filters + (part * shape.channels + d) * taps);
    }
  });
}

}  // namespace

void mix_parts(bool is_double, const MixingShape& shape, const void* mixing, const void* bias,
               const void* parts, void* mixed) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    mix(shape, static_cast<const A*>(mixing), static_cast<const A*>(bias),
        static_cast<const A*>(parts), static_cast<A*>(mixed));
  });
}

void spectrum_parts(bool is_double, const SpectrumShape& shape, const void* spectrum, double edge,
                    double inner, void* real, void* imag) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    parts_of(shape, static_cast<const A*>(spectrum), static_cast<A>(edge), static_cast<A>(inner),
             static_cast<A*>(real), static_cast<A*>(imag));
  });
}

void spectrum_of_parts(bool is_double, const SpectrumShape& shape, const void* real,
                       const void* imag, double edge, double inner, void* spectrum) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    spectrum_of(shape, static_cast<const A*>(real), static_cast<const A*>(imag),
                static_cast<A>(edge), static_cast<A>(inner), static_cast<A*>(spectrum));
  });
}

void spectrum_pairs(bool is_double, const SpectrumShape& shape, const void* spectrum, void* pairs) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    pairs_of(shape, static_cast<const A*>(spectrum), static_cast<A*>(pairs));
  });
}

void paired_rows(bool is_double, const SpectrumShape& shape, const void* pairs, void* image) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    rows_of(shape, static_cast<const A*>(pairs), static_cast<A*>(image));
  });
}

void constant_gradients(bool is_double, const SpectrumShape& shape, int64_t batch, int64_t channels,
                        const void* grad, void* constants) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    constants_of(shape, batch, channels, static_cast<const A*>(grad), static_cast<A*>(constants));
  });
}

void circular_fold(bool is_double, const CircularShape& shape, const void* x, double weight,
                   void* parts) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    fold(shape, static_cast<const A*>(x), static_cast<A>(weight), static_cast<A*>(parts));
  });
}

void circular_unfold(bool is_double, const CircularShape& shape, const void* parts, void* x) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    unfold(shape, static_cast<const A*>(parts), static_cast<A*>(x));
  });
}

void circular_filter(Type type, const CircularShape& shape, int64_t inputs, const void* x,
                     const void* mixing, const void* filters, const CircularBiases& biases,
                     void* y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    CircularFilter<T>(shape, inputs, static_cast<const T*>(x), static_cast<const A*>(mixing),
                      static_cast<const A*>(filters), static_cast<const A*>(biases.mixing),
                      static_cast<const A*>(biases.last), static_cast<T*>(y))
        .run();
  });
}

void circular_windows_backward(bool is_double, const CircularShape& shape, const void* grad,
                               const void* parts, const void* filters, const void* mixing_bias,
                               void* grad_parts, void* grad_filters) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    windows_backward(shape, static_cast<const A*>(grad), static_cast<const A*>(parts),
                     static_cast<const A*>(filters), static_cast<const A*>(mixing_bias),
                     static_cast<A*>(grad_parts), static_cast<A*>(grad_filters));
  });
}

}  // namespace fastfusion::FF_CAPABILITY
