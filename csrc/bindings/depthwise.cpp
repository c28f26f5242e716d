// The depthwise operators: tensors in, tensors out.
#include "../cpu/depthwise.h"

#include <string>

#include "../cpu/large_kernel_attention.h"
#include "../cpu/multiscale_attention.h"

#include "schemas.h"
#include "tensors.h"

namespace fastfusion {
namespace {

Activation activation_of(const Word& word) {
  const std::string& name = word.text;
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  return Activation::kNone;
}

// A filter as the kernels want it; owns the copies that may need.
struct FilterTensors {
  Tensor weight;
  std::optional<Tensor> bias;
  FilterView view;

  FilterTensors(const Tensor& w, const std::optional<Tensor>& b, int64_t row_dilation,
                int64_t column_dilation)
      : weight(torch::stable::contiguous(w)) {
    if (b.has_value()) bias = torch::stable::contiguous(*b);
    view = {{weight.size(2), weight.size(3), row_dilation, column_dilation},
            weight.const_data_ptr(),
            bias.has_value() ? bias->const_data_ptr() : nullptr};
  }
};

Tensor depthwise_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t row_dilation,
                        int64_t column_dilation, Word activation) {
  const FilterTensors filter(weight, bias, row_dilation, column_dilation);
  Tensor y = empty_image_like(x);
  FF_CALL(depthwise_conv2d)
  (type_of(x), image(x), filter.view, activation_of(activation),
   layout_of(x) == MemoryFormat::ChannelsLast, image(y));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t row_dilation,
    int64_t column_dilation, Word activation, std::vector<bool> mask) {
  const FilterTensors filter(weight, bias, row_dilation, column_dilation);
  const MemoryFormat layout = layout_of(x);
  grad = torch::stable::contiguous(grad, layout);
  Tensor grad_x = mask[0] ? empty_image_like(x) : no_gradient(x);
  Tensor grad_weight = mask[1] ? empty_tensor(x, shape_of(weight)) : no_gradient(x);
  Tensor grad_bias = mask[2] ? empty_tensor(x, {x.size(1)}) : no_gradient(x);
  DepthwiseGradients wanted{mask[0] ? image(grad_x) : Image{},
                            mask[1] ? grad_weight.mutable_data_ptr() : nullptr,
                            mask[2] ? grad_bias.mutable_data_ptr() : nullptr};
  FF_CALL(depthwise_conv2d_backward)
  (type_of(x), image(grad), image(x), filter.view, activation_of(activation),
   layout == MemoryFormat::ChannelsLast, wanted);
  return {grad_x, grad_weight, grad_bias};
}

// (C, C) and (C), contiguous; owns the copies that may need.
struct MixTensors {
  Tensor weight;
  std::optional<Tensor> bias;
  MixView view;

  MixTensors(const Tensor& w, const std::optional<Tensor>& b)
      : weight(torch::stable::contiguous(w)) {
    if (b.has_value()) bias = torch::stable::contiguous(*b);
    view = {weight.const_data_ptr(), bias.has_value() ? bias->const_data_ptr() : nullptr};
  }
};

Tensor large_kernel_attention(Tensor x, Tensor local_weight, std::optional<Tensor> local_bias,
                              Tensor context_weight, std::optional<Tensor> context_bias,
                              Tensor mix_weight, std::optional<Tensor> mix_bias,
                              int64_t row_dilation, int64_t column_dilation) {
  const FilterTensors local(local_weight, local_bias, 1, 1);
  const FilterTensors context(context_weight, context_bias, row_dilation, column_dilation);
  const MixTensors mix(mix_weight, mix_bias);
  const MemoryFormat layout = layout_of(x);
  x = torch::stable::contiguous(x, layout);
  Tensor y = empty_image_like(x);
  FF_CALL(large_kernel_attention)
  (type_of(x), image(x), local.view, context.view, mix.view, layout == MemoryFormat::ChannelsLast,
   image(y));
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_attention_backward(
    Tensor grad, Tensor x, Tensor local_weight, std::optional<Tensor> local_bias,
    Tensor context_weight, std::optional<Tensor> context_bias, Tensor mix_weight,
    std::optional<Tensor> mix_bias, int64_t row_dilation, int64_t column_dilation,
    std::vector<bool> mask) {
  const FilterTensors local(local_weight, local_bias, 1, 1);
  const FilterTensors context(context_weight, context_bias, row_dilation, column_dilation);
  const MixTensors mix(mix_weight, mix_bias);
  const int64_t channels = x.size(1);
  std::vector<Tensor> found;
  const std::vector<std::vector<int64_t>> shapes = {
      {},         shape_of(local_weight), {channels}, shape_of(context_weight),
      {channels}, {channels, channels},   {channels}};
  for (size_t i = 0; i < shapes.size(); ++i)
    found.push_back(!mask[i] ? no_gradient(x)
                    : i == 0 ? empty_image_like(x)
                             : empty_tensor(x, shapes[i]));
  const auto data = [&](int i) { return mask[i] ? found[i].mutable_data_ptr() : nullptr; };
  const AttentionGradients wanted{
      mask[0] ? image(found[0]) : Image{}, data(1), data(2), data(3), data(4), data(5), data(6)};
  FF_CALL(large_kernel_attention_backward)
  (type_of(x), image(grad), image(x), local.view, context.view, mix.view, wanted);
  return {found[0], found[1], found[2], found[3], found[4], found[5], found[6]};
}

// The filters of all scales lie side by side in `weight`, (C, sum of kh * kw); `bias` is (S, C).
struct ScaleTensors {
  std::vector<FilterTensors> filters;
  std::vector<FilterView> views;

  ScaleTensors(Tensor weight, Tensor bias, const std::vector<int64_t>& sizes) {
    int64_t first = 0;
    for (size_t s = 0; s < sizes.size() / 2; ++s) {
      const int64_t rows = sizes[2 * s], columns = sizes[2 * s + 1];
      Tensor taps =
          torch::stable::contiguous(torch::stable::narrow(weight, 1, first, rows * columns));
      taps = torch::stable::view(taps, {weight.size(0), 1, rows, columns});
      filters.emplace_back(taps, torch::stable::select(bias, 0, s), 1, 1);
      first += rows * columns;
    }
    for (const FilterTensors& filter : filters) views.push_back(filter.view);
  }
};

Tensor multiscale_attention(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> sizes) {
  const ScaleTensors scales(weight, bias, sizes);
  Tensor y = empty_image_like(x);
  FF_CALL(multiscale_attention)
  (type_of(x), image(x), scales.views, layout_of(x) == MemoryFormat::ChannelsLast, image(y));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> multiscale_attention_backward(Tensor grad, Tensor x,
                                                                 Tensor weight, Tensor bias,
                                                                 std::vector<int64_t> sizes,
                                                                 std::vector<bool> mask) {
  const ScaleTensors scales(weight, bias, sizes);
  const MemoryFormat layout = layout_of(x);
  grad = torch::stable::contiguous(grad, layout);
  Tensor grad_x = mask[0] ? empty_image_like(x) : no_gradient(x);
  Tensor grad_weight = mask[1] ? empty_tensor(x, shape_of(weight)) : no_gradient(x);
  Tensor grad_bias = mask[2] ? empty_tensor(x, shape_of(bias)) : no_gradient(x);
  std::vector<Tensor> weights, biases;
  std::vector<void*> weight_data, bias_data;
  for (const FilterTensors& filter : scales.filters) {
    weights.push_back(empty_tensor(x, shape_of(filter.weight)));
    biases.push_back(empty_tensor(x, {x.size(1)}));
    weight_data.push_back(mask[1] ? weights.back().mutable_data_ptr() : nullptr);
    bias_data.push_back(mask[2] ? biases.back().mutable_data_ptr() : nullptr);
  }
  FF_CALL(multiscale_attention_backward)
  (type_of(x), image(grad), image(x), scales.views, layout == MemoryFormat::ChannelsLast,
   mask[0] ? image(grad_x) : Image{}, weight_data, bias_data);
  int64_t first = 0;
  for (size_t s = 0; s < weights.size(); ++s) {
    const int64_t taps = weights[s].size(2) * weights[s].size(3);
    if (mask[1]) {
      Tensor part = torch::stable::narrow(grad_weight, 1, first, taps);
      torch::stable::copy_(part, torch::stable::view(weights[s], {x.size(1), taps}));
    }
    if (mask[2]) {
      Tensor part = torch::stable::select(grad_bias, 0, s);
      torch::stable::copy_(part, biases[s]);
    }
    first += taps;
  }
  return {grad_x, grad_weight, grad_bias};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_depthwise(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("large_kernel_attention", TORCH_BOX(&large_kernel_attention));
  m.impl("large_kernel_attention_backward", TORCH_BOX(&large_kernel_attention_backward));
  m.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
  m.impl("multiscale_attention_backward", TORCH_BOX(&multiscale_attention_backward));
}

}  // namespace
}  // namespace fastfusion
