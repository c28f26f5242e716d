// This library's own operators, called by name.
#pragma once

#include <algorithm>
#include <array>

#include "../bindings/torch_calls.h"

namespace fastfusion::cuda {

// The results of one of this library's operators.
template <size_t N, typename... Arguments>
std::array<Tensor, N> run(const char* name, const Arguments&... arguments) {
  std::array<StableIValue, std::max(N, sizeof...(Arguments))> stack{
      torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, N> results;
  for (size_t i = 0; i < N; ++i) results[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return results;
}

// As an operator takes them: a std::vector<bool> holds no bools that could be pointed at.
template <size_t N>
torch::headeronly::HeaderOnlyArrayRef<bool> flags(const std::array<bool, N>& values) {
  return torch::headeronly::HeaderOnlyArrayRef<bool>(values.data(), N);
}

}  // namespace fastfusion::cuda
