// The local map on the CPU: y = c_0 + sum_i c_i (guide_i + sharpness detail_i), the coefficients c
// interpolated linearly between the places where they are given.
//
// The tile is a row of the image, of all target bands: the guides' rows stay in the first-level
// cache meanwhile. A coefficient is interpolated between its two rows at low resolution, which is
// little work, and along that line where it is used. Read: the coefficients and the guides once
// (and the former `scale` times from the caches); written: y once.
#include "local_map.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "stream.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Between which two samples each pixel of an axis lies, and how near to the second.
template <typename A>
struct Axis {
  std::vector<int32_t> before;
  std::vector<A> near, far;  // the weights of the one before and of the one behind

  Axis(int64_t size, int64_t samples, int64_t scale, double first)
      : before(size), near(size), far(size) {
    for (int64_t i = 0; i < size; ++i) {
      const double position = (static_cast<double>(i) - first) / static_cast<double>(scale);
      const double last = static_cast<double>(std::max<int64_t>(samples - 2, 0));
      const double cell = std::clamp(std::floor(position), 0.0, last);
      before[i] = static_cast<int32_t>(cell);
      near[i] = static_cast<A>(1 - (position - cell));
      far[i] = static_cast<A>(position - cell);
    }
  }
};

template <typename A>
void apply(const LocalMapShape& s, const A* coefficients, const A* guides, const A* detail,
           const A* sharpness, A* y) {
  const int64_t low = s.low_rows * s.low_columns, size = s.rows * s.columns;
  const Axis<A> rows(s.rows, s.low_rows, s.scale, s.first_row);
  const Axis<A> columns(s.columns, s.low_columns, s.scale, s.first_column);
  const int32_t* before = columns.before.data();
  const A *near = columns.near.data(), *far = columns.far.data();
  const bool streaming = should_stream<A>(s.batch * s.targets * size);
  parallel_for(0, s.batch * s.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<A> line(s.low_columns + 1), sum(s.columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / s.rows, row = task % s.rows;
      const int64_t above = rows.before[row], below = std::min(above + 1, s.low_rows - 1);
      for (int64_t target = 0; target < s.targets; ++target) {
        const A* from = coefficients + (b * s.targets + target) * (1 + s.guides) * low;
        for (int64_t term = 0; term <= s.guides; ++term, from += low) {
          const A *p = from + above * s.low_columns, *q = from + below * s.low_columns;
          for (int64_t i = 0; i < s.low_columns; ++i)
            line[i] = p[i] * rows.near[row] + q[i] * rows.far[row];
          line[s.low_columns] = line[s.low_columns - 1];
          const A* at = line.data();
          if (term == 0) {
            for (int64_t i = 0; i < s.columns; ++i)
              sum[i] = at[before[i]] * near[i] + at[before[i] + 1] * far[i];
            continue;
          }
          const int64_t place = (b * s.guides + term - 1) * size + row * s.columns;
          const A* guide = guides + place;
          if (detail == nullptr) {
            for (int64_t i = 0; i < s.columns; ++i)
              sum[i] += (at[before[i]] * near[i] + at[before[i] + 1] * far[i]) * guide[i];
          } else {
            const A* more = detail + place;
            const A share = sharpness[target];
            for (int64_t i = 0; i < s.columns; ++i)
              sum[i] += (at[before[i]] * near[i] + at[before[i] + 1] * far[i]) *
                        (guide[i] + share * more[i]);
          }
        }
        write_row(y + (b * s.targets + target) * size + row * s.columns, sum.data(), s.columns,
                  streaming);
      }
    }
    stream_fence();
  });
}

}  // namespace

void local_map(bool is_double, const LocalMapShape& shape, const void* coefficients,
               const void* guides, const void* detail, const void* sharpness, void* y) {
  const auto as = [&](auto zero) {
    using A = decltype(zero);
    apply(shape, static_cast<const A*>(coefficients), static_cast<const A*>(guides),
          static_cast<const A*>(detail), static_cast<const A*>(sharpness), static_cast<A*>(y));
  };
  if (is_double)
    as(double());
  else
    as(float());
}

}  // namespace fastfusion::FF_CAPABILITY
