// VAN's large-kernel attention on the CPU.
//
// Forward: a unit is a strip of columns of a band of rows, all channels. It goes down the band,
// keeps the rows of local(x) that the context filter spans in a slab, and takes each group of rows
// through context, mix and the product with x while it is in the cache: nothing of the size of the
// image is stored but the result. Backward: the intermediate images are made again, whole, across
// the channels.
#include "large_kernel_attention.h"

#include "depthwise_image.h"
#include "depthwise_slab.h"

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

// c[r, :] = a[r, :] b for `rows` rows and `columns` columns; c is written in whole vectors. With
// `add` the product is added.
template <typename A>
struct Product {
  int64_t rows, columns, depth;
  const A* a;
  int64_t a_row, a_column;
  const A* b;
  int64_t b_row;
  A* c;
  int64_t c_row;
  bool add = false;

  template <int R, int V>
  void tile(int64_t row, int64_t column) const {
    Vector<A> sums[R][V];
    A* to = c + row * c_row + column;
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED {
        sums[r][v] = add ? load(to + r * c_row + v * kLanes<A>) : Vector<A>{};
      });
    });
    multiply<A, R, V>(sums, depth, a + row * a_row, a_row, a_column, b + column, b_row);
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED { store(to + r * c_row + v * kLanes<A>, sums[r][v]); });
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

// Columns left .. right - 1 of a band of rows: all of it but x is made and used here.
template <typename T>
class Strip {
 public:
  using A = Accumulator<T>;

  // How many rows go through context at a time: what a tile of each lattice takes.
  static int64_t group_rows(const FilterShape& context) {
    return group_of(context) * context.row_dilation;
  }

  // A band must start at a multiple of group_rows.
  Strip(const Image& x, const Filter<A>& local, const Filter<A>& context, const Mix<A>& mix,
        const Image& y, int64_t columns)
      : x_(x),
        y_(y),
        local_(local),
        context_(context),
        mix_(mix),
        across_(local.across),
        rows_(group_rows(context.shape)),
        edge_(context.shape.column_padding()),
        input_(across_, x.channels, kStep + 2 * local.shape.row_padding(),
               columns + 2 * edge_ + 2 * local.shape.column_padding()),
        // Rows are made kStep at a time from a multiple of kStep on, up to kStep - 1 too many.
        made_(across_, x.channels,
              round_up(rows_ + 2 * context.shape.row_padding() + 2 * kStep, kStep),
              columns + 2 * edge_),
        spread_(across_, x.channels, rows_, columns),
        mixed_(across_ ? columns * mix.row : x.channels * round_up(columns, kLanes<A>)) {
    spread_.clear();  // vectors at the end of a row are read whole
  }

  void run(int64_t b, int64_t first, int64_t last, int64_t left, int64_t right) {
    const int64_t padding = context_.shape.row_padding();
    made_.first_column = left - edge_;
    made_.clear();  // its columns beyond the image are zeros
    input_.first_column = left - edge_ - local_.shape.column_padding();
    spread_.first_column = left;
    int64_t made = std::max<int64_t>(0, first - padding) / kStep * kStep;
    for (int64_t row = first; row < last; row += rows_) {
      const int64_t end = std::min(last, row + rows_);
      for (; made < std::min(x_.rows, end + padding); made += kStep)
        make(b, made, std::min(x_.rows, made + kStep), std::max<int64_t>(0, left - edge_),
             std::min(x_.columns, right + edge_));
      convolve_slab(context_, 0, x_.channels, made_, x_.rows, spread_, row, end, left, right,
                    pointers_);
      for (int64_t i = row; i < end; ++i) finish(b, i, left, right);
    }
  }

 private:
  static constexpr int64_t kStep = kTileRows;

  void make(int64_t b, int64_t first, int64_t last, int64_t left, int64_t right) {
    const int64_t rows = local_.shape.row_padding(), columns = local_.shape.column_padding();
    copy_into<T>(input_, across_, x_, b, 0, x_.channels, first - rows, last + rows, left - columns,
                 right + columns);
    convolve_slab(local_, 0, x_.channels, input_, x_.rows, made_, first, last, left, right,
                  pointers_);
  }

  // One row: y = x * (mix * spread + bias).
  void finish(int64_t b, int64_t row, int64_t left, int64_t right) {
    constexpr int64_t kLane = kLanes<A>;
    const int64_t columns = right - left, channels = x_.channels;
    const A* spread = spread_.at(0, row, left);
    if (across_) {
      Product<A>{columns, mix_.row,          channels, spread,       spread_.step(),
                 1,       mix_.weight.get(), mix_.row, mixed_.get(), mix_.row}
          .run();
    } else {
      const int64_t width = round_up(columns, kLane);
      Product<A>{channels,     width, channels, mix_.weight.get(),
                 mix_.row,     1,     spread,   spread_.channel_step(),
                 mixed_.get(), width}
          .run();
    }
    // Lines of y that lie together: pixels across the channels, channels along the columns.
    const int64_t lines = across_ ? columns : channels, length = across_ ? channels : columns;
    const int64_t mixed_row = across_ ? mix_.row : round_up(columns, kLane);
    for (int64_t line = 0; line < lines; ++line) {
      const T* x = across_ ? x_.at<T>(b, 0, row, left + line) : x_.at<T>(b, line, row, left);
      T* y = across_ ? y_.at<T>(b, 0, row, left + line) : y_.at<T>(b, line, row, left);
      const A* mixed = &mixed_[line * mixed_row];
      for (int64_t i = 0; i < length; i += kLane) {
        const int count = static_cast<int>(std::min(kLane, length - i));
        const Vector<A> bias = across_ ? load(&mix_.bias[i]) : broadcast(mix_.bias[line]);
        store(y + i, load(x + i, count) * (load(mixed + i) + bias), count);
      }
    }
  }

  const Image& x_;
  const Image& y_;
  const Filter<A>& local_;
  const Filter<A>& context_;
  const Mix<A>& mix_;
  bool across_;
  int64_t rows_, edge_;
  Slab<A> input_, made_, spread_;
  Buffer<A> mixed_;
  std::vector<const A*> pointers_;
};

template <typename T>
void forward(const Image& x, const FilterView& local_view, const FilterView& context_view,
             const MixView& mix_view, bool across, const Image& y) {
  using A = Accumulator<T>;
  const auto local = Filter<A>::template pack<T>(local_view, x.channels, across, false);
  const auto context = Filter<A>::template pack<T>(context_view, x.channels, across, false);
  const auto mix = Mix<A>::template pack<T>(mix_view, x.channels, across);
  // A band and a strip are large against the halo that is made twice; bands are there for threads.
  const int64_t tall = round_up(std::max<int64_t>(64, 6 * context.shape.row_padding()),
                                Strip<T>::group_rows(context.shape));
  const int64_t wide = std::max<int64_t>(64, 2 * context.shape.column_padding());
  const int64_t bands = (x.rows + tall - 1) / tall, strips = (x.columns + wide - 1) / wide;
  parallel_for(0, x.batch * bands * strips, 1, [&](int64_t begin, int64_t end) {
    Strip<T> strip(x, local, context, mix, y, std::min(wide, x.columns));
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t b = unit / (bands * strips), first = unit / strips % bands * tall;
      const int64_t left = unit % strips * wide;
      strip.run(b, first, std::min(x.rows, first + tall), left, std::min(x.columns, left + wide));
    }
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
        Product<A>{count, width,       channels, c.get(), width, 1, mix.weight.get(),
                   width, mixed.get(), width}
            .run();
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
        Product<A>{channels, width, count,      c.get(), 1,   width,
                   ga.get(), width, sums.get(), width,   true}
            .run();
        for (int64_t i = 0; i < totals_size; ++i) totals[group * totals_size + i] += sums[i];
        // The gradient of spread, in its place: ga (out, in).
        Product<A>{count, width,       channels, ga.get(), width, 1, turned.weight.get(),
                   width, mixed.get(), width}
            .run();
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
  with_type(type, [&](auto zero) { forward<decltype(zero)>(x, local, context, mix, across, y); });
}

void large_kernel_attention_backward(Type type, const Image& grad, const Image& x,
                                     const FilterView& local, const FilterView& context,
                                     const MixView& mix, const AttentionGradients& wanted) {
  with_type(type,
            [&](auto zero) { backward<decltype(zero)>(grad, x, local, context, mix, wanted); });
}

}  // namespace fastfusion::FF_CAPABILITY
