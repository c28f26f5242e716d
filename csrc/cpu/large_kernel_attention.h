// Entry points of the large-kernel attention: x * mix(context(local(x))).
#pragma once

#include "depthwise.h"

namespace fastfusion {

// (C, C) as (out, in), and (C); contiguous.
struct MixView {
  const void* weight;
  const void* bias;  // may be null
};

// Where the gradients go; null where one is not wanted.
struct AttentionGradients {
  Image x;
  void *local_weight, *local_bias, *context_weight, *context_bias, *mix_weight, *mix_bias;
};

}  // namespace fastfusion

// x and y are dense across the channels or along the columns, as `across` says; the images of the
// backward pass may have any strides.
FF_DECLARE(void large_kernel_attention(Type type, const Image& x, const FilterView& local,
                                       const FilterView& context, const MixView& mix, bool across,
                                       const Image& y))
FF_DECLARE(void large_kernel_attention_backward(Type type, const Image& grad, const Image& x,
                                                const FilterView& local, const FilterView& context,
                                                const MixView& mix,
                                                const AttentionGradients& wanted))
