// Exponentials for a softmax: fewer digits and a smaller range than the general one, half its time.
#pragma once

#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

// 2^x for x of at most 126, relative error 1.5e-7; 0 below the least normal number; NaN stays.
FF_INLINE VectorF exp2(VectorF x) {
  // 1.5 * 2^23: adding it rounds to an integer, and leaves that in the lowest bits.
  const VectorF shifted = x + 12582912.0f, f = x - (shifted - 12582912.0f);
  // The polynomial of degree 5 that is closest on |f| <= 1/2: relative error 7.5e-8.
  VectorF p = broadcast(0.001327647174f);
  p = fma(p, f, broadcast(0.00967554154f));
  p = fma(p, f, broadcast(0.05550713276f));
  p = fma(p, f, broadcast(0.2402211972f));
  p = fma(p, f, broadcast(0.6931469671f));
  p = fma(p, f, broadcast(1.000000072f));
  const VectorI scaled = bit_cast<VectorI>(p) + (bit_cast<VectorI>(shifted) << 23);
  return x < -126 ? VectorF{} : bit_cast<VectorF>(scaled);
}

// A softmax's exponentials e^(x - max): shift(max) once, then weight(x, shift) for each x.
FF_INLINE VectorF softmax_shift(VectorF max) { return max * -1.44269504f; }
FF_INLINE VectorF softmax_weight(VectorF x, VectorF shift) {
  return exp2(fma(x, broadcast(1.44269504f), shift));
}
FF_INLINE VectorD softmax_shift(VectorD max) { return -max; }
FF_INLINE VectorD softmax_weight(VectorD x, VectorD shift) { return exp(x + shift); }

}  // namespace fastfusion::FF_CAPABILITY
