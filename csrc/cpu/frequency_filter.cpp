// The frequency filter on the CPU.
//
// Zeros: torch transforms, a matrix product mixes, the depthwise kernel filters. A plane is
// transformed whole while it is in the second-level cache; the kernels here bring it from one's
// layout to the other's there, and scale in passing. Back along the rows, two rows share one
// complex transform: it takes four fifths of the time of the real one, and its result does not
// depend on the number of threads, as that of the real one does.
//
// Circular: no transform. Row h and its mirror -h are walked together: the even and the odd part of
// the two make one row each, so that mixing has half of the work. The windows are never stored:
// C[h, w] = sum_dy cos(dy h') A_dy[w] - sin(dy h') B_dy[w], h' = 2 pi h / H, needs m products a
// pixel from 2 m rows that stay in the first-level cache.
#include "frequency_filter.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

// cos(2 pi i / n) and sin(2 pi i / n) for i in [0, n).
struct Circle {
  std::vector<double> cosine, sine;
  explicit Circle(int64_t n) : cosine(n), sine(n) {
    for (int64_t i = 0; i < n; ++i) {
      const double angle = 2 * M_PI * static_cast<double>(i) / static_cast<double>(n);
      cosine[i] = std::cos(angle);
      sine[i] = std::sin(angle);
    }
  }
  int64_t at(int64_t step, int64_t i) const {
    const int64_t n = static_cast<int64_t>(cosine.size());
    return (step * i % n + n) % n;
  }
  double cos(int64_t step, int64_t i) const { return cosine[at(step, i)]; }
  double sin(int64_t step, int64_t i) const { return sine[at(step, i)]; }
};

// The window of one filter, C[h, w] = sum over d of filter[d] cos(2 pi d . (h/H, w/W)), as the
// `terms` = m products of a function of h and a row of w: cosines, then sines.
template <typename A>
class Window {
 public:
  Window(const CircularShape& shape, const Circle& rows, const Circle& columns)
      : reach_(shape.filter / 2),
        width_(shape.columns),
        rows_(rows),
        columns_(columns),
        table_(shape.filter * width_),
        factor_(shape.filter) {}

  void set(const A* filter) {
    for (int64_t dy = 0; dy <= reach_; ++dy)
      for (int64_t w = 0; w < width_; ++w) {
        double cosine = 0, sine = 0;
        for (int64_t dx = -reach_; dx <= reach_; ++dx) {
          const double below = filter[tap(dy, dx)], above = dy == 0 ? 0 : filter[tap(-dy, dx)];
          cosine += (below + above) * columns_.cos(dx, w);
          sine -= (below - above) * columns_.sin(dx, w);
        }
        table_[dy * width_ + w] = static_cast<A>(cosine);
        if (dy > 0) table_[(reach_ + dy) * width_ + w] = static_cast<A>(sine);
      }
  }

  // The window's row h, which is then in row().
  void move(int64_t h) {
    set_factors(h);
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
    set_factors(h);
    for (int64_t term = 0; term < terms(); ++term) {
      A* to = sums + term * width_;
      each<A>(width_, [&](auto wide, int64_t w) FF_INLINED {
        put(wide, to + w, get(wide, to + w) + get(wide, grad + w) * factor_[term]);
      });
    }
  }
  void finish(const A* sums, A* grad_filter) const {
    for (int64_t dy = -reach_; dy <= reach_; ++dy)
      for (int64_t dx = -reach_; dx <= reach_; ++dx) {
        double sum = 0;
        for (int64_t w = 0; w < width_; ++w) {
          sum += sums[std::abs(dy) * width_ + w] * columns_.cos(dx, w);
          if (dy != 0) {
            const double sine = sums[(reach_ + std::abs(dy)) * width_ + w] * columns_.sin(dx, w);
            sum -= dy > 0 ? sine : -sine;
          }
        }
        grad_filter[tap(dy, dx)] = static_cast<A>(sum);
      }
  }
  int64_t terms() const { return 2 * reach_ + 1; }

 private:
  int64_t tap(int64_t dy, int64_t dx) const { return (dy + reach_) * terms() + dx + reach_; }
  void set_factors(int64_t h) {
    for (int64_t dy = 0; dy <= reach_; ++dy) {
      factor_[dy] = static_cast<A>(rows_.cos(dy, h));
      if (dy > 0) factor_[reach_ + dy] = static_cast<A>(rows_.sin(dy, h));
    }
  }

  const int64_t reach_, width_;
  const Circle &rows_, &columns_;
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
void fold(const CircularShape& shape, const A* x, A weight, A* parts, A* poison) {
  const int64_t size = shape.rows * shape.columns, half = shape.half() * shape.columns;
  parallel_for(0, shape.batch * shape.channels, 1, [&](int64_t first, int64_t last) {
    std::vector<A> mirrored(shape.columns);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / shape.channels, c = plane % shape.channels;
      A* even = parts + (b * 2 * shape.channels + c) * half;
      A* odd = even + shape.channels * half;
      const A* from = x + plane * size;
      Vector<A> nothing = {};
      A rest = 0;
      for (int64_t h = 0; h < shape.half(); ++h) {
        const bool alone = mirror_row(shape, h) == h;
        A* even_row = even + h * shape.columns;
        fold_row(shape, from, h, (alone ? 1 : weight) * A(0.5), mirrored.data(), even_row,
                 odd + h * shape.columns);
        // The even part is finite only where both its rows are (or it overflows, like a transform).
        each<A>(shape.columns, [&](auto wide, int64_t w) FF_INLINED {
          if constexpr (wide)
            nothing += load(even_row + w) * A(0);
          else
            rest += even_row[w] * A(0);
        });
      }
      poison[plane] = rest + sum(nothing);
    }
  });
}

template <typename A>
void unfold(const CircularShape& shape, const A* parts, const A* filters, const A* mixing_bias,
            const A* last_bias, const A* poison, int64_t poisons, A* y) {
  const int64_t width = shape.columns, size = shape.rows * width, half = shape.half() * width;
  const Circle rows(shape.rows), columns(width);
  const int64_t taps = shape.filter * shape.filter;
  parallel_for(0, shape.batch * shape.channels, 1, [&](int64_t first, int64_t last) {
    Window<A> even_window(shape, rows, columns), odd_window(shape, rows, columns);
    std::vector<A> mirrored(width), below(width), origin(width);
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / shape.channels, d = plane % shape.channels;
      even_window.set(filters + d * taps);
      odd_window.set(filters + (shape.channels + d) * taps);
      const A* even = parts + (b * 2 * shape.channels + d) * half;
      const A* odd = even + shape.channels * half;
      A everywhere = 0, first_mixed = 0, first_last = 0;
      for (int64_t i = 0; i < poisons; ++i) everywhere += poison[b * poisons + i];
      for (const A* bias : {mixing_bias, last_bias})
        if (bias != nullptr) everywhere += (bias[d] + bias[shape.channels + d]) * A(0);
      if (mixing_bias != nullptr) first_mixed = mixing_bias[d];
      if (last_bias != nullptr) first_last = last_bias[d];
      for (int64_t h = 0; h < shape.half(); ++h) {
        even_window.move(h);
        odd_window.move(h);
        const A *e = even + h * width, *o = odd + h * width;
        if (h == 0) {
          std::copy_n(e, width, origin.data());
          origin[0] += first_mixed;
          e = origin.data();
        }
        A* above = y + plane * size + h * width;
        each<A>(width, [&](auto wide, int64_t w) FF_INLINED {
          const auto p = get(wide, e + w) * get(wide, even_window.row() + w) + everywhere;
          const auto q = get(wide, o + w) * get(wide, odd_window.row() + w);
          put(wide, above + w, p + q);
          put(wide, &below[w], p - q);
        });
        if (h == 0) above[0] += first_last;
        const int64_t other = mirror_row(shape, h);
        if (other != h) mirror(below.data(), width, y + plane * size + other * width);
      }
    }
  });
}

template <typename A>
void unfold_backward(const CircularShape& shape, const A* grad, const A* parts, const A* filters,
                     const A* mixing_bias, A* grad_parts, A* grad_filters) {
  const int64_t width = shape.columns, size = shape.rows * width, half = shape.half() * width;
  const Circle rows(shape.rows), columns(width);
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
                   void* parts, void* poison) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    fold(shape, static_cast<const A*>(x), static_cast<A>(weight), static_cast<A*>(parts),
         static_cast<A*>(poison));
  });
}

void circular_unfold(bool is_double, const CircularShape& shape, const void* parts,
                     const void* filters, const CircularBiases& biases, const void* poison,
                     int64_t poisons, void* y) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    unfold(shape, static_cast<const A*>(parts), static_cast<const A*>(filters),
           static_cast<const A*>(biases.mixing), static_cast<const A*>(biases.last),
           static_cast<const A*>(poison), poisons, static_cast<A*>(y));
  });
}

void circular_unfold_backward(bool is_double, const CircularShape& shape, const void* grad,
                              const void* parts, const void* filters, const CircularBiases& biases,
                              void* grad_parts, void* grad_filters) {
  with_real(is_double, [&](auto zero) {
    using A = decltype(zero);
    unfold_backward(shape, static_cast<const A*>(grad), static_cast<const A*>(parts),
                    static_cast<const A*>(filters), static_cast<const A*>(biases.mixing),
                    static_cast<A*>(grad_parts), static_cast<A*>(grad_filters));
  });
}

}  // namespace fastfusion::FF_CAPABILITY
