// SpeCAM's first stage: tensors in, tensors out.
#include "../cpu/spectral_maxima.h"

#include "tensors.h"

namespace fastfusion {
namespace {

// An image that the kernels can walk: along its rows, or, channel by channel, from pixel to pixel.
struct Walkable {
  Tensor x;
  bool planar;
};

Walkable walkable(const Tensor& x) {
  const Image view = image(x);
  if (view.rows_dense()) return {x, true};
  if (view.channels_dense()) return {x, false};
  return {torch::stable::contiguous(x), true};
}

// The filters, contiguous, and a view of them that lives no longer than they do.
struct Filters {
  Tensor low_weight, high_weight;
  std::optional<Tensor> low_bias, high_bias;

  Filters(const Tensor& low_weight, const std::optional<Tensor>& low_bias,
          const Tensor& high_weight, const std::optional<Tensor>& high_bias)
      : low_weight(torch::stable::contiguous(low_weight)),
        high_weight(torch::stable::contiguous(high_weight)) {
    if (low_bias) this->low_bias = torch::stable::contiguous(*low_bias);
    if (high_bias) this->high_bias = torch::stable::contiguous(*high_bias);
  }
  SpectralFilters view() const {
    return {
        {low_weight.data_ptr(), high_weight.data_ptr()},
        {low_bias ? low_bias->data_ptr() : nullptr, high_bias ? high_bias->data_ptr() : nullptr}};
  }
};

Tensor spectral_maxima(Tensor x, Tensor low_weight, std::optional<Tensor> low_bias,
                       Tensor high_weight, std::optional<Tensor> high_bias) {
  const Filters filters(low_weight, low_bias, high_weight, high_bias);
  const Walkable from = walkable(x);
  const Tensor maxima = empty_tensor(x, {x.size(0), 2 * x.size(1)});
  FF_CALL(spectral_maxima)
  (type_of(x), from.planar, image(from.x), filters.view(), maxima.data_ptr());
  return maxima;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spectral_maxima_backward(
    Tensor grad, Tensor x, Tensor low_weight, std::optional<Tensor> low_bias, Tensor high_weight,
    std::optional<Tensor> high_bias, std::vector<bool> mask) {
  const Filters filters(low_weight, low_bias, high_weight, high_bias);
  const Walkable from = walkable(x);
  const Tensor upstream = torch::stable::contiguous(grad);
  const auto wanted = [&](int index, const std::vector<int64_t>& shape) {
    return mask[index] ? empty_tensor(x, shape) : no_gradient(x);
  };
  const auto data = [&](int index, const Tensor& gradient) {
    return mask[index] ? gradient.data_ptr() : nullptr;
  };
  Tensor grad_x = mask[0] ? empty_image_like(x) : no_gradient(x);
  if (mask[0]) torch::stable::zero_(grad_x);
  const int64_t channels = x.size(1);
  const Tensor grad_low_weight = wanted(1, {channels, 1, 3, 3});
  const Tensor grad_low_bias = wanted(2, {channels});
  const Tensor grad_high_weight = wanted(3, {channels, 1, 3, 3});
  const Tensor grad_high_bias = wanted(4, {channels});
  FF_CALL(spectral_maxima_backward)
  (type_of(x), from.planar, upstream.data_ptr(), image(from.x), filters.view(),
   mask[0] ? image(grad_x) : Image{},
   {{data(1, grad_low_weight), data(3, grad_high_weight)},
    {data(2, grad_low_bias), data(4, grad_high_bias)}});
  return {grad_x, grad_low_weight, grad_low_bias, grad_high_weight, grad_high_bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) {
  m.def(
      "spectral_maxima(Tensor x, Tensor low_weight, Tensor? low_bias, Tensor high_weight,"
      " Tensor? high_bias) -> Tensor");
  m.def(
      "spectral_maxima_backward(Tensor grad_0, Tensor x, Tensor low_weight, Tensor? low_bias,"
      " Tensor high_weight, Tensor? high_bias, bool[] mask)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("spectral_maxima", TORCH_BOX(&spectral_maxima));
  m.impl("spectral_maxima_backward", TORCH_BOX(&spectral_maxima_backward));
}

}  // namespace
}  // namespace fastfusion
