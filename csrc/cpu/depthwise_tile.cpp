#include "depthwise_tile.h"

#include <algorithm>

#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// One tile: its sums start from the bias.
template <typename X, typename Y>
struct Tile {
  using A = Accumulator<X>;
  const X* const* input;  // rows, as in Piece
  int64_t columns;        // of this tile and those after it in its rows
  int64_t offset;         // of the tile's first column in them
  const A* weight;
  const A* bias;
  int64_t kernel_rows, kernel_columns;
  int64_t tap_step;  // from a tap column to the next, in the input
  // From a vector to the next; along the columns they lie side by side.
  int64_t input_vector_step, output_vector_step;
  Y* output;
  int64_t output_row_step;
  const char* ahead;  // what is fetched ahead, in bytes
  int64_t ahead_row_step, ahead_vector_step;
  // How many lanes of the output's vectors are real: of all of them across the channels, of the
  // last along the columns.
  int lanes;
  bool stream;  // as in Piece

  template <bool kAcross>
  int64_t input_step() const {
    return kAcross ? input_vector_step : kLanes<A>;
  }
  template <bool kAcross>
  int64_t output_step() const {
    return kAcross ? output_vector_step : kLanes<A>;
  }
};

// Add the taps of one input row to the output rows First to Last - 1, for which it is the filter's
// row (input row - output row).
template <bool kAcross, int First, int Last, int K, typename X, typename Y, int R, int V>
FF_INLINE void add_row(Vector<Accumulator<X>> (&sums)[R][V], const Tile<X, Y>& tile, int64_t row) {
  using A = Accumulator<X>;
  constexpr int kStep = kAcross ? kLanes<A> : 1;
  constexpr bool kKnown = K > 0 && !kAcross;  // unrolled code pays along the columns only
  const X* x = tile.input[row];
  if (x == nullptr) return;
  x += tile.offset;
  const A* w = tile.weight + row * kStep;
  const int64_t columns = kKnown ? K : tile.kernel_columns, step = kKnown ? K : tile.kernel_rows;
  for (int64_t tap = 0; tap < columns; ++tap) {
    Vector<A> values[V];
    unroll<V>([&](auto v) FF_INLINED {
      values[v] = load(x + v * tile.template input_step<kAcross>());
      if constexpr (Last - First > 1) pin(values[v]);
    });
    unroll<Last - First>([&](auto i) FF_INLINED {
      constexpr int r = First + i;
      Vector<A> weight;
      if constexpr (kAcross) {
        weight = load(w - r * kStep);
      } else {
        weight = broadcast(w[-r]);
      }
      unroll<V>([&](auto v) FF_INLINED { sums[r][v] = fma(values[v], weight, sums[r][v]); });
    });
    x += tile.tap_step;
    w += step * kStep;
  }
}

// How many pixels ahead the input is fetched.
constexpr int kAhead = 6;

// A small filter is done before memory answers, so ask early: for the lines that the next tile will
// write and, across the channels (where no hardware guesses the pattern), for pixels of the rows
// that this lattice is the first to read. One row at a time, between the sums: all at once would
// fill the queue of misses and wait.
template <bool kAcross, int V, typename X, typename Y>
FF_INLINE void fetch_row(const Tile<X, Y>& tile, int64_t r) {
  const int64_t input_step = tile.template input_step<kAcross>();
  const int64_t output_step = tile.template output_step<kAcross>();
  if (!tile.stream) {
    const Y* row = tile.output + r * tile.output_row_step + V * output_step;
    unroll<V>([&](auto v) FF_INLINED { __builtin_prefetch(row + v * output_step, 1); });
  }
  if constexpr (kAcross) {
    const X* row = tile.input[tile.kernel_rows - 1 + r] + tile.offset + kAhead * input_step;
    unroll<V>([&](auto v) FF_INLINED { __builtin_prefetch(row + v * input_step); });
  } else {
    const char* row = tile.ahead + r * tile.ahead_row_step;
    unroll<V>([&](auto v) FF_INLINED { __builtin_prefetch(row + v * kVectorBytes); });
  }
}

// The filter is K x K or, where K is 0, has at least R rows.
template <typename X, typename Y, bool kAcross, int R, int V, int K>
void run(const Tile<X, Y> tile) {
  using A = Accumulator<X>;
  Vector<A> sums[R][V];
  const Vector<A> bias = kAcross ? load(tile.bias) : broadcast(*tile.bias);
  unroll<R>([&](auto r) FF_INLINED { unroll<V>([&](auto v) FF_INLINED { sums[r][v] = bias; }); });

  if constexpr (K > 0) {
    unroll<R + K - 1>([&](auto i) FF_INLINED {
      if constexpr (i < R) fetch_row<kAcross, V>(tile, i);
      add_row<kAcross, std::max(0, i - K + 1), std::min(R, i + 1), K>(sums, tile, i);
    });
  } else {
    unroll<R - 1>([&](auto i) FF_INLINED {
      fetch_row<kAcross, V>(tile, i);
      add_row<kAcross, 0, i + 1, K>(sums, tile, i);
    });
    fetch_row<kAcross, V>(tile, R - 1);
    for (int64_t row = R - 1; row < tile.kernel_rows; ++row)
      add_row<kAcross, 0, R, K>(sums, tile, row);
    unroll<R - 1>([&](auto i) FF_INLINED {
      add_row<kAcross, i + 1, R, K>(sums, tile, tile.kernel_rows + i);
    });
  }

  const int64_t output_step = tile.template output_step<kAcross>();
  enum { kPart, kWhole, kStream };
  const auto store_all = [&](auto how) FF_INLINED {
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED {
        Y* to = tile.output + r * tile.output_row_step + v * output_step;
        if constexpr (how == kStream) {
          stream(to, sums[r][v]);
        } else if constexpr (how == kWhole || (!kAcross && v < V - 1)) {
          store(to, sums[r][v]);
        } else {
          store(to, sums[r][v], tile.lanes);
        }
      });
    });
  };
  if (tile.lanes < kLanes<A>) {
    store_all(std::integral_constant<int, kPart>());
  } else if (std::is_same_v<Y, A> && tile.stream) {
    store_all(std::integral_constant<int, std::is_same_v<Y, A> ? kStream : kWhole>());
  } else {
    store_all(std::integral_constant<int, kWhole>());
  }
}

// Code for all cases would take half of the time of the build, so there is less of it for machines
// of before 2013, which have nothing but plain x86-64's instructions.
#if defined(__x86_64__) && !defined(__AVX2__)
constexpr bool kOldMachine = true;
#else
constexpr bool kOldMachine = false;
#endif
// Whether what does not fill a tile gets tiles of several smaller sizes: for float alone.
template <typename X>
constexpr bool kSmallTiles = std::is_same_v<X, float> && !kOldMachine;
// Whether filters of 3x3 and 5x5 have code of their own: not for double.
template <typename X>
constexpr bool kSmallFilters = !std::is_same_v<X, double> && !kOldMachine;

template <typename X, typename Y, bool kAcross, int R, int K>
void run_rows(Tile<X, Y> tile, const Piece<X, Y>& piece) {
  using A = Accumulator<X>;
  constexpr int kAlong = kAcross ? 1 : kLanes<A>;  // columns in a vector
  int64_t left = tile.columns;
  const auto advance = [&](auto v) FF_INLINED {
    constexpr int V = v;
    if constexpr (kAcross) {
      Tile<X, Y> block = tile;
      for (int64_t done = 0; done < piece.channels; done += kLanes<A>) {
        block.lanes = static_cast<int>(std::min<int64_t>(piece.channels - done, kLanes<A>));
        run<X, Y, kAcross, R, V, K>(block);
        block.offset += kLanes<A>;
        block.output += kLanes<A>;
        block.bias += kLanes<A>;
        block.weight += tile.kernel_rows * tile.kernel_columns * kLanes<A>;
      }
    } else {
      tile.lanes = static_cast<int>(std::min<int64_t>(left - (V - 1) * kAlong, kAlong));
      run<X, Y, kAcross, R, V, K>(tile);
      tile.ahead += V * tile.ahead_vector_step;
    }
    tile.offset += V * tile.template input_step<kAcross>();
    tile.output += V * tile.template output_step<kAcross>();
    left -= V * kAlong;
  };
  while (left > (kTileVectors - 1) * kAlong) advance(std::integral_constant<int, kTileVectors>());
  if constexpr (kTileVectors > 2 && kSmallTiles<X>) {
    while (left > kAlong) advance(std::integral_constant<int, 2>());
  }
  while (left > 0) advance(std::integral_constant<int, 1>());
}

// How many rows of `left` are done together.
template <typename X, typename Y, bool kAcross, int K>
int run_most_rows(const Tile<X, Y>& tile, const Piece<X, Y>& piece, int64_t left) {
  if (K == 0) left = std::min(left, tile.kernel_rows);
  if (left >= kTileRows) return run_rows<X, Y, kAcross, kTileRows, K>(tile, piece), kTileRows;
  if constexpr (kSmallTiles<X>) {
    if (left >= 4) return run_rows<X, Y, kAcross, 4, K>(tile, piece), 4;
    if (left >= 2) return run_rows<X, Y, kAcross, 2, K>(tile, piece), 2;
  }
  return run_rows<X, Y, kAcross, 1, K>(tile, piece), 1;
}

// The columns first, first + step, ... of a piece.
template <typename X, typename Y, bool kAcross>
void convolve_columns(const Filter<Accumulator<X>>& filter, int64_t channel,
                      const Piece<X, Y>& piece, int64_t first, int64_t step) {
  using A = Accumulator<X>;
  const int64_t along = kAcross ? step : kLanes<A>;  // columns from a vector to the next
  Tile<X, Y> tile;
  tile.input = piece.input;
  tile.columns = (piece.columns - first + step - 1) / step;
  tile.offset = first * piece.input_step;
  tile.weight = filter.weight_of(channel);
  tile.bias = filter.bias_of(channel);
  tile.kernel_rows = filter.shape.rows;
  tile.kernel_columns = filter.shape.columns;
  tile.tap_step = filter.shape.column_dilation * piece.input_step;
  tile.input_vector_step = piece.input_step * along;
  tile.output = piece.output + first * piece.output_step;
  tile.output_row_step = piece.output_row_step;
  tile.output_vector_step = piece.output_step * along;
  tile.ahead = static_cast<const char*>(piece.ahead);
  tile.ahead_row_step = piece.ahead_row_step;
  tile.ahead_vector_step = piece.ahead_step * along;
  tile.stream = piece.stream;
  for (int64_t left = piece.count, taken; left > 0; left -= taken) {
    const auto& shape = filter.shape;
    const int64_t size = kSmallFilters<X> && shape.rows == shape.columns ? shape.rows : 0;
    if constexpr (kSmallFilters<X>) {
      if (size == 3) taken = run_most_rows<X, Y, kAcross, 3>(tile, piece, left);
      if (size == 5) taken = run_most_rows<X, Y, kAcross, 5>(tile, piece, left);
    }
    if (size != 3 && size != 5) taken = run_most_rows<X, Y, kAcross, 0>(tile, piece, left);
    tile.input += taken;
    tile.output += taken * tile.output_row_step;
  }
}

}  // namespace

template <typename X, typename Y>
void convolve(const Filter<Accumulator<X>>& filter, int64_t channel, const Piece<X, Y>& piece) {
  using A = Accumulator<X>;
  if constexpr (std::is_same_v<X, A>)
    if (!filter.across) return convolve_columns<X, Y, false>(filter, channel, piece, 0, 1);
  // Where the pixels that a tile reads are too many for the first-level cache, the lattices of
  // columns go one after another: then its taps fall on the same pixels.
  int64_t dilation = filter.shape.column_dilation;
  const int64_t pixels =
      (filter.shape.rows + kTileRows - 1) * (kTileVectors + (filter.shape.columns - 1) * dilation);
  if (pixels * round_up(piece.channels, kLanes<A>) * static_cast<int64_t>(sizeof(X)) <= 24 << 10)
    dilation = 1;
  for (int64_t first = 0; first < std::min(dilation, piece.columns); ++first)
    convolve_columns<X, Y, true>(filter, channel, piece, first, dilation);
}

#define FF_INSTANTIATE(X, Y) \
  template void convolve(const Filter<Accumulator<X>>&, int64_t, const Piece<X, Y>&)
FF_INSTANTIATE(float, float);
FF_INSTANTIATE(double, double);
FF_INSTANTIATE(Half, Half);
FF_INSTANTIATE(Half, float);
FF_INSTANTIATE(BFloat16, BFloat16);
FF_INSTANTIATE(BFloat16, float);
#undef FF_INSTANTIATE

}  // namespace fastfusion::FF_CAPABILITY
