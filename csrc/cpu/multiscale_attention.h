// Entry points of the multiscale attention: softmax over the responses of several filters.
#pragma once

#include <vector>

#include "depthwise.h"

// y = sum over s of softmax_s(r)_s r_s with r_s = filters[s] * x + bias. Both images are dense
// across the channels or along the columns, as `across` says.
FF_DECLARE(void multiscale_attention(Type type, const Image& x,
                                     const std::vector<FilterView>& filters, bool across,
                                     const Image& y))
// The gradients that are wanted: of x (data may be null), and for each filter of its weight and its
// bias (either may be null).
FF_DECLARE(void multiscale_attention_backward(Type type, const Image& grad, const Image& x,
                                              const std::vector<FilterView>& filters, bool across,
                                              const Image& grad_x,
                                              const std::vector<void*>& grad_weights,
                                              const std::vector<void*>& grad_biases))
