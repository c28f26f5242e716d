#include "depthwise_tile.h"

#include <algorithm>

namespace fastfusion::FF_CAPABILITY {
namespace {

// Sums in registers: 16 or 24 of AVX-512's 32, 8 of the 16 that the others have.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4, kVectors = 4;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// One tile: its sums start from the bias.
template <typename A>
struct Tile {
  const A* const* input;  // rows, as in Piece
  int64_t offset;         // of the tile's first column in them
  const A* weight;
  const A* bias;
  int64_t kernel_rows, kernel_columns;
  int64_t tap_step;     // from a tap column to the next, in the input
  int64_t vector_step;  // from a vector to the next, in the input
  A* output;
  int64_t output_row_step, output_vector_step;
  int lanes, last_lanes;  // valid in each vector of the output, and in the last of a row
};

// Add the taps of one input row to the output rows First to Last - 1, for which it is the filter's
// row (input row - output row).
template <bool kAcross, int First, int Last, typename A, int R, int V>
FF_INLINE void add_row(Vector<A> (&sums)[R][V], const Tile<A>& tile, int64_t row) {
  constexpr int kStep = kAcross ? kLanes<A> : 1;
  const A* x = tile.input[row];
  if (x == nullptr) return;
  x += tile.offset;
  const A* w = tile.weight + row * kStep;
  for (int64_t tap = 0; tap < tile.kernel_columns; ++tap) {
    Vector<A> values[V];
    unroll<V>([&](auto v) { values[v] = load(x + v * tile.vector_step); });
    unroll<Last - First>([&](auto i) {
      constexpr int r = First + i;
      Vector<A> weight;
      if constexpr (kAcross) {
        weight = load(w - r * kStep);
      } else {
        weight = broadcast(w[-r]);
      }
      unroll<V>([&](auto v) { sums[r][v] = fma(values[v], weight, sums[r][v]); });
    });
    x += tile.tap_step;
    w += tile.kernel_rows * kStep;
  }
}

// R must not exceed the filter's rows.
template <typename A, bool kAcross, int R, int V>
void run(const Tile<A>& tile) {
  Vector<A> sums[R][V];
  const Vector<A> bias = kAcross ? load(tile.bias) : broadcast(*tile.bias);
  unroll<R>([&](auto r) { unroll<V>([&](auto v) { sums[r][v] = bias; }); });

  unroll<R - 1>([&](auto i) { add_row<kAcross, 0, i + 1>(sums, tile, i); });
  for (int64_t row = R - 1; row < tile.kernel_rows; ++row) add_row<kAcross, 0, R>(sums, tile, row);
  unroll<R - 1>([&](auto i) { add_row<kAcross, i + 1, R>(sums, tile, tile.kernel_rows + i); });

  const bool whole = tile.lanes == kLanes<A> && tile.last_lanes == kLanes<A>;
  unroll<R>([&](auto r) {
    unroll<V>([&](auto v) {
      A* to = tile.output + r * tile.output_row_step + v * tile.output_vector_step;
      if (whole) {
        store(to, sums[r][v]);
      } else {
        store(to, sums[r][v], v == V - 1 ? tile.last_lanes : tile.lanes);
      }
    });
  });
}

template <typename A, bool kAcross, int R>
void run_rows(Tile<A> tile, const Piece<A>& piece) {
  constexpr int kAlong = kAcross ? 1 : kLanes<A>;  // columns in a vector
  int64_t left = piece.columns;
  const auto advance = [&](auto v) {
    constexpr int V = v;
    if constexpr (!kAcross) {
      tile.last_lanes = static_cast<int>(std::min<int64_t>(left - (V - 1) * kAlong, kAlong));
    }
    run<A, kAcross, R, V>(tile);
    tile.offset += V * tile.vector_step;
    tile.output += V * tile.output_vector_step;
    left -= V * kAlong;
  };
  while (left > (kVectors - 1) * kAlong) advance(std::integral_constant<int, kVectors>());
  if constexpr (kVectors > 2) {
    while (left > kAlong) advance(std::integral_constant<int, 2>());
  }
  while (left > 0) advance(std::integral_constant<int, 1>());
}

template <typename A, bool kAcross>
void convolve_piece(const Filter<A>& filter, int64_t channel, const Piece<A>& piece) {
  constexpr int kAlong = kAcross ? 1 : kLanes<A>;
  Tile<A> tile;
  tile.input = piece.input;
  tile.offset = 0;
  tile.weight = filter.weight_of(channel);
  tile.bias = filter.bias_of(channel);
  tile.kernel_rows = filter.shape.rows;
  tile.kernel_columns = filter.shape.columns;
  tile.tap_step = filter.shape.column_dilation * piece.input_step;
  tile.vector_step = piece.input_step * kAlong;
  tile.output = piece.output;
  tile.output_row_step = piece.output_row_step;
  tile.output_vector_step = piece.output_step * kAlong;
  tile.lanes = tile.last_lanes = kAcross ? piece.lanes : kLanes<A>;
  int64_t left = piece.count;
  while (left > 0) {
    const int64_t rows = std::min(left, filter.shape.rows);
    int64_t taken;
    if (rows >= kRows) {
      run_rows<A, kAcross, kRows>(tile, piece);
      taken = kRows;
    } else if (rows == 3) {
      run_rows<A, kAcross, 3>(tile, piece);
      taken = 3;
    } else if (rows == 2) {
      run_rows<A, kAcross, 2>(tile, piece);
      taken = 2;
    } else {
      run_rows<A, kAcross, 1>(tile, piece);
      taken = 1;
    }
    left -= taken;
    tile.input += taken;
    tile.output += taken * tile.output_row_step;
  }
}

}  // namespace

template <typename A>
void convolve(const Filter<A>& filter, int64_t channel, const Piece<A>& piece) {
  if (filter.across) {
    convolve_piece<A, true>(filter, channel, piece);
  } else {
    convolve_piece<A, false>(filter, channel, piece);
  }
}

template void convolve(const Filter<float>&, int64_t, const Piece<float>&);
template void convolve(const Filter<double>&, int64_t, const Piece<double>&);

}  // namespace fastfusion::FF_CAPABILITY
