// What torch computes for the bindings: its operators, called by name.
#pragma once

#include <array>

#include "tensors.h"

namespace fastfusion {

using MaybeTensor = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

template <typename... Args>
Tensor call(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor times(const Tensor& a, const Tensor& b) { return call("aten::mul", "Tensor", a, b); }
inline Tensor plus(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }
inline Tensor shaped(const Tensor& x, const Sizes& shape) {
  return torch::stable::reshape(x, shape);
}
inline Tensor total(const Tensor& x, const Sizes& dims) { return torch::stable::sum(x, dims); }

// A tensor of float16 or bfloat16 as float, dense in the given layout, and without anything of
// autograd's, which the threads of the pool would otherwise record for.
inline Tensor wide(const Tensor& given, MemoryFormat layout = MemoryFormat::Contiguous) {
  const Tensor x = call("aten::detach", "", given);
  const bool low = x.scalar_type() == ScalarType::Half || x.scalar_type() == ScalarType::BFloat16;
  return torch::stable::contiguous(low ? torch::stable::to(x, ScalarType::Float) : x, layout);
}
inline MaybeTensor wide(const MaybeTensor& x) { return x ? MaybeTensor(wide(*x)) : x; }

// The result in the dtype of `like`, dense in the given layout.
inline Tensor narrow(const Tensor& y, const Tensor& like,
                     MemoryFormat layout = MemoryFormat::Contiguous) {
  const bool same = y.scalar_type() == like.scalar_type();
  return torch::stable::contiguous(same ? y : torch::stable::to(y, like.scalar_type()), layout);
}

}  // namespace fastfusion
