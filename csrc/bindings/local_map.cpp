// The local map: tensors in, tensors out.
#include "../cpu/local_map.h"

#include "torch_calls.h"

namespace fastfusion {
namespace {

Tensor local_map(Tensor coefficients, Tensor guides, MaybeTensor detail, MaybeTensor sharpness,
                 int64_t scale, double first_row, double first_column) {
  const Tensor maps = wide(coefficients), from = wide(guides);
  const MaybeTensor more = wide(detail), shares = wide(sharpness);
  const LocalMapShape shape{maps.size(0), maps.size(1), from.size(1), from.size(2), from.size(3),
                            maps.size(3), maps.size(4), scale,        first_row,    first_column};
  const Tensor y = empty_tensor(from, {shape.batch, shape.targets, shape.rows, shape.columns});
  FF_CALL(local_map)
  (type_of(from) == Type::kDouble, shape, maps.data_ptr(), from.data_ptr(),
   more ? more->data_ptr() : nullptr, shares ? shares->data_ptr() : nullptr, y.data_ptr());
  return narrow(y, guides, layout_of(guides));
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) {
  m.def(
      "local_map(Tensor coefficients, Tensor guides, Tensor? detail, Tensor? sharpness, int scale,"
      " float first_row, float first_column) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) { m.impl("local_map", TORCH_BOX(&local_map)); }

}  // namespace
}  // namespace fastfusion
