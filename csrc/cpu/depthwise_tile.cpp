#include "depthwise_tile.h"

#include <algorithm>

namespace fastfusion::FF_CAPABILITY {
namespace {

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
  const char* ahead;  // what is fetched ahead, in bytes
  int64_t ahead_row_step, ahead_vector_step;
  // How many lanes of the output's vectors are real: of all of them across the channels, of the
  // last along the columns.
  int lanes;
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
    unroll<V>([&](auto v) FF_INLINED {
      values[v] = load(x + v * tile.vector_step);
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
    w += tile.kernel_rows * kStep;
  }
}

// How many pixels ahead the input is fetched.
constexpr int kAhead = 6;

// R must not exceed the filter's rows.
template <typename A, bool kAcross, int R, int V>
void run(const Tile<A>& tile) {
  // A small filter is done before memory answers, so ask early: for the lines that the next tile
  // will write and, across the channels (where no hardware guesses the pattern), for pixels of the
  // rows that this lattice is the first to read.
  unroll<R>([&](auto r) FF_INLINED {
    unroll<V>([&](auto v) FF_INLINED {
      __builtin_prefetch(tile.output + r * tile.output_row_step + (V + v) * tile.output_vector_step,
                         1);
      if constexpr (kAcross) {
        const A* row = tile.input[tile.kernel_rows - 1 + r];
        __builtin_prefetch(row + tile.offset + (kAhead + v) * tile.vector_step);
      } else {
        __builtin_prefetch(tile.ahead + r * tile.ahead_row_step + v * tile.ahead_vector_step);
      }
    });
  });
  Vector<A> sums[R][V];
  const Vector<A> bias = kAcross ? load(tile.bias) : broadcast(*tile.bias);
  unroll<R>([&](auto r) FF_INLINED { unroll<V>([&](auto v) FF_INLINED { sums[r][v] = bias; }); });

  unroll<R - 1>([&](auto i) FF_INLINED { add_row<kAcross, 0, i + 1>(sums, tile, i); });
  for (int64_t row = R - 1; row < tile.kernel_rows; ++row) add_row<kAcross, 0, R>(sums, tile, row);
  unroll<R - 1>([&](auto i)
                    FF_INLINED { add_row<kAcross, i + 1, R>(sums, tile, tile.kernel_rows + i); });

  const auto store_all = [&](auto whole) FF_INLINED {
    unroll<R>([&](auto r) FF_INLINED {
      unroll<V>([&](auto v) FF_INLINED {
        A* to = tile.output + r * tile.output_row_step + v * tile.output_vector_step;
        if constexpr (whole || (!kAcross && v < V - 1)) {
          store(to, sums[r][v]);
        } else {
          store(to, sums[r][v], tile.lanes);
        }
      });
    });
  };
  if (tile.lanes == kLanes<A>) {
    store_all(std::true_type());
  } else {
    store_all(std::false_type());
  }
}

template <typename A, bool kAcross, int R>
void run_rows(Tile<A> tile, const Piece<A>& piece) {
  constexpr int kAlong = kAcross ? 1 : kLanes<A>;  // columns in a vector
  int64_t left = piece.columns;
  const auto advance = [&](auto v) FF_INLINED {
    constexpr int V = v;
    if constexpr (kAcross) {
      Tile<A> block = tile;
      for (int64_t done = 0; done < piece.channels; done += kLanes<A>) {
        block.lanes = static_cast<int>(std::min<int64_t>(piece.channels - done, kLanes<A>));
        run<A, kAcross, R, V>(block);
        block.offset += kLanes<A>;
        block.output += kLanes<A>;
        block.bias += kLanes<A>;
        block.weight += tile.kernel_rows * tile.kernel_columns * kLanes<A>;
      }
    } else {
      tile.lanes = static_cast<int>(std::min<int64_t>(left - (V - 1) * kAlong, kAlong));
      run<A, kAcross, R, V>(tile);
      tile.ahead += V * tile.ahead_vector_step;
    }
    tile.offset += V * tile.vector_step;
    tile.output += V * tile.output_vector_step;
    left -= V * kAlong;
  };
  while (left > (kTileVectors - 1) * kAlong) advance(std::integral_constant<int, kTileVectors>());
  if constexpr (kTileVectors > 2) {
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
  tile.ahead = static_cast<const char*>(piece.ahead);
  tile.ahead_row_step = piece.ahead_row_step;
  tile.ahead_vector_step = piece.ahead_step * kAlong;
  int64_t left = piece.count;
  while (left > 0) {
    const int64_t rows = std::min(left, filter.shape.rows);
    int64_t taken;
    if (rows >= kTileRows) {
      run_rows<A, kAcross, kTileRows>(tile, piece);
      taken = kTileRows;
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
