// Depthwise convolution on the CPU, forward and backward.
//
// Along the columns (contiguous images): a thread takes a range of rows of one channel and keeps
// the input rows that the filter spans in a ring of zero-padded rows. Across the channels
// (channels_last): it takes some rows of the output, all channels, and reads the input in place,
// widening as it reads; only where the filter reaches over the left or right edge or where a block
// of channels is not full, a window of the input is copied first.
#include "depthwise.h"

#include <algorithm>
#include <vector>

#include "depthwise_image.h"
#include "depthwise_tile.h"
#include "gelu.h"
#include "parallel.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// -- what happens to a line of sums ---------------------------------------------------------------

template <typename V>
FF_INLINE V activate(V x, Activation activation) {
  using A = std::remove_reference_t<decltype(x[0])>;
  switch (activation) {
    case Activation::kRelu:
      return x < 0 ? V{} : x;
    case Activation::kGelu:
      return gated_gelu(x, broadcast(A(0.5)));
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

// y = activation(sums), in y's type.
template <typename T>
struct Store {
  using A = Accumulator<T>;
  using Element = T;
  const Image& y;
  Activation activation;

  // The output itself, where tiles that make the element type can write there.
  const Image* direct() const { return activation == Activation::kNone ? &y : nullptr; }
  template <bool kAcross>
  void finish(const Line<A>& line) const {
    T* to = y.at<T>(line.b, line.channel, line.row, line.column);
    for_vectors<kAcross>(line, y, [&](Vector<A> v, const A*, int64_t offset, int count) {
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
  using Element = A;
  const Image& grad;
  const Image& to;
  Activation activation;

  const Image* direct() const { return nullptr; }
  template <bool kAcross>
  void finish(const Line<A>& line) const {
    const T* from = grad.at<T>(line.b, line.channel, line.row, line.column);
    A* into = to.at<A>(line.b, line.channel, line.row, line.column);
    for_vectors<kAcross>(line, to, [&](Vector<A> v, const A*, int64_t offset, int count) {
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
  const int64_t edge = filter.shape.column_padding(), rows = group_of(filter.shape);
  const int64_t width = round_up(x.columns, kLanes<A>);
  const int64_t ring_rows = (filter.shape.rows - 1 + rows) * dilation;
  // Rows start at a whole vector, so that they are copied to aligned places.
  const int64_t lead = round_up(edge, kLanes<A>);
  const int64_t ring_step = round_up(lead + width + edge, 64 / sizeof(A)) + 64 / sizeof(A);
  const Buffer<A> ring(ring_rows * ring_step), sums(rows * width);
  std::fill_n(ring.get(), ring_rows * ring_step, A(0));
  std::vector<const A*> input(rows + filter.shape.rows - 1);
  const Image* direct = std::is_same_v<typename Finish::Element, A> ? finish.direct() : nullptr;
  const bool streaming = direct != nullptr && can_stream<A>(*direct);

  int64_t loaded = std::max<int64_t>(0, first - padding);
  for (int64_t group = first; group < last; group += rows * dilation) {
    const int64_t end = std::min(last, group + rows * dilation);
    for (; loaded < std::min(x.rows, end + padding); ++loaded)
      copy_columns<T>(x, b, channel, loaded, 0, x.columns,
                      &ring[loaded % ring_rows * ring_step + lead]);
    for (int64_t start = group; start < std::min(end, group + dilation); ++start) {
      const int64_t count = (end - start + dilation - 1) / dilation;
      for (int64_t i = 0; i < count + filter.shape.rows - 1; ++i) {
        const int64_t row = start - padding + i * dilation;
        input[i] =
            row < 0 || row >= x.rows ? nullptr : &ring[row % ring_rows * ring_step + lead - edge];
      }
      Piece<A> piece{input.data(), count, x.columns, 1, 1, sums.get(), width, 1};
      piece.ahead = x.at<T>(b, channel, loaded + (start - group) * rows);
      piece.ahead_row_step = x.row_stride * sizeof(T);
      piece.ahead_step = sizeof(T);
      if (direct != nullptr) {
        piece.output = direct->at<A>(b, channel, start);
        piece.output_row_step = direct->row_stride * dilation;
        piece.stream = streaming;
      }
      convolve(filter, channel, piece);
      if (direct != nullptr) continue;
      for (int64_t i = 0; i < count; ++i)
        finish.template finish<false>(
            Line<A>{&sums[i * width], b, channel, start + i * dilation, 0, x.columns, 1, 1});
    }
  }
}

template <typename T, typename Finish>
void convolve_planes(const Image& x, const Filter<Accumulator<T>>& filter, const Finish& finish) {
  // Few planes are cut into bands of rows, so that there is work for every thread; a band is tall
  // enough that its halo costs little.
  const int64_t planes = x.batch * x.channels;
  const int64_t group = group_of(filter.shape) * filter.shape.row_dilation;
  const int64_t tall = round_up(std::max<int64_t>(4 * filter.shape.row_padding(), 32), group);
  const int64_t bands = planes >= 64 ? 1 : (x.rows + tall - 1) / tall;
  const int64_t band = round_up((x.rows + bands - 1) / bands, group);
  parallel_for(0, planes * bands, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t plane = unit / bands, first = unit % bands * band;
      convolve_plane<T>(x, filter, finish, plane / x.channels, plane % x.channels, first,
                        std::min(x.rows, first + band));
    }
    stream_fence();
  });
}

// -- across the channels --------------------------------------------------------------------------

// What a thread needs to convolve lattice rows, all channels of them.
template <typename T, typename Finish>
class Blocks {
 public:
  using A = Accumulator<T>;
  using Y = typename Finish::Element;

  Blocks(const Image& x, const Filter<A>& filter, const Finish& finish)
      : x_(x),
        filter_(filter),
        finish_(finish),
        edge_(filter.shape.column_padding()),
        streaming_(std::is_same_v<Y, A> && finish.direct() != nullptr &&
                   can_stream<A>(*finish.direct())),
        readable_(x.channels_dense()),
        wide_(std::min(x.columns, round_up(std::max<int64_t>(32, 2 * edge_),
                                           kTileVectors * filter.shape.column_dilation))),
        channels_(filter.shape.rows * filter.shape.columns * x.channels <= 4096 ? x.channels
                                                                                : kLane),
        pixel_(round_up(channels_, kLane)),
        input_(group_of(filter.shape) + filter.shape.rows - 1),
        window_(static_cast<int64_t>(input_.size()) * (wide_ + 2 * edge_) * pixel_),
        sums_(group_of(filter.shape) * wide_ * pixel_) {}

  // Output rows start, start + dilation, ... before `end`: no more than group_of(filter).
  void lattice(int64_t b, int64_t start, int64_t end) {
    const int64_t left = readable_ ? std::min(edge_, x_.columns) : x_.columns;
    const int64_t right = std::max(left, x_.columns - edge_);
    pieces(b, start, end, 0, left, true);
    pieces(b, start, end, left, right, false);
    pieces(b, start, end, right, x_.columns, true);
  }

 private:
  static constexpr int64_t kLane = kLanes<A>;
  // Whether the tiles can write the output's type.
  static constexpr bool kDirect = std::is_same_v<Y, T> || std::is_same_v<Y, A>;

  // Columns first .. last - 1; `copied` where the filter reaches over the edge.
  void pieces(int64_t b, int64_t start, int64_t end, int64_t first, int64_t last, bool copied) {
    for (int64_t column = first; column < last; column += wide_)
      for (int64_t channel = 0; channel < x_.channels; channel += channels_)
        piece(b, channel, start, end, column, std::min(last, column + wide_), copied);
  }

  void piece(int64_t b, int64_t channel, int64_t start, int64_t end, int64_t first, int64_t last,
             bool copied) {
    const int64_t dilation = filter_.shape.row_dilation;
    const int64_t count = (end - start + dilation - 1) / dilation;
    const int64_t channels = std::min(channels_, x_.channels - channel);
    // A last block that is not full is read beyond its channels: only where that is still in x.
    const int64_t rows_behind = x_.rows - end - filter_.shape.row_padding();
    const bool beyond =
        channels % kLane != 0 &&
        !(x_.column_stride == x_.channels && x_.row_stride == x_.columns * x_.channels &&
          rows_behind > 0 && rows_behind * x_.row_stride >= kLane);
    copied = copied || beyond;
    const int64_t pixel = round_up(channels, kLane);
    for (int64_t i = 0; i < count + filter_.shape.rows - 1; ++i) {
      const int64_t row = start - filter_.shape.row_padding() + i * dilation;
      if (row < 0 || row >= x_.rows) {
        input_[i] = nullptr;
      } else if (copied) {
        T* to = &window_[i * (wide_ + 2 * edge_) * pixel_];
        copy_pixels<T>(x_, b, channel, channels, row, first - edge_, last - first + 2 * edge_, to,
                       pixel);
        input_[i] = to;
      } else {
        input_[i] = x_.at<T>(b, channel, row, first - edge_);
      }
    }
    const int64_t step = copied ? pixel : x_.column_stride;
    if constexpr (kDirect) {
      if (const Image* direct = finish_.direct(); direct != nullptr) {
        Piece<T, Y> piece{input_.data(),
                          count,
                          last - first,
                          step,
                          direct->column_stride,
                          direct->at<Y>(b, channel, start, first),
                          direct->row_stride * dilation,
                          channels};
        piece.stream = streaming_;
        return convolve(filter_, channel, piece);
      }
    }
    convolve(filter_, channel,
             Piece<T, A>{input_.data(), count, last - first, step, pixel, sums_.get(),
                         wide_ * pixel, channels});
    for (int64_t i = 0; i < count; ++i)
      finish_.template finish<true>(Line<A>{&sums_[i * wide_ * pixel], b, channel,
                                            start + i * dilation, first, last - first, channels,
                                            pixel});
  }

  const Image& x_;
  const Filter<A>& filter_;
  const Finish& finish_;
  int64_t edge_;
  bool streaming_, readable_;
  // Columns of a piece: so many that its halo costs little, so few that it stays in the cache.
  int64_t wide_;
  // Channels that are taken together: all, where their filters stay in the cache, because pixels
  // then pass by in the order in which they lie in memory; else a block.
  int64_t channels_;
  int64_t pixel_;  // elements of a pixel in a copy
  std::vector<const T*> input_;
  Buffer<T> window_;
  Buffer<A> sums_;
};

template <typename T, typename Finish>
void convolve_blocks(const Image& x, const Filter<Accumulator<T>>& filter, const Finish& finish) {
  const int64_t dilation = filter.shape.row_dilation;
  const int64_t group = group_of(filter.shape) * dilation;
  const int64_t groups = (x.rows + group - 1) / group, phases = std::min(dilation, x.rows);
  // A unit is a lattice of a group, so that threads have alike to do: the groups of a dilated
  // filter are few, and the last is short.
  parallel_for(0, x.batch * groups * phases, 1, [&](int64_t begin, int64_t end) {
    Blocks<T, Finish> blocks(x, filter, finish);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit / phases % groups * group, start = first + unit % phases;
      const int64_t last = std::min(x.rows, first + group);
      if (start < last) blocks.lattice(unit / phases / groups, start, last);
    }
    stream_fence();
  });
}

// W is the type of the filter, T that of the image: wider where it was made in between.
template <typename W, typename T, typename Finish>
void convolve_with(const Image& x, const FilterView& view, bool flip, bool across,
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
    convolve_with<T, G>(grad, plain, true, across, Store<T>{wanted.x, Activation::kNone});
  }
  if (wanted.weight != nullptr || wanted.bias != nullptr)
    weight_gradient<T, T, G>(x, grad, filter.shape, across, static_cast<T*>(wanted.weight),
                             static_cast<T*>(wanted.bias));
}

}  // namespace

template <typename W, typename T, typename Y>
void convolve_image(const Image& x, const FilterView& filter, bool flip, bool across,
                    const Image& y) {
  convolve_with<W, T>(x, filter, flip, across, Store<Y>{y, Activation::kNone});
}

#define FF_INSTANTIATE(W, T, Y) \
  template void convolve_image<W, T, Y>(const Image&, const FilterView&, bool, bool, const Image&)
FF_INSTANTIATE(float, float, float);
FF_INSTANTIATE(double, double, double);
FF_INSTANTIATE(Half, Half, float);
FF_INSTANTIATE(Half, float, float);
FF_INSTANTIATE(BFloat16, BFloat16, float);
FF_INSTANTIATE(BFloat16, float, float);
#undef FF_INSTANTIATE

void depthwise_conv2d(Type type, const Image& x, const FilterView& filter, Activation activation,
                      bool across, const Image& y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    convolve_with<T, T>(x, filter, false, across, Store<T>{y, activation});
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
    convolve_with<T, T>(x, filter, false, across, StoreGradient<T>{grad, before, activation});
    gradients<T, A>(before, x, filter, across, wanted);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
