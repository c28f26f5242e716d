// Tensors of the stable ABI as the kernels see them, and outputs made for them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../cpu/types.h"

namespace fastfusion {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A word among an operator's arguments. Taken as std::string, each call would leak one: the stable
// ABI's own conversion (as of torch 2.13) returns a copy of a string that it never deletes.
struct Word {
  std::string text;
};

inline Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "fastfusion_cpu takes float32, float64, float16 and bfloat16");
  }
}

// A view of a (B, C, H, W) tensor, whatever its strides. The kernels read through it only where
// the tensor is an input: the constness of the data is theirs to keep.
inline Image image(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  return {x.data_ptr(), size[0],   size[1],   size[2],  size[3],
          stride[0],    stride[1], stride[2], stride[3]};
}

inline bool is_channels_last(const Tensor& x) {
  const auto size = x.sizes(), stride = x.strides();
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (size[dim] != 1 && stride[dim] != expected) return false;
    expected *= size[dim];
  }
  return true;
}

// The layout of the outputs: channels_last exactly where x is, and is not contiguous as well.
inline MemoryFormat layout_of(const Tensor& x) {
  return !x.is_contiguous() && is_channels_last(x) ? MemoryFormat::ChannelsLast
                                                   : MemoryFormat::Contiguous;
}

// An uninitialised image of the given shape with the dtype and the layout of x.
inline Tensor empty_image(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::empty(shape, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              layout_of(x));
}

inline std::vector<int64_t> shape_of(const Tensor& x) {
  return {x.sizes().begin(), x.sizes().end()};
}

inline Tensor empty_image_like(const Tensor& x) { return empty_image(x, shape_of(x)); }

// An uninitialised contiguous tensor with the dtype of x.
inline Tensor empty_tensor(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(x, shape);
}

// What stands for a gradient that nobody wants.
inline Tensor no_gradient(const Tensor& x) { return empty_tensor(x, {0}); }

}  // namespace fastfusion

template <>
struct torch::stable::detail::ToImpl<fastfusion::Word> {
  static fastfusion::Word call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    fastfusion::Word word{std::string(data, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return word;
  }
};
