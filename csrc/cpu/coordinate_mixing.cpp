// SpeCAM's spectral coordinate mixing on the CPU.
//
// The tile is one image's candidates (C, N). Their saliencies are summed row by row, so that memory
// is read in order; the k-th largest is found by selection, not by sorting; and as only the last
// entry that is not 0 stays in the state, each channel is searched from the right and left at its
// first find. Twice over the candidates at most, the second time from the cache.
#include "coordinate_mixing.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "parallel.h"
#include "vector.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Candidates worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;
// Rows that are added to the saliencies at once.
constexpr int64_t kRows = 4;

// saliency[n] = sum over c, in order, of |candidates[c, n]|, in float64.
template <typename T>
void sum_saliencies(const Candidates& candidates, int64_t b, std::vector<double>& saliency) {
  using A = Accumulator<T>;
  const int64_t channels = candidates.channels, count = candidates.coordinates;
  std::fill(saliency.begin(), saliency.end(), 0.0);
  double* const sum = saliency.data();
  std::vector<A> widened(std::is_same_v<T, A> ? 0 : kRows * count);
  // A row as numbers to compute with.
  const auto row = [&](int64_t c) -> const A* {
    const T* from = candidates.at<T>(b, c);
    if constexpr (std::is_same_v<T, A>) {
      return from;
    } else {
      A* to = &widened[c % kRows * count];
      int64_t n = 0;
      for (; n + kLanes<A> <= count; n += kLanes<A>) store(to + n, load(from + n));
      for (; n < count; ++n) to[n] = widen(from[n]);
      return to;
    }
  };
  int64_t c = 0;
  for (; c + kRows <= channels; c += kRows) {
    const A *first = row(c), *second = row(c + 1), *third = row(c + 2), *fourth = row(c + 3);
    for (int64_t n = 0; n < count; ++n)
      sum[n] = sum[n] + std::abs(double{first[n]}) + std::abs(double{second[n]}) +
               std::abs(double{third[n]}) + std::abs(double{fourth[n]});
  }
  for (; c < channels; ++c) {
    const A* only = row(c);
    for (int64_t n = 0; n < count; ++n) sum[n] += std::abs(double{only[n]});
  }
}

}  // namespace

// The k most salient coordinates from left to right. NaN ranks above all, as in torch's sort; of
// equals the leftmost are taken.
void select_most_salient(const double* saliency, int64_t count, int64_t k,
                         std::vector<uint64_t>& ranks, std::vector<int64_t>& kept) {
  // The bits of numbers that are not negative are ordered as the numbers are.
  const auto rank = [&](int64_t n) {
    return std::isnan(saliency[n]) ? ~uint64_t{0} : bit_cast<uint64_t>(saliency[n]);
  };
  for (int64_t n = 0; n < count; ++n) ranks[n] = rank(n);
  std::nth_element(ranks.begin(), ranks.begin() + (k - 1), ranks.begin() + count,
                   std::greater<uint64_t>());
  const uint64_t lowest = ranks[k - 1];
  // How many of those that equal the k-th are still wanted.
  int64_t equals = k - std::count_if(ranks.begin(), ranks.begin() + (k - 1),
                                     [&](uint64_t value) { return value > lowest; });
  kept.clear();
  for (int64_t n = 0; n < count; ++n) {
    const uint64_t value = rank(n);
    if (value > lowest || (value == lowest && equals-- > 0)) kept.push_back(n);
  }
}

namespace {

// Call f(b, c, n) with the coordinate that channel c of image b accepts last, -1 for none.
template <typename T, typename F>
void for_accepted(const Candidates& candidates, int64_t k, const F& f) {
  const int64_t count = candidates.coordinates;
  const int64_t grain = std::max<int64_t>(kGrain / (candidates.channels * count), 1);
  parallel_for(0, candidates.batch, grain, [&](int64_t first, int64_t last) {
    std::vector<double> saliency(count);
    std::vector<uint64_t> ranks(count);
    std::vector<int64_t> kept;
    kept.reserve(k);
    for (int64_t b = first; b < last; ++b) {
      sum_saliencies<T>(candidates, b, saliency);
      select_most_salient(saliency.data(), count, k, ranks, kept);
      for (int64_t c = 0; c < candidates.channels; ++c) {
        const T* row = candidates.at<T>(b, c);
        const auto found =
            std::find_if(kept.rbegin(), kept.rend(), [&](int64_t n) { return widen(row[n]) != 0; });
        f(b, c, found == kept.rend() ? -1 : *found);
      }
    }
  });
}

}  // namespace

void coordinate_mixing(Type type, const Candidates& candidates, const States& state, int64_t k,
                       const States& mixed) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    for_accepted<T>(candidates, k, [&](int64_t b, int64_t c, int64_t n) {
      *mixed.at<T>(b, c) = n < 0 ? *state.at<T>(b, c) : candidates.at<T>(b, c)[n];
    });
  });
}

void coordinate_mixing_backward(Type type, const States& grad, const Candidates& candidates,
                                int64_t k, const Candidates& grad_candidates,
                                const States& grad_state) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    for_accepted<T>(candidates, k, [&](int64_t b, int64_t c, int64_t n) {
      if (grad_candidates.data != nullptr) {
        T* row = grad_candidates.at<T>(b, c);
        std::fill_n(row, candidates.coordinates, T());
        if (n >= 0) row[n] = *grad.at<T>(b, c);
      }
      if (grad_state.data != nullptr) *grad_state.at<T>(b, c) = n < 0 ? *grad.at<T>(b, c) : T();
    });
  });
}

}  // namespace fastfusion::FF_CAPABILITY
