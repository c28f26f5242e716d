// SpeCAM's spectral coordinate mixing: tensors in, tensors out.
#include "../cpu/coordinate_mixing.h"

#include "schemas.h"
#include "tensors.h"

namespace fastfusion {
namespace {

Candidates candidates_of(const Tensor& x) {
  return {x.data_ptr(), x.size(0), x.size(1), x.size(2), x.stride(0), x.stride(1)};
}

States states_of(const Tensor& x) { return {x.data_ptr(), x.stride(0), x.stride(1)}; }

// The tensor, or a copy of it where its coordinates do not lie side by side.
Tensor readable(const Tensor& x) {
  return x.stride(2) == 1 || x.size(2) == 1 ? x : torch::stable::contiguous(x);
}

Tensor coordinate_mixing(Tensor candidates, Tensor state, int64_t k) {
  const Tensor from = readable(candidates);
  const Tensor mixed = empty_tensor(state, {state.size(0), state.size(1)});
  FF_CALL(coordinate_mixing)(type_of(from), candidates_of(from), states_of(state), k,
                             states_of(mixed));
  return mixed;
}

std::tuple<Tensor, Tensor> coordinate_mixing_backward(Tensor grad, Tensor candidates, Tensor state,
                                                      int64_t k, std::vector<bool> mask) {
  const Tensor from = readable(candidates);
  const std::vector<int64_t> shape = {from.size(0), from.size(1), from.size(2)};
  const Tensor grad_candidates = mask[0] ? empty_tensor(from, shape) : no_gradient(from);
  const Tensor grad_state =
      mask[1] ? empty_tensor(state, {state.size(0), state.size(1)}) : no_gradient(state);
  FF_CALL(coordinate_mixing_backward)
  (type_of(from), states_of(grad), candidates_of(from), k,
   mask[0] ? candidates_of(grad_candidates) : Candidates{},
   mask[1] ? states_of(grad_state) : States{});
  return {grad_candidates, grad_state};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_coordinate_mixing(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("coordinate_mixing", TORCH_BOX(&coordinate_mixing));
  m.impl("coordinate_mixing_backward", TORCH_BOX(&coordinate_mixing_backward));
}

}  // namespace
}  // namespace fastfusion
