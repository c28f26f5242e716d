// Entry points of the Haar kernels.
#pragma once

#include "capability.h"
#include "types.h"

FF_DECLARE(void haar_split2d(Type type, const Image& x, const Image& low, const Image& high))
FF_DECLARE(void haar_split2d_backward(Type type, const Image& grad_low, const Image& grad_high,
                                      const Image& grad_x))
