// Entry points of the Haar kernels.
//
// All images of a call are stored alike, as `planar` says: the pixels of a row lie side by side
// (NCHW), or the channels of a pixel and the pixels of a row do (NHWC). The other strides are free.
#pragma once

#include "capability.h"
#include "types.h"

namespace fastfusion {

struct HaarBands {
  Image ll, lh, hl, hh;
};

}  // namespace fastfusion

FF_DECLARE(void haar_dwt2d(Type type, bool planar, const Image& x, const HaarBands& bands))
FF_DECLARE(void haar_dwt2d_backward(Type type, bool planar, const HaarBands& grads,
                                    const Image& grad_x))
FF_DECLARE(void haar_idwt2d(Type type, bool planar, const HaarBands& bands, const Image& x))
FF_DECLARE(void haar_idwt2d_backward(Type type, bool planar, const Image& grad_x,
                                     const HaarBands& grads))
FF_DECLARE(void haar_split2d(Type type, bool planar, const Image& x, const Image& low,
                             const Image& high))
FF_DECLARE(void haar_split2d_backward(Type type, bool planar, const Image& grad_low,
                                      const Image& grad_high, const Image& grad_x))
