// LSO's solver on vectors: s = z + offset + sum_q a_q sin(q w z) + b_q cos(q w z), its derivative,
// and the gradients of its coefficients.
//
// One accurate sine and cosine of the phase t = w z give everything. With c_q = b_q - i a_q the sum
// is the real part of sum_q c_q e^(iqt). Eight terms around the centre k = 8g + 4 make a group,
//   A_g = c_k + sum_{r=1..3} (c_{k+r} e^(irt) + c_{k-r} e^(-irt)) + c_{k+4} e^(4it),
// whose pairs are (c + c') cos(rt) + i (c - c') sin(rt): four real products for two terms, and no
// recurrence that loses digits near a multiple of pi. Horner's rule joins the groups:
//   Re e^(4it) (A_0 + e^(8it) (A_1 + e^(8it) (A_2 + ...))).
#pragma once

#include <cmath>
#include <cstdint>

#include "vector.h"

namespace fastfusion::FF_CAPABILITY {

constexpr int kGroup = 8;
// A packed group: c_k; for r = 1, 2, 3 the factors of cos(rt) and sin(rt) in the real part and in
// the imaginary part; c_{k+4}.
constexpr int kPackedGroup = 2 + 3 * 4 + 2;

inline int series_groups(int64_t basis) { return static_cast<int>((basis + kGroup - 1) / kGroup); }

// Pack the coefficients of one channel, `stride` apart. `derivative` packs those of the series'
// derivative instead: a'_q = -q w b_q, b'_q = q w a_q.
template <typename A>
void pack_series(const A* sine, const A* cosine, int64_t basis, double fundamental, bool derivative,
                 A* to, int64_t stride) {
  struct Term {
    double a, b;
  };
  const auto term = [&](int64_t q) {
    if (q > basis) return Term{0, 0};
    const Term t{static_cast<double>(sine[q - 1]), static_cast<double>(cosine[q - 1])};
    const double slope = static_cast<double>(q) * fundamental;
    return derivative ? Term{-slope * t.b, slope * t.a} : t;
  };
  const auto put = [&](double value) {
    *to = static_cast<A>(value);
    to += stride;
  };
  for (int64_t k = kGroup / 2; k < basis + kGroup / 2; k += kGroup) {
    const Term centre = term(k), last = term(k + 4);
    put(centre.b);
    put(-centre.a);
    for (int r = 1; r < 4; ++r) {
      const Term above = term(k + r), below = term(k - r);
      put(above.b + below.b);
      put(above.a - below.a);
      put(-above.a - below.a);
      put(above.b - below.b);
    }
    put(last.b);
    put(-last.a);
  }
}

// x * factor in quarter turns: the rest after the nearest whole number of them, and that number.
struct Quarters {
  VectorF rest;
  VectorI whole;
};
// In double: right for x of any size that a double can tell the phase of.
inline Quarters quarters_in_double(VectorF x, double factor) {
  Quarters result;
  for (int lane = 0; lane < kLanes<float>; ++lane) {
    const double quarters = x[lane] * factor, whole = std::nearbyint(quarters);
    result.rest[lane] = static_cast<float>(quarters - whole);
    result.whole[lane] = std::fabs(whole) < 0x1p62 ? static_cast<int64_t>(whole) & 3 : 0;
  }
  return result;
}
FF_INLINE Quarters quarters_of(VectorF x, double factor) {
#if defined(__FMA__)
  // The product in two floats: fused multiplications lose nothing of it.
  const VectorF high = broadcast(static_cast<float>(factor));
  const VectorF low = broadcast(static_cast<float>(factor - static_cast<float>(factor)));
  const VectorF product = x * high;
#if defined(__AVX512F__)
  const VectorF error = bit_cast<VectorF>(
      _mm512_fmsub_ps(bit_cast<__m512>(x), bit_cast<__m512>(high), bit_cast<__m512>(product)));
  const bool large = _mm512_cmp_ps_mask(_mm512_abs_ps(bit_cast<__m512>(product)),
                                        _mm512_set1_ps(0x1p20f), _CMP_NLE_UQ);
#else
  const VectorF error = bit_cast<VectorF>(
      _mm256_fmsub_ps(bit_cast<__m256>(x), bit_cast<__m256>(high), bit_cast<__m256>(product)));
  const bool large = _mm256_movemask_ps(
      bit_cast<__m256>((product < 0 ? -product : product) <= 0x1p20f ? VectorI{} : VectorI{} - 1));
#endif
  if (__builtin_expect(large, 0)) return quarters_in_double(x, factor);
  // 1.5 * 2^23: adding it rounds to an integer, and leaves that in the lowest bits.
  const VectorF shifted = product + 12582912.0f;
  return {product - (shifted - 12582912.0f) + fma(x, low, error), bit_cast<VectorI>(shifted)};
#else
  return quarters_in_double(x, factor);
#endif
}

// Sine and cosine of x * factor radians.
FF_INLINE void sincos_of(VectorF x, double factor, VectorF& sine, VectorF& cosine) {
  const Quarters q = quarters_of(x, factor / M_PI_2);
  // Minimax on |r| <= 1/2 of sin(pi r / 2) / r and (cos(pi r / 2) - 1) / r^2: 3e-9, 5e-11.
  const VectorF r = q.rest, r2 = r * r;
  VectorF s = broadcast(-75.3936129102834f / 16384);
  s = fma(s, r2, broadcast(81.5923549529594f / 1024));
  s = fma(s, r2, broadcast(-41.34166146610781f / 64));
  s = fma(s, r2, broadcast(6.283185286855877f / 4));
  s *= r;
  VectorF c = broadcast(59.245962992502044f / 65536);
  c = fma(c, r2, broadcast(-85.44374169928443f / 4096));
  c = fma(c, r2, broadcast(64.93932647144683f / 256));
  c = fma(c, r2, broadcast(-19.739208693655318f / 16));
  c = fma(c, r2, broadcast(1.0f));
  const auto odd = (q.whole & 1) != 0;
  const VectorI sine_sign = (q.whole & 2) << 30, cosine_sign = ((q.whole + 1) & 2) << 30;
  sine = bit_cast<VectorF>(bit_cast<VectorI>(odd ? c : s) ^ sine_sign);
  cosine = bit_cast<VectorF>(bit_cast<VectorI>(odd ? s : c) ^ cosine_sign);
}
FF_INLINE void sincos_of(VectorD x, double factor, VectorD& sine, VectorD& cosine) {
  sine = each_lane(x * factor, [](double v) { return std::sin(v); });
  cosine = each_lane(x * factor, [](double v) { return std::cos(v); });
}

// cos(rt) and sin(rt) for r = 1 to 4 and 8.
template <typename V>
struct Powers {
  V cos1, sin1, cos2, sin2, cos3, sin3, cos4, sin4, cos8, sin8;

  FF_INLINE Powers(V sine, V cosine) : cos1(cosine), sin1(sine) {
    cos2 = 1 - 2 * sin1 * sin1, sin2 = 2 * sin1 * cos1;
    cos3 = cos2 * cos1 - sin2 * sin1, sin3 = sin2 * cos1 + cos2 * sin1;
    cos4 = 1 - 2 * sin2 * sin2, sin4 = 2 * sin2 * cos2;
    cos8 = 1 - 2 * sin4 * sin4, sin8 = 2 * sin4 * cos4;
  }
};

// The series; coefficient(i) is the i-th packed one, as a vector.
template <typename V, typename Coefficient>
FF_INLINE V evaluate_series(const Powers<V>& p, int groups, const Coefficient& coefficient) {
  V real = {}, imaginary = {};
  for (int first = (groups - 1) * kPackedGroup; first >= 0; first -= kPackedGroup) {
    const auto c = [&](int i) { return coefficient(first + i); };
    V re = fma(c(3), p.sin1, fma(c(2), p.cos1, c(0)));
    V im = fma(c(5), p.sin1, fma(c(4), p.cos1, c(1)));
    re = fma(c(7), p.sin2, fma(c(6), p.cos2, re));
    im = fma(c(9), p.sin2, fma(c(8), p.cos2, im));
    re = fma(c(11), p.sin3, fma(c(10), p.cos3, re));
    im = fma(c(13), p.sin3, fma(c(12), p.cos3, im));
    re = re + c(14) * p.cos4 - c(15) * p.sin4;
    im = im + c(14) * p.sin4 + c(15) * p.cos4;
    // Horner's step comes last, so that the groups do not wait for each other.
    const V turned = re + real * p.cos8 - imaginary * p.sin8;
    imaginary = im + real * p.sin8 + imaginary * p.cos8;
    real = turned;
  }
  return real * p.cos4 - imaginary * p.sin4;
}

// Add `grad` times the derivatives by the coefficients, in the form that unpack_gradients takes;
// add(i, v) adds to the i-th sum.
template <typename V, typename Add>
FF_INLINE void coefficient_gradients(const Powers<V>& p, int groups, V grad, const Add& add) {
  // grad * e^(ikt), k the centre of the group
  V re = grad * p.cos4, im = grad * p.sin4;
  for (int first = 0; first < groups * kPackedGroup; first += kPackedGroup) {
    add(first, re);
    add(first + 1, im);
    add(first + 2, re * p.cos1);
    add(first + 3, im * p.sin1);
    add(first + 4, re * p.sin1);
    add(first + 5, im * p.cos1);
    add(first + 6, re * p.cos2);
    add(first + 7, im * p.sin2);
    add(first + 8, re * p.sin2);
    add(first + 9, im * p.cos2);
    add(first + 10, re * p.cos3);
    add(first + 11, im * p.sin3);
    add(first + 12, re * p.sin3);
    add(first + 13, im * p.cos3);
    add(first + 14, re * p.cos4 - im * p.sin4);
    add(first + 15, re * p.sin4 + im * p.cos4);
    const V turned = re * p.cos8 - im * p.sin8;
    im = re * p.sin8 + im * p.cos8;
    re = turned;
  }
}

// The gradients of one channel's a and b from its sums; sum(i) is the i-th.
template <typename A, typename Sum>
void unpack_gradients(const Sum& sum, int64_t basis, A* grad_sine, A* grad_cosine) {
  const auto put = [&](int64_t q, A sine, A cosine) {
    if (q <= basis) grad_sine[q - 1] = sine, grad_cosine[q - 1] = cosine;
  };
  int64_t first = 0;
  for (int64_t k = kGroup / 2; k < basis + kGroup / 2; k += kGroup, first += kPackedGroup) {
    put(k, sum(first + 1), sum(first));
    for (int r = 1; r < 4; ++r) {
      const int64_t at = first + 2 + 4 * (r - 1);
      put(k + r, sum(at + 3) + sum(at + 2), sum(at) - sum(at + 1));
      put(k - r, sum(at + 3) - sum(at + 2), sum(at) + sum(at + 1));
    }
    put(k + 4, sum(first + 15), sum(first + 14));
  }
}

// Up to kCount latents at once, from what the squash makes of them to sine and cosine of the phase.
// The steps are loops of their own: each is a chain of dependent instructions, and a processor sees
// far enough ahead to run several short chains side by side, but not several long ones.
template <typename A>
struct Phases {
  static constexpr int kCount = 16;
  using V = Vector<A>;

  V z[kCount];  // what enters the series
  V sine[kCount], cosine[kCount];

  // latent(n) is the n-th latent.
  template <typename Latent>
  FF_INLINE Phases(int count, double fundamental, bool squash, const Latent& latent)
      : squash_(squash) {
    if (squash) {
      const A pi = static_cast<A>(M_PI);
      V part[kCount];
      for (int n = 0; n < count; ++n) part[n] = sigmoid(latent(n));
      for (int n = 0; n < count; ++n) {
        sincos_of(part[n], fundamental * M_PI, sine[n], cosine[n]);
        z[n] = part[n] * pi;
      }
    } else {
      for (int n = 0; n < count; ++n) {
        z[n] = latent(n);
        sincos_of(z[n], fundamental, sine[n], cosine[n]);
      }
    }
  }

  FF_INLINE Powers<V> powers(int n) const { return {sine[n], cosine[n]}; }
  // The derivative of z by the latent.
  FF_INLINE V slope(int n) const {
    return squash_ ? z[n] - z[n] * z[n] * static_cast<A>(M_1_PI) : 1 + V{};
  }

 private:
  bool squash_;
};

}  // namespace fastfusion::FF_CAPABILITY
