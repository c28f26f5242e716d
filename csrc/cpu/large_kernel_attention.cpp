// VAN's large-kernel attention on the CPU.
//
// Forward: a unit is a strip of columns of a band of rows, all channels. It goes down the band by
// groups of rows. Channel by channel (across the channels: vector by vector of them) the rows of
// local(x) that the group's context filter spans are made in the first-level cache and filtered
// again; those that the next group wants too are kept. When all channels are there, their rows go
// through the mix, and the product with x is taken of its sums while they are in registers: nothing
// of the size of the image is stored but the result. Backward: the intermediate images are made
// again, whole, across the channels.
#include "large_kernel_attention.h"

#include "depthwise_image.h"
#include "depthwise_slab.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// -- products of matrices -------------------------------------------------------------------------

// sums[r][v] += sum over k < depth of a[r, k] * (vector v of b's row k).
template <typename A, int R, int V>
FF_INLINE void multiply(Vector<A> (&sums)[R][V], int64_t depth, const A* a, int64_t a_row,
                        int64_t a_column, const A* b, int64_t b_row) {
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> values[V];
    unroll<V>([&](auto v) FF_INLINED {
      values[v] = load(b + v * kLanes<A>);
      pin(values[v]);
    });
    unroll<R>([&](auto r) FF_INLINED {
      const Vector<A> factor = broadcast(a[r * a_row]);
      unroll<V>([&](auto v) FF_INLINED { sums[r][v] = fma(values[v], factor, sums[r][v]); });
    });
    a += a_column;
    b += b_row;
  }
}

// Where the products go that are stored as they are: in whole vectors, or added to what is there.
template <typename A>
struct Stored {
  A* c;
  int64_t row;
  bool add = false;

  FF_INLINE Vector<A> start(int64_t r, int64_t column) const {
    return add ? load(c + r * row + column) : Vector<A>{};
  }
  FF_INLINE void put(int64_t r, int64_t column, Vector<A> sum) const {
    store(c + r * row + column, sum);
  }
};

// c[r, :] = a[r, :] b for `rows` rows and `columns` columns, these filled up to whole vectors. Each
// vector of sums begins as `to.start` says and goes to `to.put`.
template <typename A, typename To>
struct Product {
  int64_t rows, columns, depth;
  const A* a;
  int64_t a_row, a_column;
  const A* b;
  int64_t b_row;
  To to;

  template <int R, int V>
  void tile(int64_t row, int64_t column) const {
    Vector<A> sums[R][V];
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED { sums[r][v] = to.start(row + r, column + v * kLanes<A>); });
    });
    multiply<A, R, V>(sums, depth, a + row * a_row, a_row, a_column, b + column, b_row);
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED { to.put(row + r, column + v * kLanes<A>, sums[r][v]); });
    });
  }
  template <int V>
  void columns_of(int64_t column) const {
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) tile<kTileRows, V>(row, column);
    for (; row + 4 <= rows; row += 4) tile<4, V>(row, column);
    for (; row < rows; ++row) tile<1, V>(row, column);
  }
  void run() const {
    constexpr int64_t kWide = kTileVectors * kLanes<A>;
    int64_t column = 0;
    for (; column + kWide <= columns; column += kWide) columns_of<kTileVectors>(column);
    for (; column < columns; column += kLanes<A>) columns_of<1>(column);
  }
};

// The mix, widened: (out, in), or (in, out) where the vectors lie across the channels. Rows are
// whole vectors, filled up with zeros.
template <typename A>
struct Mix {
  int64_t row;
  Buffer<A> weight, bias;

  template <typename T>
  static Mix pack(const MixView& view, int64_t channels, bool transposed) {
    const int64_t row = round_up(channels, kLanes<A>);
    Mix mix{row, Buffer<A>(channels * row), Buffer<A>(row)};
    std::fill_n(mix.weight.get(), channels * row, A(0));
    std::fill_n(mix.bias.get(), row, A(0));
    const T* weight = static_cast<const T*>(view.weight);
    const T* bias = static_cast<const T*>(view.bias);
    for (int64_t out = 0; out < channels; ++out) {
      if (bias != nullptr) mix.bias[out] = widen(bias[out]);
      for (int64_t in = 0; in < channels; ++in)
        mix.weight[transposed ? in * row + out : out * row + in] =
            widen(weight[out * channels + in]);
    }
    return mix;
  }
};

// -- forward --------------------------------------------------------------------------------------

// y = x * (sums + bias) for one row of a strip from column `left` on. The sums' rows are channels
// and their columns the strip's; across the channels, the other way round.
template <typename T, bool kAcross>
struct Gated {
  using A = Accumulator<T>;
  const Image& x;
  const Image& y;
  const A* bias;
  int64_t b, row, left;
  int64_t valid;  // columns of the sums that are real
  bool streaming;

  T* at(const Image& image, int64_t r, int64_t column) const {
    return kAcross ? image.at<T>(b, column, row, left + r) : image.at<T>(b, r, row, left + column);
  }
  FF_INLINE Vector<A> start(int64_t r, int64_t column) const {
    __builtin_prefetch(at(x, r, column));  // it comes while the sums are made
    return kAcross ? load(bias + column) : broadcast(bias[r]);
  }
  FF_INLINE void put(int64_t r, int64_t column, Vector<A> sum) const {
    const T* from = at(x, r, column);
    T* to = at(y, r, column);
    const int count = static_cast<int>(std::min<int64_t>(kLanes<A>, valid - column));
    if (count < kLanes<A>) {
      store(to, load(from, count) * sum, count);
    } else if (std::is_same_v<T, A> && streaming) {
      stream(to, load(from) * sum);
    } else {
      store(to, load(from) * sum);
    }
  }
};

// Columns left .. right - 1 of a band of rows: all of it but x is made and used here.
template <typename T, bool kAcross>
class Strip {
 public:
  using A = Accumulator<T>;

  // How many rows go through context at a time: what a tile of each lattice takes.
  static int64_t group_rows(const FilterShape& context) {
    return group_of(context) * context.row_dilation;
  }

  Strip(const Image& x, const Filter<A>& local, const Filter<A>& context, const Mix<A>& mix,
        const Image& y, int64_t columns)
      : x_(x),
        y_(y),
        local_(local),
        context_(context),
        mix_(mix),
        streaming_(can_stream<A>(y)),
        rows_(group_rows(context.shape)),
        edge_(context.shape.column_padding()),
        made_(kAcross, kChannels, rows_ + 2 * context.shape.row_padding(), columns + 2 * edge_),
        input_(kAcross, kChannels,
               rows_ + 2 * (context.shape.row_padding() + local.shape.row_padding()),
               columns + 2 * (edge_ + local.shape.column_padding())),
        kept_size_(2 * context.shape.row_padding() * made_.row_step()),
        kept_((x.channels + kChannels - 1) / kChannels * kept_size_),
        line_(kAcross ? mix.row : round_up(columns, kLanes<A>)),
        // Rows of the group lie a little apart, else they would share a few sets of the cache.
        row_step_((kAcross ? columns : x.channels) * line_ + 64 / sizeof(A)),
        spread_(rows_ * row_step_) {
    std::fill_n(spread_.get(), rows_ * row_step_, A(0));  // lines are read in whole vectors
  }

  void run(int64_t b, int64_t first, int64_t last, int64_t left, int64_t right) {
    const int64_t padding = context_.shape.row_padding();
    made_.first_column = left - edge_;
    made_.clear();  // its columns beyond the image are zeros
    input_.first_column = left - edge_ - local_.shape.column_padding();
    for (int64_t row = first; row < last; row += rows_) {
      const int64_t end = std::min(last, row + rows_);
      const int64_t known = row == first ? row - padding : row + padding;
      for (int64_t channel = 0; channel < x_.channels; channel += kChannels) {
        A* kept = &kept_[channel / kChannels * kept_size_];
        if (row > first) std::copy_n(kept, kept_size_, made_.at(0, 0, made_.first_column));
        first_row_ = row - padding;  // of what is made
        make(b, channel, std::max<int64_t>(0, known), std::min(x_.rows, end + padding),
             std::max<int64_t>(0, left - edge_), std::min(x_.columns, right + edge_));
        spread(channel, kept, row, end, left, right);
        if (end < last) std::copy_n(made_.at(0, rows_, made_.first_column), kept_size_, kept);
      }
      for (int64_t i = row; i < end; ++i)
        finish(b, i, &spread_[(i - row) * row_step_], left, right);
    }
  }

 private:
  // Channels that are made together.
  static constexpr int64_t kChannels = kAcross ? kLanes<A> : 1;

  int64_t channels_from(int64_t channel) const {
    return std::min(kChannels, x_.channels - channel);
  }

  // Convolve output rows first, first + dilation, ... before `last`; `locate` gives the place of an
  // input row's first tap.
  template <typename X, typename Locate>
  void convolve_rows(const Filter<A>& filter, int64_t channel, Piece<X, A> piece, int64_t first,
                     int64_t last, const Locate& locate) {
    const FilterShape& shape = filter.shape;
    std::vector<const X*>& input = pointers(X());
    piece.count = (last - first + shape.row_dilation - 1) / shape.row_dilation;
    input.resize(piece.count + shape.rows - 1);
    for (int64_t i = 0; i < piece.count + shape.rows - 1; ++i) {
      const int64_t row = first - shape.row_padding() + i * shape.row_dilation;
      input[i] = row < 0 || row >= x_.rows ? nullptr : locate(row);
    }
    piece.input = input.data();
    piece.channels = channels_from(channel);
    convolve(filter, channel, piece);
  }

  // Rows first .. last - 1 and columns begin .. end - 1 of local(x).
  void make(int64_t b, int64_t channel, int64_t first, int64_t last, int64_t begin, int64_t end) {
    if (first >= last) return;
    const int64_t edge = local_.shape.column_padding();
    if constexpr (kAcross) {
      // x is read in place but where the filter reaches over its edge.
      const bool readable = x_.channels_dense() && channels_from(channel) == kChannels;
      const int64_t from = readable ? std::clamp(edge, begin, end) : end;
      const int64_t to = readable ? std::clamp(x_.columns - edge, from, end) : end;
      make_copied(b, channel, first, last, begin, from);
      if (from < to) {
        Piece<T, A> piece{
            nullptr,          0, to - from, x_.column_stride, made_.step(), made_at(first, from),
            made_.row_step(), 0};
        convolve_rows(local_, channel, piece, first, last,
                      [&](int64_t row) { return x_.at<T>(b, channel, row, from - edge); });
      }
      make_copied(b, channel, first, last, to, end);
    } else {
      make_copied(b, channel, first, last, begin, end);
    }
  }

  void make_copied(int64_t b, int64_t channel, int64_t first, int64_t last, int64_t begin,
                   int64_t end) {
    if (begin >= end) return;
    const int64_t padding = local_.shape.row_padding(), edge = local_.shape.column_padding();
    const int64_t top = first - padding;
    for (int64_t row = std::max<int64_t>(0, top); row < std::min(last + padding, x_.rows); ++row)
      if constexpr (kAcross) {
        copy_pixels<T>(x_, b, channel, channels_from(channel), row, begin - edge,
                       end - begin + 2 * edge, input_.at(0, row - top, begin - edge),
                       input_.step());
      } else {
        copy_columns<T>(x_, b, channel, row, begin - edge, end - begin + 2 * edge,
                        input_.at(0, row - top, begin - edge));
      }
    const int64_t group = group_of(local_.shape);
    for (int64_t row = first; row < last; row += group) {
      Piece<A> piece{
          nullptr,          0, end - begin, input_.step(), made_.step(), made_at(row, begin),
          made_.row_step(), 0};
      // The next channel's rows are fetched meanwhile; after the last one the next group's.
      const bool more = channel + 1 < x_.channels;
      piece.ahead = x_.at<T>(b, more ? channel + 1 : 0, row + padding + (more ? 0 : rows_), begin);
      piece.ahead_row_step = x_.row_stride * sizeof(T);
      piece.ahead_step = sizeof(T);
      convolve_rows(local_, channel, piece, row, std::min(last, row + group),
                    [&](int64_t i) { return input_.at(0, i - top, begin - edge); });
    }
  }

  // context(local(x)) of the rows row .. end - 1 of a group. What was kept of the next channel is
  // fetched meanwhile.
  void spread(int64_t channel, const A* kept, int64_t row, int64_t end, int64_t left,
              int64_t right) {
    const int64_t dilation = context_.shape.row_dilation;
    A* to = &spread_[kAcross ? channel : channel * line_];
    for (int64_t start = row; start < std::min(end, row + dilation); ++start) {
      Piece<A> piece{nullptr,
                     0,
                     right - left,
                     made_.step(),
                     kAcross ? line_ : 1,
                     to + (start - row) * row_step_,
                     row_step_ * dilation,
                     0};
      piece.ahead = kept + kept_size_ + (start - row) * made_.row_step();
      piece.ahead_row_step = made_.row_step() * dilation * sizeof(A);
      piece.ahead_step = sizeof(A);
      convolve_rows(context_, channel, piece, start, end,
                    [&](int64_t i) { return made_at(i, left - edge_); });
    }
  }

  // One row: y = x * (mix * spread + bias).
  void finish(int64_t b, int64_t row, const A* spread, int64_t left, int64_t right) {
    const int64_t columns = right - left, channels = x_.channels;
    const Gated<T, kAcross> gated{
        x_, y_, mix_.bias.get(), b, row, left, kAcross ? channels : columns, streaming_};
    if constexpr (kAcross) {
      Product<A, Gated<T, true>>{columns, mix_.row,          channels, spread, line_,
                                 1,       mix_.weight.get(), mix_.row, gated}
          .run();
    } else {
      Product<A, Gated<T, false>>{channels, round_up(columns, kLanes<A>),
                                  channels, mix_.weight.get(),
                                  mix_.row, 1,
                                  spread,   line_,
                                  gated}
          .run();
    }
  }

  template <typename X>
  std::vector<const X*>& pointers(X) {
    if constexpr (std::is_same_v<X, A>) {
      return pointers_;
    } else {
      return pointers_of_x_;
    }
  }
  A* made_at(int64_t row, int64_t column) const { return made_.at(0, row - first_row_, column); }

  const Image& x_;
  const Image& y_;
  const Filter<A>& local_;
  const Filter<A>& context_;
  const Mix<A>& mix_;
  bool streaming_;
  int64_t rows_, edge_, first_row_ = 0;
  // Of one channel, or one vector of them: local(x) and the part of x that it is made of.
  Slab<A> made_, input_;
  // Of all channels: the last rows of local(x), which the next group begins with.
  int64_t kept_size_;
  Buffer<A> kept_;
  // A group of rows of context(local(x)): (rows, C, columns) or (rows, columns, C).
  int64_t line_, row_step_;
  Buffer<A> spread_;
  // Rows of what is made and of x, as pieces want them.
  std::vector<const A*> pointers_;
  std::vector<const T*> pointers_of_x_;
};

template <typename T, bool kAcross>
void forward(const Image& x, const FilterView& local_view, const FilterView& context_view,
             const MixView& mix_view, const Image& y) {
  using A = Accumulator<T>;
  using Unit = Strip<T, kAcross>;
  const auto local = Filter<A>::template pack<T>(local_view, x.channels, kAcross, false);
  const auto context = Filter<A>::template pack<T>(context_view, x.channels, kAcross, false);
  const auto mix = Mix<A>::template pack<T>(mix_view, x.channels, kAcross);
  // A band and a strip are large against the halo that is made twice; what a strip keeps stays in
  // the second-level cache. Bands of a strip follow one another: the last may be short, and threads
  // would not have the same to do.
  const int64_t tall = round_up(std::max<int64_t>(128, 6 * context.shape.row_padding()),
                                Unit::group_rows(context.shape));
  const int64_t wide = round_up(std::max<int64_t>(64, 2 * context.shape.column_padding()), 64);
  const int64_t bands = (x.rows + tall - 1) / tall, strips = (x.columns + wide - 1) / wide;
  parallel_for(0, x.batch * bands * strips, 1, [&](int64_t begin, int64_t end) {
    Unit strip(x, local, context, mix, y, std::min(wide, x.columns));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / (bands * strips), first = unit % bands * tall;
      const int64_t left = unit / bands % strips * wide;
      strip.run(b, first, std::min(x.rows, first + tall), left, std::min(x.columns, left + wide));
    }
    stream_fence();
  });
}

// -- backward -------------------------------------------------------------------------------------

// Memory of an image across the channels.
template <typename A>
struct Across {
  Buffer<A> memory;
  Image image;

  explicit Across(const Image& x) : memory(x.batch * x.channels * x.rows * x.columns), image(x) {
    image.data = memory.get();
    image.batch_stride = x.rows * x.columns * x.channels;
    image.row_stride = x.columns * x.channels;
    image.column_stride = x.channels;
    image.channel_stride = 1;
  }
  A* pixel(int64_t index) const { return &memory[index * image.channels]; }
};

// A fixed number of pixels is taken together, so that sums do not depend on the threads.
constexpr int64_t kPixels = 256;

template <typename T>
void backward(const Image& grad, const Image& x, const FilterView& local, const FilterView& context,
              const MixView& mix_view, const AttentionGradients& wanted) {
  using A = Accumulator<T>;
  constexpr int64_t kLane = kLanes<A>;
  const int64_t channels = x.channels, pixels = x.batch * x.rows * x.columns;
  const int64_t width = round_up(channels, kLane);
  const auto mix = Mix<A>::template pack<T>(mix_view, channels, true);      // (in, out)
  const auto turned = Mix<A>::template pack<T>(mix_view, channels, false);  // (out, in)
  const auto multiply = [&](int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t a_row,
                            int64_t a_column, const A* b, A* to, bool add = false) {
    Product<A, Stored<A>>{rows, columns, depth, a, a_row, a_column, b, width, {to, width, add}}
        .run();
  };

  // `made` = local(x); `spread` = context(made), then the gradient of spread; `back` = grad *
  // mixed, the part of the gradient of x that does not go through the filters.
  const Across<A> made(x), spread(x), back(x);
  convolve_image<T, T, A>(x, local, false, true, made.image);
  convolve_image<T, A, A>(made.image, context, false, true, spread.image);

  // In chunks of pixels, and groups of chunks that have their own sums of the mix's gradients.
  const int64_t chunks = (pixels + kPixels - 1) / kPixels, groups = std::min<int64_t>(chunks, 16);
  const int64_t totals_size = (channels + 1) * width;
  Buffer<double> totals(groups * totals_size);
  std::fill_n(totals.get(), groups * totals_size, 0.0);
  parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    Buffer<A> c(kPixels * width), ga(kPixels * width), mixed(kPixels * width);
    Buffer<A> sums(totals_size), values(2 * width);
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t chunk = group * chunks / groups; chunk < (group + 1) * chunks / groups;
           ++chunk) {
        const int64_t first = chunk * kPixels, count = std::min(kPixels, pixels - first);
        for (int64_t p = 0; p < count; ++p) {
          const A* from = spread.pixel(first + p);
          std::fill(std::copy(from, from + channels, &c[p * width]), &c[(p + 1) * width], A(0));
        }
        multiply(count, width, channels, c.get(), width, 1, mix.weight.get(), mixed.get());
        std::fill_n(sums.get(), totals_size, A(0));
        for (int64_t p = 0; p < count; ++p) {
          const int64_t index = first + p, column = index % x.columns;
          const int64_t row = index / x.columns % x.rows, b = index / (x.columns * x.rows);
          copy_pixels<T>(x, b, 0, channels, row, column, 1, &values[0], width);
          copy_pixels<T>(grad, b, 0, channels, row, column, 1, &values[width], width);
          for (int64_t i = 0; i < width; i += kLane) {
            const Vector<A> g = load(&values[width + i]);
            const Vector<A> ga_i = g * load(&values[i]);
            const Vector<A> a = load(&mixed[p * width + i]) + load(&mix.bias[i]);
            store(&ga[p * width + i], ga_i);
            store(&sums[channels * width + i], load(&sums[channels * width + i]) + ga_i);
            store(back.pixel(index) + i, g * a, static_cast<int>(std::min(kLane, channels - i)));
          }
        }
        // (in, out): c^T ga.
        multiply(channels, width, count, c.get(), 1, width, ga.get(), sums.get(), true);
        for (int64_t i = 0; i < totals_size; ++i) totals[group * totals_size + i] += sums[i];
        // The gradient of spread, in its place: ga (out, in).
        multiply(count, width, channels, ga.get(), width, 1, turned.weight.get(), mixed.get());
        for (int64_t p = 0; p < count; ++p)
          std::copy_n(&mixed[p * width], channels, spread.pixel(first + p));
      }
    }
  });
  const auto total = [&](int64_t row, int64_t column) {
    double sum = 0;
    for (int64_t group = 0; group < groups; ++group)
      sum += totals[group * totals_size + row * width + column];
    return narrow<T>(static_cast<A>(sum));
  };
  for (int64_t out = 0; out < channels; ++out) {
    if (wanted.mix_bias != nullptr) static_cast<T*>(wanted.mix_bias)[out] = total(channels, out);
    for (int64_t in = 0; wanted.mix_weight != nullptr && in < channels; ++in)
      static_cast<T*>(wanted.mix_weight)[out * channels + in] = total(in, out);
  }

  // Through context: the gradients of its filter, then of `made`, then those of local.
  if (wanted.context_weight != nullptr || wanted.context_bias != nullptr) {
    weight_gradient<T, A, A>(made.image, spread.image, context.shape, true,
                             static_cast<T*>(wanted.context_weight),
                             static_cast<T*>(wanted.context_bias));
  }
  if (wanted.x.data == nullptr && wanted.local_weight == nullptr && wanted.local_bias == nullptr)
    return;
  FilterView plain_context = context, plain_local = local;
  plain_context.bias = plain_local.bias = nullptr;
  convolve_image<T, A, A>(spread.image, plain_context, true, true, made.image);
  if (wanted.local_weight != nullptr || wanted.local_bias != nullptr)
    weight_gradient<T, T, A>(x, made.image, local.shape, true, static_cast<T*>(wanted.local_weight),
                             static_cast<T*>(wanted.local_bias));
  if (wanted.x.data == nullptr) return;
  convolve_image<T, A, A>(made.image, plain_local, true, true, spread.image);
  parallel_for(0, pixels, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t column = index % x.columns;
      const int64_t row = index / x.columns % x.rows, b = index / (x.columns * x.rows);
      T* to = wanted.x.at<T>(b, 0, row, column);
      const A *one = back.pixel(index), *two = spread.pixel(index);
      for (int64_t c = 0; c < channels; ++c)
        to[c * wanted.x.channel_stride] = narrow<T>(one[c] + two[c]);
    }
  });
}

}  // namespace

void large_kernel_attention(Type type, const Image& x, const FilterView& local,
                            const FilterView& context, const MixView& mix, bool across,
                            const Image& y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    if (across) {
      forward<T, true>(x, local, context, mix, y);
    } else {
      forward<T, false>(x, local, context, mix, y);
    }
  });
}

void large_kernel_attention_backward(Type type, const Image& grad, const Image& x,
                                     const FilterView& local, const FilterView& context,
                                     const MixView& mix, const AttentionGradients& wanted) {
  with_type(type,
            [&](auto zero) { backward<decltype(zero)>(grad, x, local, context, mix, wanted); });
}

}  // namespace fastfusion::FF_CAPABILITY
