// Entry point of the local map: coefficients interpolated and applied, never stored at full size.
#pragma once

#include <cstdint>

#include "capability.h"

namespace fastfusion {

// An image of `targets` bands from `guides` bands, by maps given every `scale` pixels: the first at
// pixel (first_row, first_column), not above or to the left of which any pixel lies.
struct LocalMapShape {
  int64_t batch, targets, guides, rows, columns, low_rows, low_columns, scale;
  double first_row, first_column;
};

}  // namespace fastfusion

// coefficients (B, targets, 1 + guides, low_rows, low_columns), guides and detail (B, guides, rows,
// columns), sharpness (targets) and y (B, targets, rows, columns) are contiguous, float or double;
// detail and sharpness may be null.
FF_DECLARE(void local_map(bool is_double, const LocalMapShape& shape, const void* coefficients,
                          const void* guides, const void* detail, const void* sharpness, void* y))
