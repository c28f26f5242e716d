// Entry points of the depthwise kernels.
#pragma once

#include "capability.h"
#include "types.h"

namespace fastfusion {

struct FilterShape {
  int64_t rows, columns, row_dilation, column_dilation;

  // The zero padding at each side, which keeps the size of the image.
  int64_t row_padding() const { return rows / 2 * row_dilation; }
  int64_t column_padding() const { return columns / 2 * column_dilation; }
};

// A filter and its bias for each channel: (C, 1, rows, columns) and (C), contiguous.
struct FilterView {
  FilterShape shape;
  const void* weight;
  const void* bias;  // may be null
};

// Where the gradients of a convolution go, in the shape and type of what they are gradients of;
// null where one is not wanted.
struct DepthwiseGradients {
  Image x;
  void* weight;
  void* bias;
};

enum class Activation { kNone, kRelu, kGelu, kSilu };

}  // namespace fastfusion

// y = activation(filter * x + bias). y has the type of x and the layout that `across` names:
// dense across the channels (channels_last) or along the columns (contiguous); x may be any.
FF_DECLARE(void depthwise_conv2d(Type type, const Image& x, const FilterView& filter,
                                 Activation activation, bool across, const Image& y))
// The gradients that are wanted, given that of y; `grad` is dense as `across` says.
FF_DECLARE(void depthwise_conv2d_backward(Type type, const Image& grad, const Image& x,
                                          const FilterView& filter, Activation activation,
                                          bool across, const DepthwiseGradients& wanted))
