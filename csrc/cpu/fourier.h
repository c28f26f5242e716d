// Fourier transforms of as many sequences at once as a vector has lanes.
//
// The lanes never mix, so nothing is shuffled: a sequence of length n is n complex numbers whose
// real and imaginary parts are vectors. Decimation in frequency, in place: the k-th result lies at
// place(k). A stage of radix r makes of each run of r m numbers r runs of m, radices in ascending
// order, so that a stage whose numbers lie far apart (in one set of the first-level cache, for
// powers of two) holds few of them. The transform back is the same with real and imaginary parts
// exchanged before and after.
#pragma once

#include <cmath>
#include <vector>

#include "block.h"

namespace fastfusion::FF_CAPABILITY {

template <typename A>
struct Complex {
  Vector<A> re, im;
  FF_INLINE Complex operator+(Complex b) const { return {re + b.re, im + b.im}; }
  FF_INLINE Complex operator-(Complex b) const { return {re - b.re, im - b.im}; }
  // Times -i.
  FF_INLINE Complex turned() const { return {im, -re}; }
};

template <typename A>
class Fourier {
 public:
  // What a sequence takes for each of its numbers.
  static constexpr int64_t kStep = 2 * kLanes<A>;
  // Lengths with a larger prime factor are not taken: a stage costs its radix for each number.
  static constexpr int64_t kLargestPrime = 127;

  static bool takes(int64_t length) {
    for (int64_t prime = 2; prime <= kLargestPrime; ++prime)
      while (length % prime == 0) length /= prime;
    return length == 1;
  }

  explicit Fourier(int64_t length) : length_(length), places_(1, 0) {
    std::vector<int64_t> radices;
    int64_t rest = length;
    for (int64_t radix : {8, 4, 2})
      for (; rest % radix == 0 && rest > 1; rest /= radix) radices.insert(radices.begin(), radix);
    for (int64_t prime = 3; rest > 1; prime += 2)
      for (; rest % prime == 0; rest /= prime) radices.insert(radices.begin(), prime);
    int64_t m = length;
    for (int64_t radix : radices) {
      m /= radix;
      stages_.push_back({radix, m, static_cast<int64_t>(factors_.size())});
      for (int64_t j = 0; j < m; ++j)
        for (int64_t q = 1; q < radix; ++q) push(j * q, radix * m);
      if (radix % 2) {
        stages_.back().roots = static_cast<int64_t>(factors_.size());
        for (int64_t q = 0; q < radix; ++q) push(q, radix);
      }
      // k = (digit of this radix) + radix * (the digits to come)
      const int64_t known = static_cast<int64_t>(places_.size());
      for (int64_t digit = 1; digit < radix; ++digit)
        for (int64_t k = 0; k < known; ++k) places_.push_back(places_[k] + digit * m);
    }
  }

  int64_t length() const { return length_; }
  int64_t place(int64_t k) const { return places_[k]; }

  // X[k] = sum over j of x[j] e^(-2 pi i j k / length), unscaled.
  FF_NOINLINE void transform(A* z) const {
    for (const Stage& stage : stages_) {
      if (stage.radix == 8)
        even<8>(stage, z);
      else if (stage.radix == 4)
        even<4>(stage, z);
      else if (stage.radix == 2)
        even<2>(stage, z);
      else if (stage.radix == 3)
        odd(stage, z, std::integral_constant<int, 3>());
      else if (stage.radix == 5)
        odd(stage, z, std::integral_constant<int, 5>());
      else
        odd(stage, z, static_cast<int>(stage.radix));
    }
  }

 private:
  struct Stage {
    int64_t radix, m, twiddles, roots = 0;
  };

  // e^(-2 pi i turn / of), as its real and its imaginary part.
  void push(int64_t turn, int64_t of) {
    const double angle = 2 * M_PI * static_cast<double>(turn % of) / static_cast<double>(of);
    factors_.push_back(static_cast<A>(std::cos(angle)));
    factors_.push_back(static_cast<A>(-std::sin(angle)));
  }

  static FF_INLINE Complex<A> get(const A* z) { return {load(z), load(z + kLanes<A>)}; }
  static FF_INLINE void put(A* z, Complex<A> x) {
    store(z, x.re);
    store(z + kLanes<A>, x.im);
  }
  static FF_INLINE Complex<A> times(Complex<A> x, const A* w) {
    return {x.re * w[0] - x.im * w[1], x.re * w[1] + x.im * w[0]};
  }

  static FF_INLINE void four(Complex<A> (&x)[4]) {
    const Complex<A> a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = (x[1] - x[3]).turned();
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
  }
  static FF_INLINE void butterfly(Complex<A> (&x)[2]) {
    const Complex<A> a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  }
  static FF_INLINE void butterfly(Complex<A> (&x)[4]) { four(x); }
  static FF_INLINE void butterfly(Complex<A> (&x)[8]) {
    constexpr A kHalfRoot = A(0.70710678118654752440);
    Complex<A> a[4] = {x[0], x[2], x[4], x[6]}, b[4] = {x[1], x[3], x[5], x[7]};
    four(a);
    four(b);
    b[1] = {(b[1].re + b[1].im) * kHalfRoot, (b[1].im - b[1].re) * kHalfRoot};
    b[2] = b[2].turned();
    b[3] = {(b[3].im - b[3].re) * kHalfRoot, (b[3].re + b[3].im) * -kHalfRoot};
    unroll<4>([&](auto k) FF_INLINED {
      x[k] = a[k] + b[k];
      x[k + 4] = a[k] - b[k];
    });
  }

  // Call f(first number of a run of r m, the twiddles of its place) for each place and run.
  template <typename F>
  FF_INLINE void each_run(const Stage& stage, A* z, const F& f) const {
    const A* twiddles = &factors_[stage.twiddles];
    for (int64_t j = 0; j < stage.m; ++j, twiddles += 2 * (stage.radix - 1))
      for (int64_t at = j; at < length_; at += stage.radix * stage.m) f(z + at * kStep, twiddles);
  }

  template <int R>
  FF_NOINLINE void even(const Stage& stage, A* z) const {
    const int64_t apart = stage.m * kStep;
    const auto run = [&](auto turning) FF_INLINED {
      each_run(stage, z, [&](A* at, const A* twiddles) FF_INLINED {
        Complex<A> x[R];
        unroll<R>([&](auto q) FF_INLINED { x[q] = get(at + q * apart); });
        butterfly(x);
        unroll<R>([&](auto q) FF_INLINED {
          if constexpr (turning && q > 0) x[q] = times(x[q], twiddles + 2 * (q - 1));
          put(at + q * apart, x[q]);
        });
      });
    };
    // The last stage's twiddles are all 1.
    if (stage.m > 1)
      run(std::true_type());
    else
      run(std::false_type());
  }

  // Opposite numbers share a cosine, and a sine but for its sign.
  template <typename R>
  FF_NOINLINE void odd(const Stage& stage, A* z, R radix) const {
    const int64_t apart = stage.m * kStep;
    const A* roots = &factors_[stage.roots];
    const int half = radix / 2;
    each_run(stage, z, [&](A* at, const A* twiddles) FF_INLINED {
      Complex<A> sum[kLargestPrime / 2 + 1], difference[kLargestPrime / 2 + 1];
      const Complex<A> first = get(at);
      Complex<A> total = first;
      for (int q = 1; q <= half; ++q) {
        const Complex<A> a = get(at + q * apart), b = get(at + (radix - q) * apart);
        sum[q] = a + b;
        difference[q] = a - b;
        total = total + sum[q];
      }
      put(at, total);
      for (int k = 1; k <= half; ++k) {
        Complex<A> even = first, turn{};
        for (int q = 1, angle = k; q <= half; ++q) {
          even.re += sum[q].re * roots[2 * angle];
          even.im += sum[q].im * roots[2 * angle];
          turn.re += difference[q].re * roots[2 * angle + 1];
          turn.im += difference[q].im * roots[2 * angle + 1];
          angle += k;
          if (angle >= radix) angle -= radix;
        }
        // Plus i times the turn, for the roots hold -sin.
        const Complex<A> ahead = even - turn.turned(), behind = even + turn.turned();
        put(at + k * apart, times(ahead, twiddles + 2 * (k - 1)));
        put(at + (radix - k) * apart, times(behind, twiddles + 2 * (radix - k - 1)));
      }
    });
  }

  int64_t length_;
  std::vector<Stage> stages_;
  std::vector<A> factors_;
  std::vector<int64_t> places_;
};

}  // namespace fastfusion::FF_CAPABILITY
