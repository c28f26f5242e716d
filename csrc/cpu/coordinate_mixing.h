// Entry points of SpeCAM's spectral coordinate mixing.
#pragma once

#include "capability.h"
#include "types.h"

namespace fastfusion {

// Candidates (B, C, N), whose coordinates lie side by side; the other strides are free.
struct Candidates {
  void* data;
  int64_t batch, channels, coordinates;
  int64_t batch_stride, channel_stride;

  template <typename T>
  T* at(int64_t b, int64_t c) const {
    return static_cast<T*>(data) + b * batch_stride + c * channel_stride;
  }
};

// States (B, C) of any strides.
struct States {
  void* data;
  int64_t batch_stride, channel_stride;

  template <typename T>
  T* at(int64_t b, int64_t c) const {
    return static_cast<T*>(data) + b * batch_stride + c * channel_stride;
  }
};

}  // namespace fastfusion

FF_DECLARE(void coordinate_mixing(Type type, const Candidates& candidates, const States& state,
                                  int64_t k, const States& mixed))
// A gradient whose data is null is not wanted.
FF_DECLARE(void coordinate_mixing_backward(Type type, const States& grad,
                                           const Candidates& candidates, int64_t k,
                                           const Candidates& grad_candidates,
                                           const States& grad_state))
