// SpeCAM's first stage: tensors in, tensors out.
#include "../cpu/spectral_stage.h"
#include "../cpu/depthwise.h"
#include "../cpu/haar.h"
#include "schemas.h"
#include "torch_calls.h"

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
  MaybeTensor low_bias, high_bias;

  Filters(const Tensor& low_weight, const MaybeTensor& low_bias, const Tensor& high_weight,
          const MaybeTensor& high_bias)
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

Tensor spectral_maxima(Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
                       MaybeTensor high_bias) {
  const Filters filters(low_weight, low_bias, high_weight, high_bias);
  const Walkable from = walkable(x);
  const Tensor maxima = empty_tensor(x, {x.size(0), 2 * x.size(1)});
  FF_CALL(spectral_maxima)
  (type_of(x), from.planar, image(from.x), filters.view(), maxima.data_ptr());
  return maxima;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spectral_maxima_backward(
    Tensor grad, Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
    MaybeTensor high_bias, std::vector<bool> mask) {
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

Tensor spectral_mix(Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
                    MaybeTensor high_bias, Tensor low_gate, Tensor high_gate) {
  const Filters filters(low_weight, low_bias, high_weight, high_bias);
  const Tensor gates[2] = {torch::stable::contiguous(low_gate),
                           torch::stable::contiguous(high_gate)};
  const void* const data[2] = {gates[0].data_ptr(), gates[1].data_ptr()};
  const Tensor y = empty_image_like(x);
  const bool planar = image(y).rows_dense();
  const Tensor from = planar && !image(x).rows_dense() ? torch::stable::contiguous(x) : x;
  FF_CALL(spectral_mix)(type_of(x), planar, image(from), filters.view(), data, image(y));
  return y;
}

// By the kernels of the steps, since the gradients need the bands at every pixel.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spectral_mix_backward(
    Tensor grad, Tensor given, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
    MaybeTensor high_bias, Tensor low_gate, Tensor high_gate, std::vector<bool> mask) {
  const MemoryFormat layout = layout_of(given);
  const bool across = layout == MemoryFormat::ChannelsLast;
  const Tensor x = wide(given, layout), upstream = wide(grad, layout);
  const Type type = type_of(x);
  const int64_t channels = x.size(1);
  const Tensor low = empty_image_like(x), high = empty_image_like(x);
  FF_CALL(haar_split2d)(type, !across, image(x), image(low), image(high));

  std::vector<Tensor> found(7, no_gradient(given));
  Tensor grad_parts[2] = {x, x};
  const auto band = [&](int index, const Tensor& part, const Tensor& raw_weight,
                        const MaybeTensor& raw_bias, const Tensor& raw_gate) {
    const Tensor weight = wide(raw_weight);
    const MaybeTensor bias = wide(raw_bias);
    const FilterView filter = {{3, 3, 1, 1}, weight.data_ptr(), bias ? bias->data_ptr() : nullptr};
    const int of_weight = 1 + 2 * index, of_bias = of_weight + 1, of_gate = 5 + index;
    if (mask[of_gate]) {
      const Tensor response = empty_image_like(x);
      FF_CALL(depthwise_conv2d)
      (type, image(part), filter, Activation::kGelu, across, image(response));
      found[of_gate] = narrow(total(times(upstream, response), {2, 3}), given);
    }
    if (!mask[0] && !mask[of_weight] && !mask[of_bias]) return;
    const Tensor gate = shaped(wide(raw_gate), {x.size(0), channels, 1, 1});
    const Tensor scaled = torch::stable::contiguous(times(upstream, gate), layout);
    const Tensor grad_weight = empty_tensor(x, {channels, 1, 3, 3});
    const Tensor grad_bias = empty_tensor(x, {channels});
    if (mask[0]) grad_parts[index] = empty_image_like(x);
    FF_CALL(depthwise_conv2d_backward)
    (type, image(scaled), image(part), filter, Activation::kGelu, across,
     {mask[0] ? image(grad_parts[index]) : Image{},
      mask[of_weight] ? grad_weight.data_ptr() : nullptr,
      mask[of_bias] ? grad_bias.data_ptr() : nullptr});
    if (mask[of_weight]) found[of_weight] = narrow(grad_weight, given);
    if (mask[of_bias]) found[of_bias] = narrow(grad_bias, given);
  };
  band(0, low, low_weight, low_bias, low_gate);
  band(1, high, high_weight, high_bias, high_gate);
  if (mask[0]) {
    const Tensor grad_x = empty_image_like(x);
    FF_CALL(haar_split2d_backward)
    (type, !across, image(grad_parts[0]), image(grad_parts[1]), image(grad_x));
    found[0] = narrow(grad_x, given, layout);
  }
  return {found[0], found[1], found[2], found[3], found[4], found[5], found[6]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_spectral_stage(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("spectral_maxima", TORCH_BOX(&spectral_maxima));
  m.impl("spectral_maxima_backward", TORCH_BOX(&spectral_maxima_backward));
  m.impl("spectral_mix", TORCH_BOX(&spectral_mix));
  m.impl("spectral_mix_backward", TORCH_BOX(&spectral_mix_backward));
}

}  // namespace
}  // namespace fastfusion
