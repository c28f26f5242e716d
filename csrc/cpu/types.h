// The element types of the operators, and a tensor as the kernels see it.
#pragma once

#include <cstdint>

namespace fastfusion {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

enum class Type { kFloat, kDouble, kHalf, kBFloat16 };

// An image batch (B, C, H, W) of any strides, counted in elements.
struct Image {
  void* data;
  int64_t batch, channels, rows, columns;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  template <typename T>
  T* at(int64_t b, int64_t c, int64_t row = 0, int64_t column = 0) const {
    return static_cast<T*>(data) + b * batch_stride + c * channel_stride + row * row_stride +
           column * column_stride;
  }
  // Whether neighbours along the columns (NCHW), or along the channels (NHWC), are adjacent.
  bool rows_dense() const { return column_stride == 1 || columns == 1; }
  bool channels_dense() const { return channel_stride == 1 || channels == 1; }
};

// What a kernel accumulates in: float, and double for double.
template <typename T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <typename T>
using Accumulator = typename AccumulatorOf<T>::type;

// Call `f` with a value of the C++ type that `type` names (the value itself means nothing).
template <typename F>
void with_type(Type type, const F& f) {
  switch (type) {
    case Type::kFloat:
      return f(float());
    case Type::kDouble:
      return f(double());
    case Type::kHalf:
      return f(Half());
    case Type::kBFloat16:
      return f(BFloat16());
  }
}

}  // namespace fastfusion
