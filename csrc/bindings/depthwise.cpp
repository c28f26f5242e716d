// The depthwise operators: tensors in, tensors out.
#include "../cpu/depthwise.h"

#include <string>

#include "tensors.h"

namespace fastfusion {
namespace {

Activation activation_of(const std::string& name) {
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
                        int64_t column_dilation, std::string activation) {
  const FilterTensors filter(weight, bias, row_dilation, column_dilation);
  Tensor y = empty_image_like(x);
  FF_CALL(depthwise_conv2d)
  (type_of(x), image(x), filter.view, activation_of(activation),
   layout_of(x) == MemoryFormat::ChannelsLast, image(y));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(
    Tensor grad, Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t row_dilation,
    int64_t column_dilation, std::string activation, std::vector<bool> mask) {
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

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) {
  m.def(
      "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int dilation_rows, "
      "int dilation_columns, str activation) -> Tensor");
  m.def(
      "depthwise_conv2d_backward(Tensor grad_0, Tensor x, Tensor weight, Tensor? bias, "
      "int dilation_rows, int dilation_columns, str activation, bool[] mask) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
}

}  // namespace
}  // namespace fastfusion
