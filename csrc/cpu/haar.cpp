// Haar transforms on the CPU.
#include "haar.h"

#include <algorithm>

#include "parallel.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// low = mean of the 2x2 block (an odd edge is repeated), high = x - low.
template <typename T>
void split(const Image& x, const Image& low, const Image& high) {
  parallel_for(0, x.batch * x.channels, 1, [&](int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / x.channels, c = plane % x.channels;
      for (int64_t row = 0; row < x.rows; ++row) {
        const int64_t above = row & ~int64_t{1}, below = std::min(above + 1, x.rows - 1);
        for (int64_t column = 0; column < x.columns; ++column) {
          const int64_t left = column & ~int64_t{1}, right = std::min(left + 1, x.columns - 1);
          const auto ll = (widen(*x.at<T>(b, c, above, left)) + widen(*x.at<T>(b, c, above, right)) +
                           widen(*x.at<T>(b, c, below, left)) + widen(*x.at<T>(b, c, below, right))) /
                          2;
          *low.at<T>(b, c, row, column) = narrow<T>(ll / 2);
          *high.at<T>(b, c, row, column) = narrow<T>(widen(*x.at<T>(b, c, row, column)) - ll / 2);
        }
      }
    }
  });
}

// The split is symmetric but for the repeated edge: an entry that stands for two or four of its
// block takes that share of the block's gradient.
template <typename T>
void split_backward(const Image& grad_low, const Image& grad_high, const Image& grad_x) {
  using A = Accumulator<T>;
  const Image& g = grad_x;
  parallel_for(0, g.batch * g.channels, 1, [&](int64_t first, int64_t last) {
    for (int64_t plane = first; plane < last; ++plane) {
      const int64_t b = plane / g.channels, c = plane % g.channels;
      for (int64_t row = 0; row < g.rows; ++row) {
        const int64_t above = row & ~int64_t{1}, rows = std::min<int64_t>(2, g.rows - above);
        for (int64_t column = 0; column < g.columns; ++column) {
          const int64_t left = column & ~int64_t{1};
          const int64_t columns = std::min<int64_t>(2, g.columns - left);
          A sum = 0;
          for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < columns; ++j)
              sum += widen(*grad_low.at<T>(b, c, above + i, left + j)) -
                     widen(*grad_high.at<T>(b, c, above + i, left + j));
          const A share = sum / static_cast<A>(rows * columns);
          *g.at<T>(b, c, row, column) =
              narrow<T>(widen(*grad_high.at<T>(b, c, row, column)) + share);
        }
      }
    }
  });
}

}  // namespace

void haar_split2d(Type type, const Image& x, const Image& low, const Image& high) {
  with_type(type, [&](auto zero) { split<decltype(zero)>(x, low, high); });
}

void haar_split2d_backward(Type type, const Image& grad_low, const Image& grad_high,
                           const Image& grad_x) {
  with_type(type,
            [&](auto zero) { split_backward<decltype(zero)>(grad_low, grad_high, grad_x); });
}

}  // namespace fastfusion::FF_CAPABILITY
