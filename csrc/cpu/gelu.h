// GELU, exact to the precision of float, and weighted.
#pragma once

#include "bounds.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

// gate * GELU(p) = p Phi(p) gate, with the half of the gate. For float, vector.h's erf with the
// square root of 2 in its coefficients. At the bound the quotient is 1, so that what is far below
// gives 0, and minus infinity NaN, as in the definition; smaller and larger let NaN through.
template <typename V>
FF_INLINE V gated_gelu(V p, V half_gate) {
  using A = std::remove_reference_t<decltype(p[0])>;
  const V half = p * half_gate;
  if constexpr (std::is_same_v<V, VectorF>) {
    constexpr double kRoot = 0.70710678118654752;
    const VectorF bound = broadcast(5.5154333f);  // 3.9 / sqrt(1/2)
    const VectorF c = larger(-bound, smaller(bound, p)), u = c * c;
    VectorF n = broadcast(float(2.0664726889663143e-06 * kRoot / 32));
    n = fma(n, u, broadcast(float(2.850633463822305e-04 * kRoot / 16)));
    n = fma(n, u, broadcast(float(3.738379804417491e-03 * kRoot / 8)));
    n = fma(n, u, broadcast(float(5.266818776726723e-02 * kRoot / 4)));
    n = fma(n, u, broadcast(float(1.8966753780841827e-01 * kRoot / 2)));
    n = fma(n, u, broadcast(float(1.1283791065216064 * kRoot)));
    VectorF d = broadcast(float(3.8270078221103176e-05 / 32));
    d = fma(d, u, broadcast(float(1.1573850642889738e-03 / 16)));
    d = fma(d, u, broadcast(float(1.4914344996213913e-02 / 8)));
    d = fma(d, u, broadcast(float(1.1381926387548447e-01 / 4)));
    d = fma(d, u, broadcast(float(5.014212727546692e-01 / 2)));
    d = fma(d, u, broadcast(1.0f));
    const VectorF one = broadcast(1.0f);
    return fma(half, larger(-one, smaller(one, c * n / d)), half);
  } else {
    return fma(half, erf(p * A(0.70710678118654752)), half);
  }
}

}  // namespace fastfusion::FF_CAPABILITY
