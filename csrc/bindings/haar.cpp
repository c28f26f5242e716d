// The Haar operators: tensors in, tensors out.
#include "../cpu/haar.h"

#include "tensors.h"

namespace fastfusion {
namespace {

std::tuple<Tensor, Tensor> haar_split2d(Tensor x) {
  Tensor low = empty_image_like(x), high = empty_image_like(x);
  FF_CALL(haar_split2d)(type_of(x), image(x), image(low), image(high));
  return {low, high};
}

Tensor haar_split2d_backward(Tensor grad_low, Tensor grad_high, Tensor x, std::vector<bool> mask) {
  if (!mask[0]) return no_gradient(x);
  Tensor grad_x = empty_image_like(x);
  FF_CALL(haar_split2d_backward)(type_of(x), image(grad_low), image(grad_high), image(grad_x));
  return grad_x;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) {
  m.def("haar_split2d(Tensor x) -> (Tensor, Tensor)");
  m.def("haar_split2d_backward(Tensor grad_0, Tensor grad_1, Tensor x, bool[] mask) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("haar_split2d", TORCH_BOX(&haar_split2d));
  m.impl("haar_split2d_backward", TORCH_BOX(&haar_split2d_backward));
}

}  // namespace
}  // namespace fastfusion
