// Vectors of the width of the instruction set that the file is compiled for: loads and stores of
// every element type, fused multiply-add and elementary functions. Everything here is also right
// on an instruction set that has none of this in hardware.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "capability.h"
#include "types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define FF_INLINE inline __attribute__((always_inline))
// For a lambda, after its parameters.
#define FF_INLINED __attribute__((always_inline))

namespace fastfusion::FF_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
// A vector of float, double or an integer type; arithmetic and comparisons are the compiler's.
template <typename A>
using Vector = typename VectorOf<A>::type;
// How many of them it holds.
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

using VectorF = Vector<float>;
using VectorD = Vector<double>;
using VectorI = Vector<int32_t>;
using VectorU = Vector<uint32_t>;

template <typename To, typename From>
FF_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename A>
FF_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// a * b + c; one rounding where the instruction set has it (the build allows contraction).
template <typename V>
FF_INLINE V fma(V a, V b, V c) {
  return a * b + c;
}

template <typename V>
FF_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
FF_INLINE V min(V a, V b) {
  return a < b ? a : b;
}

// Call f(constant 0), f(constant 1), ...: a loop that is unrolled in every case, so that arrays of
// vectors indexed by it live in registers. That holds only where `f` is inlined early: write
// `[&](auto i) FF_INLINED { ... }`.
template <int N, typename F>
FF_INLINE void unroll(const F& f) {
  [&]<int... I>(std::integer_sequence<int, I...>) FF_INLINED {
    (f(std::integral_constant<int, I>()), ...);
  }(std::make_integer_sequence<int, N>());
}

// Keep a value that is used more than once in a register: the compiler would rather load it again
// in each instruction that uses it, which costs more than the registers it saves.
template <typename V>
FF_INLINE void pin(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// -- one value ------------------------------------------------------------------------------------

FF_INLINE float widen(float x) { return x; }
FF_INLINE double widen(double x) { return x; }
FF_INLINE float widen(BFloat16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
FF_INLINE float widen(Half x) {
  // Shift exponent and fraction into place and rescale, which makes subnormal numbers right as
  // well; infinity and NaN need the largest exponent instead.
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, rest = uint32_t{x.bits & 0x7fffu} << 13;
  const float scaled = bit_cast<float>(rest) * 0x1p112f;
  const uint32_t special = rest >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(sign | special | bit_cast<uint32_t>(scaled));
}

template <typename T>
FF_INLINE T narrow(Accumulator<T> x);
template <>
FF_INLINE float narrow<float>(float x) {
  return x;
}
template <>
FF_INLINE double narrow<double>(double x) {
  return x;
}
template <>
FF_INLINE BFloat16 narrow<BFloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
FF_INLINE Half narrow<Half>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u;
  const uint32_t size = bits & 0x7fffffffu;
  uint32_t half;
  if (size > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (size >= 0x477ff000u) {
    half = 0x7c00;  // at least 65520, which rounds to infinity
  } else if (size < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the multiples of 2^-24, rounded to even, in the last bits.
    half = bit_cast<uint32_t>(bit_cast<float>(size) + 0.5f) - 0x3f000000u;
  } else {
    half = (size - 0x38000000u + 0xfffu + ((size >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// -- loads and stores -----------------------------------------------------------------------------

// Load kLanes<Accumulator<T>> elements from any address.
template <typename T>
FF_INLINE Vector<Accumulator<T>> load(const T* from) {
  using A = Accumulator<T>;
  if constexpr (std::is_same_v<T, A>) {
    Vector<A> v;
    std::memcpy(&v, from, sizeof(v));
    return v;
  } else {
#if defined(__AVX512F__)
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if constexpr (std::is_same_v<T, Half>) return bit_cast<VectorF>(_mm512_cvtph_ps(bits));
    return bit_cast<VectorF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if constexpr (std::is_same_v<T, Half>) return bit_cast<VectorF>(_mm256_cvtph_ps(bits));
    return bit_cast<VectorF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
    VectorF v;
    for (int lane = 0; lane < kLanes<float>; ++lane) v[lane] = widen(from[lane]);
    return v;
#endif
  }
}

template <typename T>
FF_INLINE void store(T* to, Vector<Accumulator<T>> v) {
  using A = Accumulator<T>;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(to, &v, sizeof(v));
  } else if constexpr (std::is_same_v<T, Half>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) to[lane] = narrow<Half>(v[lane]);
#endif
  } else {
#if defined(__AVX512F__)
    // It makes 0 of subnormal numbers (below 1.2e-38), which torch keeps.
    if (bfloat16_instructions) {
      __m256i bits;
      asm("vcvtneps2bf16 %1, %0" : "=v"(bits) : "v"(v));
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
    }
#endif
    const VectorU bits = bit_cast<VectorU>(v);
    VectorU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : VectorU{} + 0x7fc0u;
    typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    const Narrow result = __builtin_convertvector(rounded, Narrow);
    std::memcpy(to, &result, sizeof(result));
  }
}

// Load or store the first `count` elements only (0 to kLanes); the other lanes are zero.
template <typename T>
FF_INLINE Vector<Accumulator<T>> load(const T* from, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return bit_cast<VectorF>(_mm512_maskz_loadu_ps((1u << count) - 1u, from));
  if constexpr (std::is_same_v<T, double>)
    return bit_cast<VectorD>(_mm512_maskz_loadu_pd((1u << count) - 1u, from));
#endif
  T padded[kLanes<Accumulator<T>>] = {};
  std::memcpy(padded, from, sizeof(T) * count);
  return load(padded);
}

template <typename T>
FF_INLINE void store(T* to, Vector<Accumulator<T>> v, int count) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(to, (1u << count) - 1u, bit_cast<__m512>(v));
  if constexpr (std::is_same_v<T, double>)
    return _mm512_mask_storeu_pd(to, (1u << count) - 1u, bit_cast<__m512d>(v));
#endif
  T padded[kLanes<Accumulator<T>>];
  store(padded, v);
  std::memcpy(to, padded, sizeof(T) * count);
}

// The sum of all lanes, in a fixed order.
template <typename A>
FF_INLINE A sum_lanes(const A* lanes, int count) {
  A sum = 0;
  for (int lane = 0; lane < count; ++lane) sum += lanes[lane];
  return sum;
}
FF_INLINE float sum(VectorF v) {
  return sum_lanes(reinterpret_cast<const float*>(&v), kLanes<float>);
}
FF_INLINE double sum(VectorD v) {
  return sum_lanes(reinterpret_cast<const double*>(&v), kLanes<double>);
}

// -- elementary functions -------------------------------------------------------------------------
// Of a vector of float, within a few units in the last place; of a vector of double by libm.

template <typename F>
FF_INLINE VectorD each_lane(VectorD x, const F& f) {
  for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = f(x[lane]);
  return x;
}

// e^x = 2^n e^r with |r| <= ln(2) / 2. Beyond the range of float: 0 and infinity; NaN stays.
FF_INLINE VectorF exp(VectorF x) {
  const VectorF clamped = max(min(x, broadcast(89.0f)), broadcast(-105.0f));
  const VectorF magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const VectorF n = clamped * 1.44269504f + magic - magic;
  const VectorF r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  // Taylor's series to r^7 is exact to float on this interval.
  VectorF p = broadcast(1.0f / 5040);
  p = fma(p, r, broadcast(1.0f / 720));
  p = fma(p, r, broadcast(1.0f / 120));
  p = fma(p, r, broadcast(1.0f / 24));
  p = fma(p, r, broadcast(1.0f / 6));
  p = fma(p, r, broadcast(0.5f));
  p = fma(p, r, broadcast(1.0f));
  p = fma(p, r, broadcast(1.0f));
  // 2^n in two factors, since n reaches from -152 to 129.
  const VectorI whole = __builtin_convertvector(n, VectorI), half = whole >> 1;
  p *= bit_cast<VectorF>((half + 127) << 23);
  p *= bit_cast<VectorF>((whole - half + 127) << 23);
  return x == x ? p : x;
}
FF_INLINE VectorD exp(VectorD x) {
  return each_lane(x, [](double v) { return std::exp(v); });
}

// erf(x) = x P(x^2) / Q(x^2): a weighted least-squares fit on |x| <= 3.9, good to 2e-8; beyond, erf
// is 1 to the precision of float.
FF_INLINE VectorF erf(VectorF x) {
  const VectorF c = max(min(x, broadcast(3.9f)), broadcast(-3.9f)), u = c * c;
  VectorF p = broadcast(2.0664726889663143e-06f);
  p = fma(p, u, broadcast(2.850633463822305e-04f));
  p = fma(p, u, broadcast(3.738379804417491e-03f));
  p = fma(p, u, broadcast(5.266818776726723e-02f));
  p = fma(p, u, broadcast(1.8966753780841827e-01f));
  p = fma(p, u, broadcast(1.1283791065216064f));
  VectorF q = broadcast(3.8270078221103176e-05f);
  q = fma(q, u, broadcast(1.1573850642889738e-03f));
  q = fma(q, u, broadcast(1.4914344996213913e-02f));
  q = fma(q, u, broadcast(1.1381926387548447e-01f));
  q = fma(q, u, broadcast(5.014212727546692e-01f));
  q = fma(q, u, broadcast(1.0f));
  const VectorF y = c * p / q;
  return x == x ? max(min(y, broadcast(1.0f)), broadcast(-1.0f)) : x;
}
FF_INLINE VectorD erf(VectorD x) {
  return each_lane(x, [](double v) { return std::erf(v); });
}

// 1 / (1 + e^-x)
template <typename V>
FF_INLINE V sigmoid(V x) {
  return 1 / (1 + exp(-x));
}

}  // namespace fastfusion::FF_CAPABILITY
