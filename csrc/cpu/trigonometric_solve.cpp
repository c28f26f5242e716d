// The solver alone, on rows of channels: the lanes are neighbouring channels.
#include <algorithm>
#include <vector>

#include "latent_operator.h"
#include "parallel.h"
#include "solver.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Coefficients in the order of the lanes: entry i of channel c at i * stride + c.
template <typename T>
struct Solver {
  using A = Accumulator<T>;
  static constexpr int lanes = kLanes<A>;

  int groups;
  int64_t packed, channels, stride;
  std::vector<A> series, slopes, offset;

  Solver(const SolverCall& call, bool backward)
      : groups(series_groups(call.basis)),
        packed(int64_t{groups} * kPackedGroup),
        channels(call.channels),
        stride((call.channels + lanes - 1) / lanes * lanes),
        series(backward ? 0 : packed * stride),
        slopes(backward ? packed * stride : 0),
        offset(stride) {
    std::vector<A> sine(call.basis), cosine(call.basis);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t q = 0; q < call.basis; ++q) {
        sine[q] = widen(static_cast<const T*>(call.sine)[c * call.basis + q]);
        cosine[q] = widen(static_cast<const T*>(call.cosine)[c * call.basis + q]);
      }
      pack_series(sine.data(), cosine.data(), call.basis, call.fundamental, backward,
                  (backward ? slopes : series).data() + c, stride);
      if (call.offset) offset[c] = widen(static_cast<const T*>(call.offset)[c]);
    }
  }
};

// Call f(row, rows, first channel, channels) on batches of neighbouring rows, vector by vector.
template <typename A, typename F>
void for_batches(int64_t first, int64_t last, int64_t channels, const F& f) {
  for (int64_t row = first; row < last; row += Phases<A>::kCount)
    for (int64_t c = 0; c < channels; c += kLanes<A>)
      f(row, static_cast<int>(std::min<int64_t>(Phases<A>::kCount, last - row)), c,
        static_cast<int>(std::min<int64_t>(kLanes<A>, channels - c)));
}

template <typename T>
void solve(const SolverCall& call, T* to) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  const Solver<T> s(call, false);
  const T* from = static_cast<const T*>(call.latents);
  parallel_for(0, call.count, 64, [&](int64_t first, int64_t last) {
    for_batches<A>(first, last, s.channels, [&](int64_t row, int rows, int64_t c, int width) {
      const int64_t at = row * s.channels + c;
      const Phases<A> phases(rows, call.fundamental, call.squash,
                             [&](int n) { return load(from + at + n * s.channels, width); });
      for (int n = 0; n < rows; ++n) {
        const V sum = evaluate_series(phases.powers(n), s.groups,
                                      [&](int i) { return load(&s.series[i * s.stride + c]); });
        store(to + at + n * s.channels, phases.z[n] + load(&s.offset[c]) + sum, width);
      }
    });
  });
}

template <typename T>
void solve_backward(const SolverCall& call, const T* grad, const SolverResult& result) {
  using A = Accumulator<T>;
  using V = Vector<A>;
  const Solver<T> s(call, true);
  const T* from = static_cast<const T*>(call.latents);
  T* to = static_cast<T*>(result.latents);
  // A fixed number of sums, so that the result does not depend on the number of threads.
  const int64_t size = (s.packed + 1) * s.stride;
  const int64_t count = std::clamp<int64_t>(call.count / 64, 1, 64);
  std::vector<A> sums(count * size);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      A* sum = &sums[part * size];
      const int64_t first = part * call.count / count, last = (part + 1) * call.count / count;
      for_batches<A>(first, last, s.channels, [&](int64_t row, int rows, int64_t c, int width) {
        const int64_t at = row * s.channels + c;
        const Phases<A> phases(rows, call.fundamental, call.squash,
                               [&](int n) { return load(from + at + n * s.channels, width); });
        const auto add = [&](int64_t i, V v) {
          A* place = sum + i * s.stride + c;
          store(place, load(place) + v);
        };
        for (int n = 0; n < rows; ++n) {
          const V g = load(grad + at + n * s.channels, width);
          const Powers<V> powers = phases.powers(n);
          const V slope = evaluate_series(powers, s.groups,
                                          [&](int i) { return load(&s.slopes[i * s.stride + c]); });
          coefficient_gradients(powers, s.groups, g, add);
          add(s.packed, g);
          if (to) store(to + at + n * s.channels, g * (1 + slope) * phases.slope(n), width);
        }
      });
    }
  });
  for (int64_t n = 1; n < count; ++n)
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[n * size + i];

  std::vector<A> sine(call.basis), cosine(call.basis);
  for (int64_t c = 0; c < s.channels; ++c) {
    unpack_gradients([&](int64_t i) { return sums[i * s.stride + c]; }, call.basis, sine.data(),
                     cosine.data());
    for (int64_t q = 0; q < call.basis; ++q) {
      if (result.sine) static_cast<T*>(result.sine)[c * call.basis + q] = narrow<T>(sine[q]);
      if (result.cosine) static_cast<T*>(result.cosine)[c * call.basis + q] = narrow<T>(cosine[q]);
    }
    if (result.offset) static_cast<T*>(result.offset)[c] = narrow<T>(sums[s.packed * s.stride + c]);
  }
}

}  // namespace

void trigonometric_solve(const SolverCall& call, void* solved) {
  with_type(call.type, [&](auto zero) { solve(call, static_cast<decltype(zero)*>(solved)); });
}

void trigonometric_solve_backward(const SolverCall& call, const void* grad,
                                  const SolverResult& result) {
  with_type(call.type, [&](auto zero) {
    solve_backward(call, static_cast<const decltype(zero)*>(grad), result);
  });
}

}  // namespace fastfusion::FF_CAPABILITY
