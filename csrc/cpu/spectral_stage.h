// Entry points of SpeCAM's first stage: both Haar bands behind a depthwise 3x3 convolution and
// GELU, their spatial maxima and their mixture.
#pragma once

#include "capability.h"
#include "types.h"

namespace fastfusion {

// The filters of the low and of the high band: weights (C, 3, 3) and biases (C), contiguous; a bias
// may be null.
struct SpectralFilters {
  const void* weight[2];
  const void* bias[2];
};

// Where gradients go, contiguous; null is not wanted.
struct SpectralGradients {
  void* weight[2];
  void* bias[2];
};

}  // namespace fastfusion

// `planar`: the pixels of a row of x lie side by side (NCHW); else its channels do (NHWC).
// `maxima` is (B, 2C), contiguous: those of the low band, then those of the high band.
FF_DECLARE(void spectral_maxima(Type type, bool planar, const Image& x,
                                const SpectralFilters& filters, void* maxima))
// `grad` is as `maxima`; `grad_x` has been filled with zeros, or its data is null.
FF_DECLARE(void spectral_maxima_backward(Type type, bool planar, const void* grad, const Image& x,
                                         const SpectralFilters& filters, const Image& grad_x,
                                         const SpectralGradients& gradients))
// y = gate[0] * low + gate[1] * high, gates (B, C) contiguous, as filtered above; y has the layout
// of an image that `planar` walks along its rows, or else along its channels.
FF_DECLARE(void spectral_mix(Type type, bool planar, const Image& x, const SpectralFilters& filters,
                             const void* const* gates, const Image& y))
