// What the frequency filter's bindings for the CPU and for CUDA share: the steps that are torch's.
#pragma once

#include <array>
#include <optional>

#include "torch_calls.h"

namespace fastfusion::frequency {

constexpr int64_t kNotScaled = 0, kByLength = 2;  // how torch scales a transform

// The gradients of all arguments, in the operator's order. Those not wanted stay empty.
using Gradients = std::array<MaybeTensor, 6>;
enum { kX, kMixing, kKernel, kMixingBias, kGain, kBias };

inline Tensor as_real(const Tensor& x) { return call("aten::view_as_real", "", x); }
inline Tensor as_complex(const Tensor& x) { return call("aten::view_as_complex", "", x); }

// The result in the dtype of `like`, and in its layout where it is an image.
inline Tensor result(const Tensor& y, const Tensor& like, bool is_image) {
  return narrow(y, like, is_image ? layout_of(like) : MemoryFormat::Contiguous);
}

// A gradient as the operator gives it back, by its index.
inline Tensor wanted(const Gradients& found, const std::vector<bool>& mask, const Tensor& x,
                     int index) {
  return mask[index] ? result(*found[index], x, index == kX) : no_gradient(x);
}

// Parts (B, 2, C, rows, columns) as matrices (B, 2, C, rows * columns).
inline Tensor lines(const Tensor& parts) {
  return shaped(parts,
                {parts.size(0), parts.size(1), parts.size(2), parts.size(3) * parts.size(4)});
}

// The gradient of the mixing matrices: that of the mixed parts times the parts.
inline Tensor mixing_gradient(const Tensor& grad_mixed, const Tensor& parts) {
  const Tensor turned = torch::stable::transpose(lines(parts), 2, 3);
  return total(torch::stable::matmul(lines(grad_mixed), turned), {0});
}

// The filters (2, D, m, m) with the gain (2, D) of the batch norm in them.
inline Tensor with_gain(const Tensor& kernel, const MaybeTensor& gain) {
  return gain ? times(kernel, shaped(*gain, {2, gain->size(1), 1, 1})) : kernel;
}

// The gradients of the filter and of the gain from that of their product: the response without the
// gain need not be known for it.
inline void put_kernel(const Tensor& grad, const Tensor& kernel, const MaybeTensor& gain,
                       Gradients& found) {
  found[kKernel] = with_gain(grad, gain);
  if (gain) found[kGain] = total(times(kernel, grad), {2, 3});
}

// A gradient (D) of the real part's bias as one of both: the imaginary part's does nothing.
inline Tensor of_real_part(const Tensor& grad) {
  const Tensor both = empty_tensor(grad, {2, grad.size(0)});
  Tensor real = torch::stable::select(both, 0, 0), imag = torch::stable::select(both, 0, 1);
  torch::stable::copy_(real, grad);
  torch::stable::zero_(imag);
  return both;
}

// The first pixel's sum over the batch: a constant in the spectrum is an impulse there.
inline Tensor origin(const Tensor& image) {
  return total(torch::stable::select(torch::stable::select(image, 3, 0), 2, 0), {0});
}

// Two images as one of parts (B, 2, D, H, K), in the dtype of `like`.
inline Tensor joined(const Tensor& first, const Tensor& second, const Tensor& like) {
  const Tensor both =
      empty_tensor(like, {first.size(0), 2, first.size(1), first.size(2), first.size(3)});
  Tensor upper = torch::stable::select(both, 1, 0), lower = torch::stable::select(both, 1, 1);
  torch::stable::copy_(upper, first);
  torch::stable::copy_(lower, second);
  return both;
}

}  // namespace fastfusion::frequency
