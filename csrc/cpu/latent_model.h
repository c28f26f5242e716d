// What the two kernels of the latent operator share: the call with its parameters widened and
// folded, the softmax, and the sums that become the parameters' gradients.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "block.h"
#include "latent_operator.h"
#include "patches.h"
#include "softmax.h"
#include "solver.h"

namespace fastfusion::FF_CAPABILITY {

inline int64_t padded_to_lanes(int64_t count, int lanes) {
  return (count + lanes - 1) / lanes * lanes;
}

// Parameters as the kernels use them. Rows of matrices are padded with zeros to whole vectors.
//
// Keys are needed for scores only, and prompt . (W_k x + b_k) = (W_k^T prompt) . x + constant, so
// the score of token t of head h is the row r = h * tokens + t of one matrix times x. The constant
// is the same for all pixels of a softmax, which does not see it.
template <typename A>
struct Model {
  static constexpr int lanes = kLanes<A>;

  Type type;
  Cutting cut;
  int channels, heads, tokens, width, score_rows;
  int64_t stride;  // of a padded row of `channels`
  bool encode, solve, decode;
  int groups;
  int64_t basis;
  double fundamental, scale;  // scale: 1 / sqrt(d)
  bool squash;
  std::vector<A> prompts, key, value, value_bias;
  std::vector<A> score, score_bias;  // scaled
  std::vector<A> query, query_bias;  // scaled
  std::vector<A> sine, cosine, offset;

  explicit Model(const LatentCall& call)
      : type(call.type),
        cut(call.x, call.patch_rows, call.patch_columns),
        channels(static_cast<int>(call.x.channels)),
        heads(static_cast<int>(call.heads)),
        tokens(static_cast<int>(call.tokens)),
        width(channels / heads),
        score_rows(heads * tokens),
        stride(padded_to_lanes(channels, lanes)),
        encode(call.prompts != nullptr),
        solve(call.sine != nullptr),
        decode(call.query_weight != nullptr),
        groups(solve ? series_groups(call.basis) : 0),
        basis(call.basis),
        fundamental(call.fundamental),
        scale(1 / std::sqrt(static_cast<double>(width))),
        squash(call.squash) {
    if (encode) {
      prompts = matrix(call.prompts, score_rows, width, width);
      key = matrix(call.key_weight, channels, channels, stride);
      value = matrix(call.value_weight, channels, channels, stride);
      value_bias = matrix(call.value_bias, 1, channels, channels);
      fold(matrix(call.key_bias, 1, channels, channels));
    }
    if (decode) {
      query = matrix(call.query_weight, channels, channels, stride);
      query_bias = matrix(call.query_bias, 1, channels, channels);
      for (A& weight : query) weight = static_cast<A>(weight * scale);
      for (A& bias : query_bias) bias = static_cast<A>(bias * scale);
    }
    if (solve) {
      sine = matrix(call.sine, channels, basis, basis);
      cosine = matrix(call.cosine, channels, basis, basis);
      offset = call.offset ? matrix(call.offset, 1, channels, stride) : std::vector<A>(stride);
    }
  }

  const A* prompt(int head, int token) const {
    return &prompts[(static_cast<int64_t>(head) * tokens + token) * width];
  }

 private:
  std::vector<A> matrix(const void* from, int64_t rows, int64_t columns, int64_t stride) const {
    std::vector<A> to(rows * stride);
    with_stored_type<A>(type, [&](auto zero) {
      const auto* next = static_cast<const decltype(zero)*>(from);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column)
          to[row * stride + column] = widen(*next++);
    });
    return to;
  }

  void fold(const std::vector<A>& key_bias) {
    score.resize(score_rows * stride);
    score_bias.resize(score_rows);
    std::vector<double> sum(stride);
    for (int row = 0; row < score_rows; ++row) {
      std::fill(sum.begin(), sum.end(), 0.0);
      double constant = 0;
      for (int j = 0; j < width; ++j) {
        const int channel = row / tokens * width + j;
        const double factor = prompts[row * width + j] * scale;
        for (int c = 0; c < channels; ++c) sum[c] += factor * key[channel * stride + c];
        constant += factor * key_bias[channel];
      }
      for (int c = 0; c < channels; ++c) score[row * stride + c] = static_cast<A>(sum[c]);
      score_bias[row] = static_cast<A>(0 * constant);  // NaN where the definition has NaN, else 0
    }
  }
};

// Replace the `count` vectors from `first` on, `step` apart, by e^(v - max); 1 / their sum.
template <typename A>
FF_INLINE Vector<A> exponentiate(A* first, int64_t step, int count) {
  Vector<A> highest = load(first);
  for (int n = 1; n < count; ++n) highest = max(highest, load(first + n * step));
  const Vector<A> shift = softmax_shift(highest);
  Vector<A> sum = {};
  for (int n = 0; n < count; ++n) {
    const Vector<A> weight = softmax_weight(load(first + n * step), shift);
    store(first + n * step, weight);
    sum += weight;
  }
  return 1 / sum;
}
template <typename A>
FF_INLINE void softmax(A* first, int64_t step, int count) {
  const Vector<A> inverse = exponentiate(first, step, count);
  for (int n = 0; n < count; ++n) store(first + n * step, load(first + n * step) * inverse);
}

// v <- weights * (v - sum weights * v): the gradient of a softmax, given its output.
template <typename A>
FF_INLINE void softmax_backward(const A* weight, A* v, int64_t step, int count) {
  Vector<A> sum = {};
  for (int n = 0; n < count; ++n) sum = fma(load(weight + n * step), load(v + n * step), sum);
  for (int n = 0; n < count; ++n)
    store(v + n * step, load(weight + n * step) * (load(v + n * step) - sum));
}

// Sums over patches, from which the gradients of the parameters are made. Matrices have the stride
// of the model's.
template <typename A>
struct Sums {
  A* score;       // (heads * tokens, C): of the folded matrix
  A* value;       // (C, C)
  A* query;       // (C, C): of the scaled weight
  A* latent;      // (heads, tokens, d): of the latents before the solver
  A* query_bias;  // (C,): of the scaled bias
  A* series;      // (C, packed): see unpack_gradients
  A* offset;      // (C,)

  static int64_t size(const Model<A>& m) { return Sums(nullptr, m).end - static_cast<A*>(nullptr); }
  Sums(A* data, const Model<A>& m) {
    const auto take = [&](int64_t count) {
      A* piece = data;
      data += Scratch<A>::round_up(count);
      return piece;
    };
    score = take(m.encode ? m.score_rows * m.stride : 0);
    value = take(m.encode ? m.channels * m.stride : 0);
    query = take(m.decode ? m.channels * m.stride : 0);
    latent = take(m.encode ? m.score_rows * m.width : 0);
    query_bias = take(m.decode ? m.channels : 0);
    series = take(int64_t{m.channels} * m.groups * kPackedGroup);
    offset = take(m.solve ? m.channels : 0);
    end = data;
  }

 private:
  A* end;
};

}  // namespace fastfusion::FF_CAPABILITY
