// The gradient of a depthwise convolution with respect to its filters and biases.
//
// grad_weight[ky, kx] = sum over the pixels of grad[i, j] * x[i + ky*dilation, j + kx*dilation]: a
// small set of taps is summed in registers while a chunk of the image passes by. A chunk is a set
// of rows `dilation` apart (a lattice, see depthwise_tile.h) and a range of columns, small enough
// to stay in the cache for all taps. Its sums go into totals in double, chunk by chunk in a fixed
// order, so that neither the number of threads nor the size of the image shows in the result.
#include <algorithm>
#include <vector>

#include "depthwise.h"
#include "depthwise_tile.h"
#include "parallel.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Taps in registers: kMost x kMost sums, kMost gradients and an input.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kMost = 4;
#else
constexpr int kMost = 3;
#endif
constexpr int64_t kChunkRows = 32;
// Work is cut into at least this many pieces, if need be into groups of chunks.
constexpr int64_t kUnits = 16;

// Part of a chunk as one tile of taps sees it.
template <typename A>
struct Region {
  const A* x;     // at the first tap of the tile
  const A* grad;  // of the first row of taps of the tile
  int64_t rows, columns;
  int64_t x_row_step, grad_row_step;
  int64_t x_step, grad_step;  // from a pixel to the next; 1 along the columns
  int64_t tap_step;           // from a tap to the next of its row, in x
  A* sums;                    // (kernel rows, kernel columns, lanes) at the tile's first tap
  int64_t sums_row_step;
};

// The row of taps below uses, for the same input row, the row of the gradient above.
template <typename A, bool kAcross, int Ky, int Kx>
void add_taps(const Region<A>& region) {
  constexpr int kLane = kLanes<A>;
  Vector<A> sums[Ky][Kx];
  unroll<Ky>([&](auto ky) FF_INLINED {
    unroll<Kx>([&](auto kx) FF_INLINED {
      sums[ky][kx] = load(region.sums + ky * region.sums_row_step + kx * kLane);
    });
  });
  const auto add = [&](const A* x, const A* grad, auto get) FF_INLINED {
    Vector<A> g[Ky];
    unroll<Ky>([&](auto ky) FF_INLINED {
      g[ky] = get(grad - ky * region.grad_row_step);
      if constexpr (Kx > 1) pin(g[ky]);
    });
    unroll<Kx>([&](auto kx) FF_INLINED {
      Vector<A> value = get(x + kx * region.tap_step);
      if constexpr (Ky > 1) pin(value);
      unroll<Ky>([&](auto ky) FF_INLINED { sums[ky][kx] = fma(value, g[ky], sums[ky][kx]); });
    });
  };
  const auto whole = [](const A* from) FF_INLINED { return load(from); };
  for (int64_t row = 0; row < region.rows; ++row) {
    const A* x = region.x + row * region.x_row_step;
    const A* grad = region.grad + row * region.grad_row_step;
    if constexpr (kAcross) {
      for (int64_t pixel = 0; pixel < region.columns; ++pixel) {
        add(x, grad, whole);
        x += region.x_step;
        grad += region.grad_step;
      }
    } else {
      int64_t column = 0;
      for (; column + kLane <= region.columns; column += kLane)
        add(x + column, grad + column, whole);
      const int left = static_cast<int>(region.columns - column);
      if (left > 0) {
        add(x + column, grad + column,
            [left](const A* from) FF_INLINED { return load(from, left); });
      }
    }
  }
  unroll<Ky>([&](auto ky) FF_INLINED {
    unroll<Kx>([&](auto kx) FF_INLINED {
      store(region.sums + ky * region.sums_row_step + kx * kLane, sums[ky][kx]);
    });
  });
}

template <typename A, bool kAcross, int Ky>
void add_taps(int kx, const Region<A>& region) {
  switch (kx) {
    case 1:
      return add_taps<A, kAcross, Ky, 1>(region);
    case 2:
      return add_taps<A, kAcross, Ky, 2>(region);
    case 3:
      return add_taps<A, kAcross, Ky, 3>(region);
    default:
      return add_taps<A, kAcross, Ky, kMost>(region);
  }
}

template <typename A, bool kAcross>
void add_taps(int ky, int kx, const Region<A>& region) {
  if (region.rows <= 0 || region.columns <= 0) return;
  switch (ky) {
    case 1:
      return add_taps<A, kAcross, 1>(kx, region);
    case 2:
      return add_taps<A, kAcross, 2>(kx, region);
    case 3:
      return add_taps<A, kAcross, 3>(kx, region);
    default:
      return add_taps<A, kAcross, kMost>(kx, region);
  }
}

// Cut `size` taps into tiles of at most kMost, as even as can be: call f(first, count).
template <typename F>
void for_tiles(int64_t size, const F& f) {
  const int64_t tiles = (size + kMost - 1) / kMost;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t first = tile * size / tiles, last = (tile + 1) * size / tiles;
    f(first, static_cast<int>(last - first));
  }
}

// A lattice of output rows start, start + dilation, ... and columns begin .. end - 1 of an image.
struct Chunk {
  int64_t b, start, rows, begin, end;
};

template <typename A, bool kAcross>
class WeightGradient {
 public:
  WeightGradient(const FilterShape& shape, int64_t channels, const Image& grad)
      : shape_(shape),
        channels_(channels),
        blocks_((channels + kBlock - 1) / kBlock),
        columns_of_chunk_(kAcross ? 64 : 512),
        taps_(shape.rows * shape.columns) {
    for (int64_t b = 0; b < grad.batch; ++b)
      for (int64_t band = 0; band < grad.rows; band += kChunkRows * shape.row_dilation)
        for (int64_t column = 0; column < grad.columns; column += columns_of_chunk_)
          for (int64_t phase = 0; phase < shape.row_dilation && band + phase < grad.rows; ++phase) {
            const int64_t start = band + phase;
            const int64_t rows = (grad.rows - start + shape.row_dilation - 1) / shape.row_dilation;
            chunks_.push_back({b, start, std::min(kChunkRows, rows), column,
                               std::min(grad.columns, column + columns_of_chunk_)});
          }
  }

  template <typename T, typename G, typename W>
  void run(const Image& x, const Image& grad, W* grad_weight, W* grad_bias) {
    // Where the filters are small, a unit takes all channels of its chunks, which lie together in
    // memory; else it takes some channels, so that the totals stay small.
    const bool together = kAcross && taps_ <= 256;
    const int64_t parts = together ? 1 : blocks_;
    const int64_t chunks = static_cast<int64_t>(chunks_.size());
    const int64_t groups = std::min(chunks, (kUnits + parts - 1) / parts);
    Buffer<double> totals(groups * blocks_ * kBlock * (taps_ + 1));
    std::fill_n(totals.get(), groups * blocks_ * kBlock * (taps_ + 1), 0.0);
    parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(*this);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t group = unit / parts, part = unit % parts;
        const int64_t first = together ? 0 : part, last = together ? blocks_ : part + 1;
        for (int64_t chunk = group * chunks / groups; chunk < (group + 1) * chunks / groups;
             ++chunk)
          for (int64_t block = first; block < last; ++block)
            add_chunk<T, G>(x, grad, chunks_[chunk], block, scratch,
                            &totals[(group * blocks_ + block) * kBlock * (taps_ + 1)]);
      }
    });
    for (int64_t channel = 0; channel < channels_; ++channel) {
      const int64_t block = channel / kBlock, lane = channel % kBlock;
      for (int64_t tap = 0; tap <= taps_; ++tap) {
        double sum = 0;
        for (int64_t group = 0; group < groups; ++group)
          sum += totals[((group * blocks_ + block) * (taps_ + 1) + tap) * kBlock + lane];
        const W value = narrow<W>(static_cast<A>(sum));
        if (tap < taps_ && grad_weight != nullptr) grad_weight[channel * taps_ + tap] = value;
        if (tap == taps_ && grad_bias != nullptr) grad_bias[channel] = value;
      }
    }
  }

 private:
  static constexpr int kLane = kLanes<A>;
  static constexpr int kBlock = kAcross ? kLane : 1;     // channels in a block
  static constexpr int64_t kStep = kAcross ? kLane : 1;  // from a pixel to the next in a copy

  struct Scratch {
    Buffer<A> x, grad, sums;
    explicit Scratch(const WeightGradient& w)
        : x((kChunkRows + w.shape_.rows - 1) * w.x_copy_step()),
          grad(kChunkRows * w.columns_of_chunk_ * kStep),
          sums((w.taps_ + 1) * kLane) {}
  };

  int64_t x_copy_step() const {
    return (columns_of_chunk_ + 2 * shape_.column_padding()) * kStep + kLane;
  }

  template <typename T, typename G>
  void add_chunk(const Image& x, const Image& grad, const Chunk& chunk, int64_t block,
                 const Scratch& scratch, double* totals) {
    const int64_t channel = block * kBlock, edge = shape_.column_padding();
    const int64_t dilation = shape_.row_dilation, top = chunk.start - shape_.row_padding();
    const int64_t width = chunk.end - chunk.begin;
    const int lanes = static_cast<int>(std::min<int64_t>(kBlock, channels_ - channel));

    // The lattice rows of x that lie in the image: 0 is the first tap's of the first output row.
    const int64_t x_first = top < 0 ? (-top + dilation - 1) / dilation : 0;
    const int64_t x_last =
        std::min(chunk.rows + shape_.rows - 1, (x.rows - top + dilation - 1) / dilation);

    Region<A> whole;
    const bool full = lanes == kBlock;
    if (std::is_same_v<G, A> && full && (kAcross ? grad.channels_dense() : grad.rows_dense())) {
      whole.grad = grad.at<A>(chunk.b, channel, chunk.start, chunk.begin);
      whole.grad_row_step = grad.row_stride * dilation;
      whole.grad_step = grad.column_stride;
    } else {
      whole.grad = scratch.grad.get();
      whole.grad_row_step = columns_of_chunk_ * kStep;
      whole.grad_step = kStep;
      for (int64_t i = 0; i < chunk.rows; ++i)
        copy<G>(grad, chunk.b, channel, lanes, chunk.start + i * dilation, chunk.begin, width,
                &scratch.grad[i * whole.grad_row_step]);
    }
    if (kAcross && std::is_same_v<T, A> && full && x.channels_dense()) {
      whole.x = x.at<A>(chunk.b, channel, top, chunk.begin - edge);
      whole.x_row_step = x.row_stride * dilation;
      whole.x_step = x.column_stride;
    } else {
      whole.x = scratch.x.get();
      whole.x_row_step = x_copy_step();
      whole.x_step = kStep;
      for (int64_t i = x_first; i < x_last; ++i)
        copy<T>(x, chunk.b, channel, lanes, top + i * dilation, chunk.begin - edge,
                width + 2 * edge, &scratch.x[i * whole.x_row_step]);
    }
    whole.tap_step = shape_.column_dilation * whole.x_step;
    whole.sums_row_step = shape_.columns * kLane;
    std::fill_n(scratch.sums.get(), (taps_ + 1) * kLane, A(0));

    // Rows x_first.. of x that the taps of row ky meet.
    const auto begin_of = [&](int64_t ky) { return std::max(ky, x_first); };
    const auto end_of = [&](int64_t ky) { return std::min(ky + chunk.rows, x_last); };
    const auto rows = [&](int64_t ky, int count_y, int64_t from, int64_t to, int64_t kx,
                          int count_x, int64_t left, int64_t right) {
      Region<A> region = whole;
      region.x += from * whole.x_row_step + left * whole.x_step + kx * whole.tap_step;
      region.grad += (from - ky) * whole.grad_row_step + left * whole.grad_step;
      region.rows = to - from;
      region.columns = right - left;
      region.sums = &scratch.sums[(ky * shape_.columns + kx) * kLane];
      add_taps<A, kAcross>(count_y, count_x, region);
    };
    // All rows that a tile of taps meets: those that all its taps meet together, and the rest.
    const auto tile_rows = [&](int64_t ky, int count_y, int64_t kx, int count_x, int64_t left,
                               int64_t right) {
      if (left >= right) return;
      const int64_t from = begin_of(ky + count_y - 1), to = end_of(ky);
      if (from >= to) {
        for (int64_t k = ky; k < ky + count_y; ++k)
          rows(k, 1, begin_of(k), end_of(k), kx, count_x, left, right);
        return;
      }
      rows(ky, count_y, from, to, kx, count_x, left, right);
      for (int64_t k = ky; k < ky + count_y; ++k) {
        rows(k, 1, begin_of(k), from, kx, count_x, left, right);
        rows(k, 1, to, end_of(k), kx, count_x, left, right);
      }
    };
    // The columns of the chunk for which tap column kx lies in the image; a copy has zeros beyond.
    const auto left_of = [&](int64_t kx) {
      return kAcross ? std::max<int64_t>(0, edge - kx * shape_.column_dilation - chunk.begin) : 0;
    };
    const auto right_of = [&](int64_t kx) {
      return kAcross ? std::min(width, x.columns + edge - kx * shape_.column_dilation - chunk.begin)
                     : width;
    };
    for_tiles(shape_.rows, [&](int64_t ky, int count_y) {
      for_tiles(shape_.columns, [&](int64_t kx, int count_x) {
        const int64_t left = left_of(kx), right = right_of(kx + count_x - 1);
        if (left >= right) {
          for (int64_t k = kx; k < kx + count_x; ++k)
            tile_rows(ky, count_y, k, 1, left_of(k), right_of(k));
          return;
        }
        tile_rows(ky, count_y, kx, count_x, left, right);
        for (int64_t k = kx; k < kx + count_x; ++k) {
          tile_rows(ky, count_y, k, 1, left_of(k), left);
          tile_rows(ky, count_y, k, 1, right, right_of(k));
        }
      });
    });
    add_gradients(whole, chunk.rows, width, &scratch.sums[taps_ * kLane]);

    for (int64_t tap = 0; tap <= taps_; ++tap) {
      const A* sums = &scratch.sums[tap * kLane];
      if constexpr (kAcross) {
        for (int lane = 0; lane < kLane; ++lane) totals[tap * kLane + lane] += sums[lane];
      } else {
        totals[tap] += sum(load(sums));
      }
    }
  }

  // The bias's gradient: the sum of all gradients.
  void add_gradients(const Region<A>& region, int64_t rows, int64_t columns, A* to) const {
    Vector<A> total = load(to);
    for (int64_t row = 0; row < rows; ++row) {
      const A* grad = region.grad + row * region.grad_row_step;
      if constexpr (kAcross) {
        for (int64_t pixel = 0; pixel < columns; ++pixel)
          total += load(grad + pixel * region.grad_step);
      } else {
        int64_t column = 0;
        for (; column + kLane <= columns; column += kLane) total += load(grad + column);
        if (column < columns) total += load(grad + column, static_cast<int>(columns - column));
      }
    }
    store(to, total);
  }

  // Pixels first .. first + count - 1 of a row, widened; zeros beyond the image's edges.
  template <typename T>
  static void copy(const Image& image, int64_t b, int64_t channel, int lanes, int64_t row,
                   int64_t first, int64_t count, A* to) {
    if constexpr (kAcross) {
      copy_pixels<T>(image, b, channel, lanes, row, first, count, to, kLane);
    } else {
      copy_columns<T>(image, b, channel, row, first, count, to);
    }
  }

  FilterShape shape_;
  int64_t channels_, blocks_, columns_of_chunk_, taps_;
  std::vector<Chunk> chunks_;
};

}  // namespace

template <typename W, typename T, typename G>
void weight_gradient(const Image& x, const Image& grad, const FilterShape& shape, bool across,
                     W* grad_weight, W* grad_bias) {
  using A = Accumulator<T>;
  if (across) {
    WeightGradient<A, true>(shape, x.channels, grad)
        .template run<T, G>(x, grad, grad_weight, grad_bias);
  } else {
    WeightGradient<A, false>(shape, x.channels, grad)
        .template run<T, G>(x, grad, grad_weight, grad_bias);
  }
}

#define FF_INSTANTIATE(W, T, G)                                                                    \
  template void weight_gradient<W, T, G>(const Image&, const Image&, const FilterShape&, bool, W*, \
                                         W*)
FF_INSTANTIATE(float, float, float);
FF_INSTANTIATE(double, double, double);
FF_INSTANTIATE(Half, Half, Half);
FF_INSTANTIATE(Half, Half, float);
FF_INSTANTIATE(Half, float, float);
FF_INSTANTIATE(BFloat16, BFloat16, BFloat16);
FF_INSTANTIATE(BFloat16, BFloat16, float);
FF_INSTANTIATE(BFloat16, float, float);
#undef FF_INSTANTIATE

}  // namespace fastfusion::FF_CAPABILITY
