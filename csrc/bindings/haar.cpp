// The Haar operators: tensors in, tensors out.
#include "../cpu/haar.h"

#include "schemas.h"
#include "tensors.h"

namespace fastfusion {
namespace {

using Bands = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// How the kernel goes through the images: as planes, or (false) pixel by pixel.
bool is_planar(const Tensor& x) { return layout_of(x) == MemoryFormat::Contiguous; }

// The tensor, or a copy of it where the kernel cannot read along its rows (its pixels).
Tensor readable(const Tensor& x, bool planar) {
  const Image view = image(x);
  const bool pixels_dense =
      view.channels_dense() && (view.column_stride == view.channels || view.columns == 1);
  if (planar ? view.rows_dense() : pixels_dense) return x;
  return torch::stable::contiguous(x,
                                   planar ? MemoryFormat::Contiguous : MemoryFormat::ChannelsLast);
}

Bands empty_bands(const Tensor& x) {
  const std::vector<int64_t> shape = {x.size(0), x.size(1), (x.size(2) + 1) / 2,
                                      (x.size(3) + 1) / 2};
  return {empty_image(x, shape), empty_image(x, shape), empty_image(x, shape),
          empty_image(x, shape)};
}

HaarBands views(const Bands& bands) {
  const auto& [ll, lh, hl, hh] = bands;
  return {image(ll), image(lh), image(hl), image(hh)};
}

Bands haar_dwt2d(Tensor x) {
  const bool planar = is_planar(x);
  const Tensor from = readable(x, planar);
  const Bands bands = empty_bands(x);
  FF_CALL(haar_dwt2d)(type_of(x), planar, image(from), views(bands));
  return bands;
}

Tensor haar_dwt2d_backward(Tensor grad_ll, Tensor grad_lh, Tensor grad_hl, Tensor grad_hh, Tensor x,
                           std::vector<bool> mask) {
  if (!mask[0]) return no_gradient(x);
  const bool planar = is_planar(x);
  const Bands grads = {readable(grad_ll, planar), readable(grad_lh, planar),
                       readable(grad_hl, planar), readable(grad_hh, planar)};
  const Tensor grad_x = empty_image_like(x);
  FF_CALL(haar_dwt2d_backward)(type_of(x), planar, views(grads), image(grad_x));
  return grad_x;
}

Tensor haar_idwt2d(Tensor ll, Tensor lh, Tensor hl, Tensor hh, int64_t rows, int64_t columns) {
  const bool planar = is_planar(ll);
  const Bands bands = {readable(ll, planar), readable(lh, planar), readable(hl, planar),
                       readable(hh, planar)};
  const Tensor x = empty_image(ll, {ll.size(0), ll.size(1), rows, columns});
  FF_CALL(haar_idwt2d)(type_of(ll), planar, views(bands), image(x));
  return x;
}

Bands haar_idwt2d_backward(Tensor grad, Tensor ll, Tensor lh, Tensor hl, Tensor hh, int64_t rows,
                           int64_t columns, std::vector<bool> mask) {
  const bool planar = is_planar(ll);
  const Tensor from = readable(grad, planar);
  Bands grads = {empty_image_like(ll), empty_image_like(ll), empty_image_like(ll),
                 empty_image_like(ll)};
  FF_CALL(haar_idwt2d_backward)(type_of(ll), planar, image(from), views(grads));
  auto& [grad_ll, grad_lh, grad_hl, grad_hh] = grads;
  if (!mask[0]) grad_ll = no_gradient(ll);
  if (!mask[1]) grad_lh = no_gradient(ll);
  if (!mask[2]) grad_hl = no_gradient(ll);
  if (!mask[3]) grad_hh = no_gradient(ll);
  return grads;
}

std::tuple<Tensor, Tensor> haar_split2d(Tensor x) {
  const bool planar = is_planar(x);
  const Tensor from = readable(x, planar), low = empty_image_like(x), high = empty_image_like(x);
  FF_CALL(haar_split2d)(type_of(x), planar, image(from), image(low), image(high));
  return {low, high};
}

Tensor haar_split2d_backward(Tensor grad_low, Tensor grad_high, Tensor x, std::vector<bool> mask) {
  if (!mask[0]) return no_gradient(x);
  const bool planar = is_planar(x);
  const Tensor low = readable(grad_low, planar), high = readable(grad_high, planar);
  const Tensor grad_x = empty_image_like(x);
  FF_CALL(haar_split2d_backward)(type_of(x), planar, image(low), image(high), image(grad_x));
  return grad_x;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_haar(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("haar_dwt2d", TORCH_BOX(&haar_dwt2d));
  m.impl("haar_dwt2d_backward", TORCH_BOX(&haar_dwt2d_backward));
  m.impl("haar_idwt2d", TORCH_BOX(&haar_idwt2d));
  m.impl("haar_idwt2d_backward", TORCH_BOX(&haar_idwt2d_backward));
  m.impl("haar_split2d", TORCH_BOX(&haar_split2d));
  m.impl("haar_split2d_backward", TORCH_BOX(&haar_split2d_backward));
}

}  // namespace
}  // namespace fastfusion
