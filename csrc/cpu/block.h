// Products of small matrices whose entries are vectors: entry (row, column) of a Block holds
// kLanes<A> values, one for each of as many patches, or of as many pixels. The lanes never mix but
// in lane_sums, which adds them up.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "vector.h"

// Large and called with long loops inside: one copy of the code serves all calls.
#define FF_NOINLINE __attribute__((noinline))

namespace fastfusion::FF_CAPABILITY {

// A view; strides in elements.
template <typename A>
struct Block {
  A* data;
  int64_t row, column;

  FF_INLINE A* at(int64_t r, int64_t c) const { return data + r * row + c * column; }
  Block from_row(int64_t r) const { return {data + r * row, row, column}; }
  Block transposed() const { return {data, column, row}; }
};

// A matrix of vectors stored row by row.
template <typename A>
Block<A> dense_block(A* data, int64_t columns) {
  return {data, columns * kLanes<A>, kLanes<A>};
}

// Working memory of one thread, aligned for vectors, handed out piece by piece.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<A*>(std::aligned_alloc(64, round_up(count) * sizeof(A)))),
        next_(memory_.get()) {
    if (memory_ == nullptr) throw std::bad_alloc();
  }
  // What `count` elements take of it.
  static int64_t round_up(int64_t count) {
    constexpr int64_t step = 64 / sizeof(A);
    return (count + step - 1) / step * step;
  }
  A* take(int64_t count) {
    A* piece = next_;
    next_ += round_up(count);
    return piece;
  }

 private:
  struct Free {
    void operator()(A* memory) const { std::free(memory); }
  };
  std::unique_ptr<A[], Free> memory_;
  A* next_;
};

// -- a matrix of numbers times a block ------------------------------------------------------------

// Rows of a matrix that are multiplied together, and columns of the block: as many accumulators as
// the registers hold beside the operands (24 of 32 with AVX-512, 12 of 16 elsewhere).
#if defined(__AVX512F__)
constexpr int kPanel = 8;
#else
constexpr int kPanel = 4;
#endif
constexpr int kPanelColumns = 3;

// A matrix (rows, depth) and a bias (rows), packed into panels of kPanel rows, padded with zeros:
// the bias of the panel, then column by column.
template <typename A>
struct Panels {
  const A* data;
  int rows, depth;

  static int64_t size(int64_t rows, int64_t depth) {
    return (rows + kPanel - 1) / kPanel * (depth + 1) * kPanel;
  }
};

// Pack weight(row, k) and bias(row).
template <typename A, typename Weight, typename Bias>
Panels<A> pack(A* to, int rows, int depth, const Weight& weight, const Bias& bias) {
  A* next = to;
  for (int first = 0; first < rows; first += kPanel) {
    for (int i = 0; i < kPanel; ++i) *next++ = first + i < rows ? bias(first + i) : A(0);
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < kPanel; ++i) *next++ = first + i < rows ? weight(first + i, k) : A(0);
  }
  return {to, rows, depth};
}

template <int Columns, bool Add, typename A>
FF_INLINE void project_tile(const A* panel, int depth, int valid, Block<A> in, Block<A> out) {
  using V = Vector<A>;
  V sum[kPanel][Columns];
  unroll<kPanel>([&](auto i) {
    unroll<Columns>([&](auto j) {
      sum[i][j] = broadcast(panel[i]);
      if (Add && i < valid) sum[i][j] += load(out.at(i, j));
    });
  });
  const A* weight = panel + kPanel;
  const A* column = in.data;
  for (int k = 0; k < depth; ++k, weight += kPanel, column += in.row) {
    V x[Columns];
    unroll<Columns>([&](auto j) { x[j] = load(column + j * in.column); });
    unroll<kPanel>([&](auto i) {
      const V w = broadcast(weight[i]);
      unroll<Columns>([&](auto j) { sum[i][j] = fma(w, x[j], sum[i][j]); });
    });
  }
  unroll<kPanel>([&](auto i) {
    if (i < valid) unroll<Columns>([&](auto j) { store(out.at(i, j), sum[i][j]); });
  });
}

// out(row, column) = bias[row] + sum_k matrix[row][k] in(k, column); added to `out` where Add.
template <bool Add = false, typename A>
FF_NOINLINE void project(const Panels<A>& matrix, Block<A> in, int columns, Block<A> out) {
  const int64_t panel_size = int64_t{matrix.depth + 1} * kPanel;
  const auto tile = [&](auto width, int column) {
    const A* panel = matrix.data;
    for (int row = 0; row < matrix.rows; row += kPanel, panel += panel_size)
      project_tile<width, Add>(panel, matrix.depth, matrix.rows - row,
                               Block<A>{in.at(0, column), in.row, in.column},
                               Block<A>{out.at(row, column), out.row, out.column});
  };
  int column = 0;
  for (; column + kPanelColumns <= columns; column += kPanelColumns)
    tile(std::integral_constant<int, kPanelColumns>(), column);
  if (columns - column == 2) tile(std::integral_constant<int, 2>(), column);
  if (columns - column == 1) tile(std::integral_constant<int, 1>(), column);
}

// -- a block times a block ------------------------------------------------------------------------

constexpr int kTile = 4;

// sum[i][j] += sum_k a(i, k) b(j, k)
template <int Rows, int Columns, typename A>
FF_INLINE void multiply_tile(Block<A> a, Block<A> b, int depth, Vector<A> (&sum)[Rows][Columns]) {
  const A *left = a.data, *right = b.data;
  for (int k = 0; k < depth; ++k, left += a.column, right += b.column) {
    Vector<A> y[Columns];
    unroll<Columns>([&](auto j) { y[j] = load(right + j * b.row); });
    unroll<Rows>([&](auto i) {
      const Vector<A> x = load(left + i * a.row);
      unroll<Columns>([&](auto j) { sum[i][j] = fma(x, y[j], sum[i][j]); });
    });
  }
}

// Call f(row, column, constant rows, constant columns) on tiles that make up a matrix.
template <typename F>
FF_INLINE void for_tiles(int rows, int columns, const F& f) {
  using Full = std::integral_constant<int, kTile>;
  using One = std::integral_constant<int, 1>;
  int row = 0;
  for (; row + kTile <= rows; row += kTile) {
    int column = 0;
    for (; column + kTile <= columns; column += kTile) f(row, column, Full(), Full());
    for (; column < columns; ++column) f(row, column, Full(), One());
  }
  for (; row < rows; ++row) {
    int column = 0;
    for (; column + kTile <= columns; column += kTile) f(row, column, One(), Full());
    for (; column < columns; ++column) f(row, column, One(), One());
  }
}

// out(i, j) = start(i, j) + sum_k a(i, k) b(j, k), lane by lane; without `start`, from zero.
template <typename A>
FF_NOINLINE void multiply(Block<A> a, Block<A> b, int rows, int columns, int depth, Block<A> out,
                          const Block<A>* start = nullptr) {
  for_tiles(rows, columns, [&](int row, int column, auto height, auto width) {
    Vector<A> sum[height][width];
    unroll<height>([&](auto i) {
      unroll<width>([&](auto j) {
        sum[i][j] = start ? load(start->at(row + i, column + j)) : broadcast(A(0));
      });
    });
    multiply_tile(a.from_row(row), b.from_row(column), depth, sum);
    unroll<height>([&](auto i) {
      unroll<width>([&](auto j) { store(out.at(row + i, column + j), sum[i][j]); });
    });
  });
}

// The sums of the lanes of each of kLanes vectors, as one vector.
template <int Count, typename A>
FF_INLINE Vector<A> lane_sums(const Vector<A>* v) {
  if constexpr (Count == 1) {
    return v[0];
  } else {
    // Each half holds sums over blocks of lanes; the blocks double in number as vectors join.
    constexpr int lanes = kLanes<A>, half = Count / 2, step = lanes / Count;
    const Vector<A> a = lane_sums<half, A>(v), b = lane_sums<half, A>(v + half);
    // a: value i (of `half`) in lanes i * 2 * step ...; take the even and odd runs of `step`.
    typedef decltype(a > b) Index;
    Index low, high;
    for (int lane = 0; lane < lanes; ++lane) {
      const int value = lane / step, within = lane % step, source = value % half;
      low[lane] = source * 2 * step + within + (value >= half ? lanes : 0);
      high[lane] = low[lane] + step;
    }
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
  }
}

// out[i * stride + j] += sum over k and the lanes of a(i, k) b(j, k)
template <typename A>
FF_NOINLINE void multiply_lanes(Block<A> a, Block<A> b, int rows, int columns, int depth, A* out,
                                int64_t stride) {
  constexpr int lanes = kLanes<A>;
  for_tiles(rows, columns, [&](int row, int column, auto height, auto width) {
    constexpr int count = height * width, padded = (count + lanes - 1) / lanes * lanes;
    Vector<A> sum[height][width] = {};
    multiply_tile(a.from_row(row), b.from_row(column), depth, sum);
    Vector<A> flat[padded] = {};
    unroll<count>([&](auto n) { flat[n] = sum[n / width][n % width]; });
    A total[padded];
    unroll<padded / lanes>(
        [&](auto n) { store(total + n * lanes, lane_sums<lanes, A>(flat + n * lanes)); });
    for (int i = 0; i < height; ++i)
      for (int j = 0; j < width; ++j) out[(row + i) * stride + column + j] += total[i * width + j];
  });
}

// -- transposition --------------------------------------------------------------------------------

// v[i][j] <-> v[j][i] of kLanes vectors.
template <typename A>
FF_INLINE void transpose(Vector<A> (&v)[kLanes<A>]) {
  constexpr int lanes = kLanes<A>;
  typedef decltype(v[0] > v[0]) Index;
  constexpr int stages = lanes == 16 ? 4 : lanes == 8 ? 3 : lanes == 4 ? 2 : 1;
  unroll<stages>([&](auto stage) {
    constexpr int step = 1 << stage;
    Index low, high;
    for (int lane = 0; lane < lanes; ++lane) {
      low[lane] = lane & step ? lanes + lane - step : lane;
      high[lane] = lane & step ? lanes + lane : lane + step;
    }
    unroll<lanes>([&](auto i) {
      if constexpr ((i & step) == 0) {
        const Vector<A> a = v[i], b = v[i + step];
        v[i] = __builtin_shuffle(a, b, low);
        v[i + step] = __builtin_shuffle(a, b, high);
      }
    });
  });
}

}  // namespace fastfusion::FF_CAPABILITY
