// Depthwise convolution on the CPU, forward and backward.
//
// Along the columns (contiguous images): a thread takes a range of rows of one channel and keeps
// the input rows that the filter spans in a ring of zero-padded rows. Across the channels
// (channels_last): it takes some rows of the output, all channels, and reads the input in place;
// only where the filter reaches over the left or right edge, where a block of channels is not full
// or where the type must be widened, a window of the input is copied first.
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "depthwise_tile.h"
#include "parallel.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Rows of the output (of one lattice) that are made at a time: enough for the tallest tile.
constexpr int64_t kGroup = 4;

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// -- what happens to a line of sums ---------------------------------------------------------------

template <typename V>
FF_INLINE V activate(V x, Activation activation) {
  using A = std::remove_reference_t<decltype(x[0])>;
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? V{} : x;
    case Activation::kGelu:
      return x * A(0.5) * (1 + erf(x * A(0.70710678118654752)));
    case Activation::kSilu:
      return x / (1 + exp(-x));
    default:
      return x;
  }
}

template <typename V>
FF_INLINE V derivative(V x, Activation activation) {
  using A = std::remove_reference_t<decltype(x[0])>;
  switch (activation) {
    case Activation::kRelu:
      return x > 0 ? broadcast(A(1)) : V{};
    case Activation::kGelu:  // of x Phi(x): Phi(x) + x phi(x)
      return A(0.5) * (1 + erf(x * A(0.70710678118654752))) +
             x * exp(x * x * A(-0.5)) * A(0.39894228040143268);
    case Activation::kSilu: {
      const V s = sigmoid(x);
      return s * (1 + x * (1 - s));
    }
    default:
      return broadcast(A(1));
  }
}

// A line of sums as the tiles leave it: `columns` of one channel at (b, channel, row, column), or
// as many pixels of a block of `lanes` channels, a vector each.
template <typename A>
struct Line {
  const A* sums;
  int64_t b, channel, row, column, columns;
  int lanes;
};

// Call f(vector of sums, offset from the line's first element in `image`, count of valid lanes).
template <bool kAcross, typename A, typename F>
FF_INLINE void for_vectors(const Line<A>& line, const Image& image, const F& f) {
  constexpr int kLane = kLanes<A>;
  if constexpr (kAcross) {
    for (int64_t p = 0; p < line.columns; ++p)
      f(load(line.sums + p * kLane), p * image.column_stride, line.lanes);
  } else {
    for (int64_t i = 0; i < line.columns; i += kLane)
      f(load(line.sums + i), i, static_cast<int>(std::min<int64_t>(kLane, line.columns - i)));
  }
}

// y = activation(sums), in y's type.
template <typename T>
struct Store {
  using A = Accumulator<T>;
  const Image& y;
  Activation activation;

  // The output itself, where the tiles can write there.
  const Image* direct() const {
    return std::is_same_v<T, A> && activation == Activation::kNone ? &y : nullptr;
  }
  template <bool kAcross>
  void finish(const Line<A>& line) const {
    T* to = y.at<T>(line.b, line.channel, line.row, line.column);
    for_vectors<kAcross>(line, y, [&](Vector<A> v, int64_t offset, int count) {
      v = activate(v, activation);
      if (count == kLanes<A>) {
        store(to + offset, v);
      } else {
        store(to + offset, v, count);
      }
    });
  }
};

// to = grad * activation'(sums): the gradient before the activation, not rounded to T.
template <typename T>
struct StoreGradient {
  using A = Accumulator<T>;
  const Image& grad;
  const Image& to;
  Activation activation;

  const Image* direct() const { return nullptr; }
  template <bool kAcross>
  void finish(const Line<A>& line) const {
    const T* from = grad.at<T>(line.b, line.channel, line.row, line.column);
    A* into = to.at<A>(line.b, line.channel, line.row, line.column);
    for_vectors<kAcross>(line, to, [&](Vector<A> v, int64_t offset, int count) {
      store(into + offset, derivative(v, activation) * load(from + offset, count), count);
    });
  }
};

// -- along the columns ----------------------------------------------------------------------------

// Rows first .. last - 1 of the output of one channel.
template <typename T, typename Finish>
void convolve_plane(const Image& x, const Filter<Accumulator<T>>& filter, const Finish& finish,
                    int64_t b, int64_t channel, int64_t first, int64_t last) {
  using A = Accumulator<T>;
  const int64_t dilation = filter.shape.row_dilation, padding = filter.shape.row_padding();
  const int64_t edge = filter.shape.column_padding();
  const int64_t width = round_up(x.columns, kLanes<A>);
  const int64_t ring_rows = (filter.shape.rows - 1 + kGroup) * dilation;
  const int64_t ring_step = round_up(width + 2 * edge, 64 / sizeof(A)) + 64 / sizeof(A);
  const Buffer<A> ring(ring_rows * ring_step), sums(kGroup * width);
  std::fill_n(ring.get(), ring_rows * ring_step, A(0));
  std::vector<const A*> input(kGroup + filter.shape.rows - 1);
  const Image* direct = finish.direct();

  int64_t loaded = std::max<int64_t>(0, first - padding);
  for (int64_t group = first; group < last; group += kGroup * dilation) {
    const int64_t end = std::min(last, group + kGroup * dilation);
    for (; loaded < std::min(x.rows, end + padding); ++loaded)
      copy_columns<T>(x, b, channel, loaded, 0, x.columns,
                      &ring[loaded % ring_rows * ring_step + edge]);
    for (int64_t start = group; start < std::min(end, group + dilation); ++start) {
      const int64_t count = (end - start + dilation - 1) / dilation;
      for (int64_t i = 0; i < count + filter.shape.rows - 1; ++i) {
        const int64_t row = start - padding + i * dilation;
        input[i] = row < 0 || row >= x.rows ? nullptr : &ring[row % ring_rows * ring_step];
      }
      Piece<A> piece{input.data(), count, x.columns, 1, 1, sums.get(), width, kLanes<A>};
      if (direct != nullptr) {
        piece.output = direct->at<A>(b, channel, start);
        piece.output_row_step = direct->row_stride * dilation;
      }
      convolve(filter, channel, piece);
      if (direct != nullptr) continue;
      for (int64_t i = 0; i < count; ++i)
        finish.template finish<false>(
            Line<A>{&sums[i * width], b, channel, start + i * dilation, 0, x.columns, kLanes<A>});
    }
  }
}

template <typename T, typename Finish>
void convolve_planes(const Image& x, const Filter<Accumulator<T>>& filter, const Finish& finish) {
  // Few planes are cut into bands of rows, so that there is work for every thread; a band is tall
  // enough that its halo costs little.
  const int64_t planes = x.batch * x.channels, group = kGroup * filter.shape.row_dilation;
  const int64_t tall = round_up(std::max<int64_t>(4 * filter.shape.row_padding(), 32), group);
  const int64_t bands = planes >= 64 ? 1 : (x.rows + tall - 1) / tall;
  const int64_t band = round_up((x.rows + bands - 1) / bands, group);
  parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / bands, first = unit % bands * band;
      convolve_plane<T>(x, filter, finish, plane / x.channels, plane % x.channels, first,
                        std::min(x.rows, first + band));
    }
  });
}

// -- across the channels --------------------------------------------------------------------------

// Columns begin .. end - 1 of a lattice of output rows, through a copied window of the input.
template <typename T, typename A>
struct Window {
  const Image& x;
  const Filter<A>& filter;
  int64_t columns;  // of the output, at most
  Buffer<A> pixels;
  std::vector<const A*> input;

  Window(const Image& image, const Filter<A>& f, int64_t most)
      : x(image),
        filter(f),
        columns(most),
        pixels((kGroup + f.shape.rows - 1) * (most + 2 * f.shape.column_padding()) * kLanes<A>),
        input(kGroup + f.shape.rows - 1) {}

  const A* const* copy(int64_t b, int64_t channel, int lanes, int64_t start, int64_t count,
                       int64_t begin, int64_t end) {
    const int64_t edge = filter.shape.column_padding(), step = (columns + 2 * edge) * kLanes<A>;
    for (int64_t i = 0; i < count + filter.shape.rows - 1; ++i) {
      const int64_t row = start - filter.shape.row_padding() + i * filter.shape.row_dilation;
      input[i] = nullptr;
      if (row < 0 || row >= x.rows) continue;
      copy_pixels<T>(x, b, channel, lanes, row, begin - edge, end - begin + 2 * edge,
                     &pixels[i * step]);
      input[i] = &pixels[i * step];
    }
    return input.data();
  }
};

template <typename T, typename Finish>
void convolve_blocks(const Image& x, const Filter<Accumulator<T>>& filter, const Finish& finish) {
  using A = Accumulator<T>;
  constexpr int kLane = kLanes<A>;
  const int64_t dilation = filter.shape.row_dilation, group = kGroup * dilation;
  const int64_t edge = filter.shape.column_padding(), padding = filter.shape.row_padding();
  const int64_t strips = (x.rows + group - 1) / group;
  // A piece is wide enough that its halo costs little, and its window stays in the cache.
  const int64_t wide = std::min(x.columns, std::max<int64_t>(32, 2 * edge));
  const Image* direct = finish.direct();

  parallel_for(0, x.batch * strips, 1, [&](int64_t unit_begin, int64_t unit_end) {
    Window<T, A> window(x, filter, wide);
    const Buffer<A> sums(kGroup * wide * kLane);
    std::vector<const A*> in_place(kGroup + filter.shape.rows - 1);
    for (int64_t unit = unit_begin; unit < unit_end; ++unit) {
      const int64_t b = unit / strips, group_begin = unit % strips * group;
      const int64_t group_end = std::min(x.rows, group_begin + group);
      for (int64_t channel = 0; channel < x.channels; channel += kLane) {
        const int lanes = static_cast<int>(std::min<int64_t>(kLane, x.channels - channel));
        const bool readable = std::is_same_v<T, A> && x.channels_dense() && lanes == kLane;
        for (int64_t start = group_begin; start < std::min(group_end, group_begin + dilation);
             ++start) {
          const int64_t count = (group_end - start + dilation - 1) / dilation;
          const auto columns = [&](int64_t begin, int64_t end, bool copied) {
            Piece<A> piece{nullptr, count,      end - begin,  kLane,
                           kLane,   sums.get(), wide * kLane, lanes};
            if (copied) {
              piece.input = window.copy(b, channel, lanes, start, count, begin, end);
            } else {
              for (int64_t i = 0; i < count + filter.shape.rows - 1; ++i) {
                const int64_t row = start - padding + i * dilation;
                in_place[i] =
                    row < 0 || row >= x.rows ? nullptr : x.at<A>(b, channel, row, begin - edge);
              }
              piece.input = in_place.data();
              piece.input_step = x.column_stride;
            }
            if (direct != nullptr) {
              piece.output = direct->at<A>(b, channel, start, begin);
              piece.output_row_step = direct->row_stride * dilation;
              piece.output_step = direct->column_stride;
            }
            convolve(filter, channel, piece);
            if (direct != nullptr) return;
            for (int64_t i = 0; i < count; ++i)
              finish.template finish<true>(Line<A>{&sums[i * wide * kLane], b, channel,
                                                   start + i * dilation, begin, end - begin,
                                                   lanes});
          };
          const auto pieces = [&](int64_t begin, int64_t end, bool copied) {
            for (int64_t c = begin; c < end; c += wide) columns(c, std::min(end, c + wide), copied);
          };
          if (readable && x.columns > 2 * edge) {
            pieces(0, edge, true);
            pieces(edge, x.columns - edge, false);
            pieces(x.columns - edge, x.columns, true);
          } else {
            pieces(0, x.columns, true);
          }
        }
      }
    }
  });
}

// W is the type of the filter, T that of the image: wider where it was made in between.
template <typename W, typename T, typename Finish>
void convolve_image(const Image& x, const FilterView& view, bool flip, bool across,
                    const Finish& finish) {
  using A = Accumulator<T>;
  const Filter<A> filter = Filter<A>::template pack<W>(view, x.channels, across, flip);
  if (across) {
    convolve_blocks<T>(x, filter, finish);
  } else {
    convolve_planes<T>(x, filter, finish);
  }
}

// The gradients of a convolution, given the gradient of its result: T is the type of all but that.
template <typename T, typename G>
void gradients(const Image& grad, const Image& x, const FilterView& filter, bool across,
               const DepthwiseGradients& wanted) {
  if (wanted.x.data != nullptr) {
    FilterView plain = filter;
    plain.bias = nullptr;
    convolve_image<T, G>(grad, plain, true, across, Store<T>{wanted.x, Activation::kNone});
  }
  if (wanted.weight != nullptr || wanted.bias != nullptr)
    weight_gradient<T, G>(x, grad, filter.shape, across, static_cast<T*>(wanted.weight),
                          static_cast<T*>(wanted.bias));
}

}  // namespace

void depthwise_conv2d(Type type, const Image& x, const FilterView& filter, Activation activation,
                      bool across, const Image& y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    convolve_image<T, T>(x, filter, false, across, Store<T>{y, activation});
  });
}

void depthwise_conv2d_backward(Type type, const Image& grad, const Image& x,
                               const FilterView& filter, Activation activation, bool across,
                               const DepthwiseGradients& wanted) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    if (activation == Activation::kNone) return gradients<T, T>(grad, x, filter, across, wanted);
    Image before = grad;
    const Buffer<A> memory(grad.batch * grad.channels * grad.rows * grad.columns);
    before.data = memory.get();
    convolve_image<T, T>(x, filter, false, across, StoreGradient<T>{grad, before, activation});
    gradients<T, A>(before, x, filter, across, wanted);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
