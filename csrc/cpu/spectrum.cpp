// Transforms between an image and its half spectrum on the CPU.
//
// The tile is a plane, transformed by one thread within its second-level cache. Along the columns,
// the lanes are neighbouring bins. Along the rows, the lanes are rows: they are turned on the way
// in and out by transposing squares of vectors in registers, and twice as many rows as a vector has
// lanes are the real and the imaginary part of one transform. So the parts are read and written as
// they lie, in the element type of the image, and nothing depends on the number of threads.
#include "spectrum.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "fourier.h"
#include "parallel.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

template <typename T>
class Planes {
 public:
  using A = Accumulator<T>;
  using V = Vector<A>;
  static constexpr int64_t kLane = kLanes<A>, kStep = Fourier<A>::kStep;

  Planes(const SpectrumShape& shape, const Fourier<A>& along_rows, const Fourier<A>& along_columns,
         A edge, A inner)
      : shape_(shape),
        bins_(shape.bins()),
        stride_((shape.bins() + kLane - 1) / kLane * kLane),
        along_rows_(along_rows),
        along_columns_(along_columns),
        scratch_(scratch_size()),
        z_(scratch_.take(numbers() * kStep)),
        real_(scratch_.take(shape.rows * stride_)),
        imag_(scratch_.take(shape.rows * stride_)),
        factors_(scratch_.take(stride_)) {
    std::fill_n(factors_, stride_, inner);
    factors_[0] = edge;
    if (shape.columns % 2 == 0) factors_[bins_ - 1] = edge;
  }

  template <typename P>
  P* plane(P* image, int64_t index) const {
    return image + index * shape_.rows * shape_.columns;
  }

  // A part's plane after one of the filters, in scratch that is there for either part.
  const A* filtered(const A* part, const FilterView& filters, int64_t index, int which) {
    const int64_t size = shape_.rows * bins_;
    filtered_.resize(2 * size);
    FilterView filter = filters;
    const int64_t taps = filter.shape.rows * filter.shape.columns;
    filter.weight = static_cast<const A*>(filters.weight) + index * taps;
    if (filter.bias != nullptr) filter.bias = static_cast<const A*>(filters.bias) + index;
    const auto view = [&](A* data) {
      return Image{data, 1, 1, shape_.rows, bins_, size, size, bins_, 1};
    };
    // An image is a view for reading and for writing; this one is only read.
    A* const to = filtered_.data() + which * size;
    depthwise_conv2d(std::is_same_v<A, double> ? Type::kDouble : Type::kFloat,
                     view(const_cast<A*>(part)), filter, Activation::kNone, false, view(to));
    return to;
  }

  // False where the image is not finite.
  bool to_parts(const T* image, A* real, A* imag) {
    nothing_ = V{};
    for (int64_t row = 0; row < shape_.rows; row += 2 * kLane) {
      load_rows(image, row);
      along_rows_.transform(z_);
      part_rows(row);
    }
    for (int64_t bin = 0; bin < bins_; bin += kLane) {
      for (int64_t row = 0; row < shape_.rows; ++row) {
        store(number(row), load(real_ + row * stride_ + bin));
        store(number(row) + kLane, load(imag_ + row * stride_ + bin));
      }
      along_columns_.transform(z_);
      const V factor = load(factors_ + bin);
      const int count = static_cast<int>(std::min(kLane, bins_ - bin));
      for (int64_t row = 0; row < shape_.rows; ++row) {
        const A* from = number(along_columns_.place(row));
        put(real + row * bins_ + bin, load(from) * factor, count);
        put(imag + row * bins_ + bin, load(from + kLane) * factor, count);
      }
    }
    const A nothing = sum(nothing_);
    return nothing == nothing;
  }

  // Where the image is larger than the caches and made of whole cache lines, it goes past them.
  void to_image(const A* real, const A* imag, T* image, int64_t planes) {
    constexpr int64_t line = 64;
    streaming_ = std::is_same_v<T, A> && sizeof(V) == line &&
                 should_stream<T>(planes * shape_.rows * shape_.columns) &&
                 shape_.columns % kLane == 0 && reinterpret_cast<uintptr_t>(image) % line == 0;
    // Real and imaginary parts change places: that makes the transforms those back.
    for (int64_t bin = 0; bin < bins_; bin += kLane) {
      const V factor = load(factors_ + bin);
      const int count = static_cast<int>(std::min(kLane, bins_ - bin));
      for (int64_t row = 0; row < shape_.rows; ++row) {
        store(number(row), get(imag + row * bins_ + bin, count) * factor);
        store(number(row) + kLane, get(real + row * bins_ + bin, count) * factor);
      }
      along_columns_.transform(z_);
      for (int64_t row = 0; row < shape_.rows; ++row) {
        const A* from = number(along_columns_.place(row));
        store(imag_ + row * stride_ + bin, load(from));
        store(real_ + row * stride_ + bin, load(from + kLane));
      }
    }
    for (int64_t row = 0; row < shape_.rows; row += 2 * kLane) {
      join_rows(row);
      along_rows_.transform(z_);
      store_rows(image, row);
    }
  }

 private:
  int64_t numbers() const {
    return std::max(shape_.rows, (shape_.columns + kLane - 1) / kLane * kLane);
  }
  int64_t scratch_size() const {
    const auto room = Scratch<A>::round_up;
    return room(numbers() * kStep) + 2 * room(shape_.rows * stride_) + room(stride_);
  }
  A* number(int64_t index) const { return z_ + index * kStep; }

  static FF_INLINE V get(const A* from, int count) {
    return count == kLane ? load(from) : load(from, count);
  }
  static FF_INLINE void put(A* to, V value, int count) {
    if (count == kLane)
      store(to, value);
    else
      store(to, value, count);
  }

  // Rows [row, row + kLane) as real parts, as many after them as imaginary parts; 0 below the
  // image.
  void load_rows(const T* image, int64_t row) {
    for (int part : {0, 1}) {
      const int64_t first = row + part * kLane;
      const int64_t count = std::clamp<int64_t>(shape_.rows - first, 0, kLane);
      for (int64_t column = 0; column < shape_.columns; column += kLane) {
        const T* from = image + first * shape_.columns + column;
        const int width = static_cast<int>(std::min(kLane, shape_.columns - column));
        V square[kLane];
        unroll<kLane>([&](auto i) FF_INLINED {
          square[i] = V{};
          if (i < count)
            square[i] = width == kLane ? load(from + i * shape_.columns)
                                       : load(from + i * shape_.columns, width);
        });
        unroll<kLane>([&](auto i) FF_INLINED { nothing_ += square[i] * A(0); });
        transpose<A>(square);
        unroll<kLane>([&](auto i)
                          FF_INLINED { store(number(column + i) + part * kLane, square[i]); });
      }
    }
  }

  void store_rows(T* image, int64_t row) {
    for (int part : {0, 1}) {
      const int64_t first = row + part * kLane;
      const int64_t count = std::clamp<int64_t>(shape_.rows - first, 0, kLane);
      for (int64_t column = 0; column < shape_.columns && count > 0; column += kLane) {
        T* to = image + first * shape_.columns + column;
        const int width = static_cast<int>(std::min(kLane, shape_.columns - column));
        V square[kLane];
        unroll<kLane>([&](auto i) FF_INLINED {
          square[i] = V{};
          // Exchanged: the imaginary parts hold the first rows.
          if (i < width)
            square[i] = load(number(along_rows_.place(column + i)) + (1 - part) * kLane);
        });
        transpose<A>(square);
        unroll<kLane>([&](auto i) FF_INLINED {
          if (i >= count) return;
          T* const place = to + i * shape_.columns;
          if (width < kLane)
            store(place, square[i], width);
          else if (streaming_)
            stream(place, square[i]);
          else
            store(place, square[i]);
        });
      }
    }
  }

  // A square of kLane bins of as many rows in the scratch planes.
  FF_INLINE void put_square(A* plane, int64_t row, int64_t bin, V (&square)[kLane]) {
    transpose<A>(square);
    unroll<kLane>([&](auto i) FF_INLINED {
      if (row + i < shape_.rows) store(plane + (row + i) * stride_ + bin, square[i]);
    });
  }
  FF_INLINE void get_square(const A* plane, int64_t row, int64_t bin, V (&square)[kLane]) {
    unroll<kLane>([&](auto i) FF_INLINED {
      square[i] = V{};
      if (row + i < shape_.rows) square[i] = load(plane + (row + i) * stride_ + bin);
    });
    transpose<A>(square);
  }

  // Two real rows share a transform: the first is its Hermitian part, the second -i times the rest.
  void part_rows(int64_t row) {
    for (int64_t bin = 0; bin < bins_; bin += kLane) {
      V squares[4][kLane];
      for (int64_t i = 0; i < kLane; ++i) {
        const int64_t k = bin + i;
        if (k >= bins_) {
          for (auto& square : squares) square[i] = V{};
          continue;
        }
        const A* here = number(along_rows_.place(k));
        const A* there = number(along_rows_.place(k == 0 ? 0 : shape_.columns - k));
        const V re = load(here), im = load(here + kLane);
        const V other_re = load(there), other_im = load(there + kLane);
        squares[0][i] = (re + other_re) * A(0.5);
        squares[1][i] = (im - other_im) * A(0.5);
        squares[2][i] = (im + other_im) * A(0.5);
        squares[3][i] = (other_re - re) * A(0.5);
      }
      put_square(real_, row, bin, squares[0]);
      put_square(imag_, row, bin, squares[1]);
      put_square(real_, row + kLane, bin, squares[2]);
      put_square(imag_, row + kLane, bin, squares[3]);
    }
  }

  // Back: the first row plus i times the second, on all columns, parts exchanged.
  void join_rows(int64_t row) {
    for (int64_t bin = 0; bin < bins_; bin += kLane) {
      V squares[4][kLane];
      get_square(real_, row, bin, squares[0]);
      get_square(imag_, row, bin, squares[1]);
      get_square(real_, row + kLane, bin, squares[2]);
      get_square(imag_, row + kLane, bin, squares[3]);
      const int64_t count = std::min(kLane, bins_ - bin);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t k = bin + i;
        const bool is_edge = k == 0 || 2 * k == shape_.columns;
        const V re = squares[0][i], other_re = squares[2][i];
        const V im = is_edge ? V{} : squares[1][i], other_im = is_edge ? V{} : squares[3][i];
        store(number(k) + kLane, re - other_im);
        store(number(k), im + other_re);
        if (is_edge) continue;
        store(number(shape_.columns - k) + kLane, re + other_im);
        store(number(shape_.columns - k), other_re - im);
      }
    }
  }

  const SpectrumShape shape_;
  const int64_t bins_, stride_;
  const Fourier<A>&along_rows_, &along_columns_;
  Scratch<A> scratch_;
  A *z_, *real_, *imag_, *factors_;
  std::vector<A> filtered_;
  V nothing_{};
  bool streaming_ = false;
};

// Call f(planes, index of a plane, where its real and its imaginary part begin in the parts).
template <typename T, typename F>
void each_plane(const SpectrumShape& shape, int64_t batch, int64_t channels, double edge,
                double inner, const F& f) {
  using A = Accumulator<T>;
  const Fourier<A> along_rows(shape.columns), along_columns(shape.rows);
  const int64_t size = shape.rows * shape.bins();
  parallel_for(0, batch * channels, 1, [&](int64_t first, int64_t last) {
    Planes<T> planes(shape, along_rows, along_columns, static_cast<A>(edge), static_cast<A>(inner));
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t real = (plane / channels * 2 * channels + plane % channels) * size;
      f(planes, plane, real, real + channels * size);
    }
    stream_fence();
  });
}

}  // namespace

bool takes_spectrum(const SpectrumShape& shape) {
  return Fourier<float>::takes(shape.rows) && Fourier<float>::takes(shape.columns);
}

bool spectrum_of_image(Type type, const SpectrumShape& shape, int64_t batch, int64_t channels,
                       const void* image, double edge, double inner, void* parts) {
  std::atomic<bool> finite = true;
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    auto* const to = static_cast<Accumulator<T>*>(parts);
    each_plane<T>(shape, batch, channels, edge, inner,
                  [&](Planes<T>& planes, int64_t plane, int64_t real, int64_t imag) {
                    if (!planes.to_parts(planes.plane(static_cast<const T*>(image), plane),
                                         to + real, to + imag))
                      finite = false;
                  });
  });
  return finite;
}

void image_of_spectrum(Type type, const SpectrumShape& shape, int64_t batch, int64_t channels,
                       const void* parts, const FilterView* filter, double edge, double inner,
                       void* image) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const A* const from = static_cast<const A*>(parts);
    each_plane<T>(shape, batch, channels, edge, inner,
                  [&](Planes<T>& planes, int64_t plane, int64_t real, int64_t imag) {
                    const A *re = from + real, *im = from + imag;
                    if (filter != nullptr) {
                      const int64_t channel = plane % channels;
                      re = planes.filtered(re, *filter, channel, 0);
                      im = planes.filtered(im, *filter, channels + channel, 1);
                    }
                    planes.to_image(re, im, planes.plane(static_cast<T*>(image), plane),
                                    batch * channels);
                  });
  });
}

}  // namespace fastfusion::FF_CAPABILITY
