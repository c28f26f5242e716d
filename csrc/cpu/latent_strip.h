// The latent operator on small patches: a strip of as many patches as a vector has lanes, each in a
// lane of its own, so that the attention of a patch is plain arithmetic on vectors.
//
// In memory for one strip: the pixels (pixels x channels vectors) and, head by head, scores, values
// and queries (pixels x (tokens + 2 d)), latents (tokens x d). A head goes from the pixels to the
// result before the next one starts.
#pragma once

#include "latent_model.h"

namespace fastfusion::FF_CAPABILITY {

template <typename A>
class StripKernel {
 public:
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;

  StripKernel(const Model<A>& model, bool backward)
      : m(model),
        pixels_(static_cast<int>(model.cut.pixels())),
        first_row_(model.encode ? 0 : model.tokens + model.width),
        rows_(model.tokens + (model.decode ? 2 : 1) * model.width - first_row_) {
    const int64_t size = Panels<A>::size(rows_, m.channels);
    const int64_t size_back = backward ? Panels<A>::size(m.channels, rows_) : 0;
    memory_.resize((size + size_back) * m.heads);
    A* next = memory_.data();
    for (int head = 0; head < m.heads; ++head) {
      const auto weight = [&](int row, int c) { return matrix(head, first_row_ + row)[c]; };
      const auto bias = [&](int row) { return this->bias(head, first_row_ + row); };
      panels_.push_back(pack(next, rows_, m.channels, weight, bias));
      next += size;
      if (!backward) continue;
      const auto transposed = [&](int c, int row) { return weight(row, c); };
      back_.push_back(pack(next, m.channels, rows_, transposed, [](int) { return A(0); }));
      next += size_back;
    }
    pack_solver(backward);
  }

  int64_t strips() const { return (m.cut.count() + lanes - 1) / lanes; }

  // Vectors that a strip of the forward pass works on: what decides whether it fits the caches.
  static int64_t working_set(const Model<A>& m) { return m.cut.pixels() * (m.channels | 1); }

  // -- forward ------------------------------------------------------------------------------------

  struct Forward {
    Scratch<A> memory;
    A* line;
    Block<A> x, rows, latents;

    explicit Forward(const StripKernel& k)
        : memory(k.pixel_block_size() + k.row_block_size() + k.latent_block_size() +
                 k.line_size()) {
      x = k.pixel_block(memory);
      rows = k.row_block(memory);
      latents = k.latent_block(memory);
      line = memory.take(k.line_size());
    }
  };

  // What a strip gives: y, or the latents where there is no decoding.
  void forward(const LatentCall& call, const LatentResult& result, int64_t index,
               Forward& w) const {
    const Strip<A> strip(m.cut, index * lanes);
    const Strip<A> next(m.cut, std::min(index + 1, strips() - 1) * lanes);
    strip.read(m.type, call.x, 0, m.channels, w.x, w.line);
    for (int head = 0; head < m.heads; ++head) {
      const int64_t channel = int64_t{head} * m.width;
      next.template prefetch<0>(m.type, call.x, channel, channel + m.width);
      if (m.decode) strip.template prefetch<1>(m.type, result.image, channel, channel + m.width);
      project(panels_[head], w.x, pixels_, w.rows.from_row(first_row_));
      if (m.encode)
        encode(head, w.rows, w.latents);
      else
        read_latents(call.latents, index, strip.count(), head, w.latents);
      if (m.solve) solve(head, w.latents);
      if (!m.decode) {
        write_latents(w.latents, index, strip.count(), head, result.latents);
        continue;
      }
      decode(head, w);
      strip.write(m.type, w.rows.from_row(m.tokens + m.width), channel, channel + m.width,
                  result.image, w.line);
    }
  }

 private:
  // Scores become softmax(scores), up to the factor that the latents take.
  void encode(int head, Block<A> rows, Block<A> latents) const {
    const Block<A> values = rows.from_row(m.tokens);
    V inverse[kMost];
    for (int first = 0; first < m.tokens; first += kMost) {
      const int count = std::min(kMost, m.tokens - first);
      for (int t = 0; t < count; ++t)
        inverse[t] = exponentiate(rows.at(first + t, 0), rows.column, pixels_);
      multiply(rows.from_row(first), values, count, m.width, pixels_, latents.from_row(first));
      for (int t = 0; t < count; ++t)
        for (int j = 0; j < m.width; ++j) {
          A* z = latents.at(first + t, j);
          store(z, fma(load(z), inverse[t], broadcast(m.prompt(head, first + t)[j])));
        }
    }
  }

  void solve(int head, Block<A> latents) const {
    const int64_t packed_size = int64_t{m.groups} * kPackedGroup;
    for_batches([&](int first, int count) {
      A* at = latents.data + first * lanes;
      const Phases<A> phases(count, m.fundamental, m.squash,
                             [&](int n) { return load(at + n * lanes); });
      for (int n = 0; n < count; ++n) {
        const int64_t channel = head * m.width + (first + n) % m.width;
        const A* packed = series_.data() + channel * packed_size;
        const V sum = evaluate_series(phases.powers(n), m.groups,
                                      [&](int i) { return broadcast(packed[i]); });
        store(at + n * lanes, phases.z[n] + m.offset[channel] + sum);
      }
    });
  }
  // Call f(first, count) on the latents of a head, a few at a time.
  template <typename F>
  void for_batches(const F& f) const {
    const int all = m.tokens * m.width;
    for (int first = 0; first < all; first += Phases<A>::kCount)
      f(first, std::min(Phases<A>::kCount, all - first));
  }

  // The queries' rows become the result's; the scores lie token by token for each pixel.
  void decode(int head, Forward& w) const {
    const Block<A> scores = {w.rows.data, m.tokens * lanes, lanes};
    const Block<A> queries = w.rows.from_row(m.tokens + m.width);
    multiply(queries.transposed(), w.latents, pixels_, m.tokens, m.width, scores);
    for (int pixel = 0; pixel < pixels_; ++pixel)
      softmax(scores.at(pixel, 0), scores.column, m.tokens);
    const Block<A> x = w.x.from_row(int64_t{head} * m.width).transposed();
    multiply(scores, w.latents.transposed(), pixels_, m.width, m.tokens, queries.transposed(), &x);
  }

 public:
  // -- backward -----------------------------------------------------------------------------------

  struct Backward {
    Scratch<A> memory;
    A* line;
    Block<A> x, grad_y, grad_x, rows, grad_rows, scores, grad_scores, latents, solved, grad_latents;
    // Sums of a lane each, brought together by `finish`.
    A *sum_latent, *sum_query_bias, *sum_series, *sum_offset;

    explicit Backward(const StripKernel& k)
        : memory(3 * k.pixel_block_size() + 2 * k.row_block_size() + 2 * k.score_block_size() +
                 3 * k.latent_block_size() + k.lane_sums_size() + k.line_size()) {
      x = k.pixel_block(memory), grad_y = k.pixel_block(memory), grad_x = k.pixel_block(memory);
      rows = k.row_block(memory), grad_rows = k.row_block(memory);
      scores = k.score_block(memory), grad_scores = k.score_block(memory);
      latents = k.latent_block(memory), solved = k.latent_block(memory);
      grad_latents = k.latent_block(memory);
      line = memory.take(k.line_size());
      const int64_t channels = k.m.channels * lanes;
      A* sums = memory.take(k.lane_sums_size());
      std::fill(sums, sums + k.lane_sums_size(), A(0));
      sum_latent = sums, sum_query_bias = sum_latent + channels * k.m.tokens;
      sum_offset = sum_query_bias + channels, sum_series = sum_offset + channels;
    }
  };

  void backward(const LatentCall& call, const Image& grad, const void* grad_latents,
                const LatentResult& result, int64_t index, Backward& w, Sums<A>& sums) const {
    const Strip<A> strip(m.cut, index * lanes);
    strip.read(m.type, call.x, 0, m.channels, w.x, w.line);
    if (m.decode) strip.read(m.type, grad, 0, m.channels, w.grad_y, w.line);
    // The residual passes the gradient on.
    for (int pixel = 0; pixel < pixels_; ++pixel)
      for (int c = 0; c < m.channels; ++c)
        store(w.grad_x.at(c, pixel), m.decode ? load(w.grad_y.at(c, pixel)) : V{});
    for (int head = 0; head < m.heads; ++head) {
      project(panels_[head], w.x, pixels_, w.rows.from_row(first_row_));
      if (m.encode) {
        encode(head, w.rows, w.latents);
        for (int t = 0; t < m.tokens; ++t) normalise(w.rows.at(t, 0), w.rows.column);
      } else {
        read_latents(call.latents, index, strip.count(), head, w.latents);
      }
      std::copy(w.latents.data, w.latents.data + latent_block_size(), w.solved.data);
      if (m.solve) solve(head, w.solved);
      if (m.decode)
        decode_backward(head, w);
      else
        read_latents(grad_latents, index, strip.count(), head, w.grad_latents);
      if (m.solve) solve_backward(head, w);
      if (m.encode)
        encode_backward(head, w);
      else
        write_latents(w.grad_latents, index, strip.count(), head, result.latents);

      const Block<A> grads = w.grad_rows.from_row(first_row_);
      project<true>(back_[head], grads, pixels_, w.grad_x);
      const auto outer = [&](int row, int count, A* to) {
        multiply_lanes(w.grad_rows.from_row(row), w.x, count, m.channels, pixels_, to, m.stride);
      };
      if (m.encode) {
        outer(0, m.tokens, sums.score + int64_t{head} * m.tokens * m.stride);
        outer(m.tokens, m.width, sums.value + int64_t{head} * m.width * m.stride);
      }
      if (m.decode)
        outer(m.tokens + m.width, m.width, sums.query + int64_t{head} * m.width * m.stride);
    }
    if (result.image.data) strip.write(m.type, w.grad_x, 0, m.channels, result.image, w.line);
  }

  // Add the sums of the lanes to the others.
  void finish(const Backward& w, Sums<A>& sums) const {
    const auto add = [&](const A* from, int64_t count, A* to) {
      for (int64_t n = 0; n < count; ++n) to[n] += sum(load(from + n * lanes));
    };
    if (m.encode) add(w.sum_latent, m.channels * m.tokens, sums.latent);
    if (m.decode) add(w.sum_query_bias, m.channels, sums.query_bias);
    if (m.solve) add(w.sum_offset, m.channels, sums.offset);
    if (m.solve) add(w.sum_series, int64_t{m.channels} * m.groups * kPackedGroup, sums.series);
  }

 private:
  void normalise(A* row, int64_t step) const {
    V total = {};
    for (int pixel = 0; pixel < pixels_; ++pixel) total += load(row + pixel * step);
    const V inverse = 1 / total;
    for (int pixel = 0; pixel < pixels_; ++pixel)
      store(row + pixel * step, load(row + pixel * step) * inverse);
  }

  // From the gradient of y to those of the queries (in grad_rows) and of the solved latents.
  void decode_backward(int head, Backward& w) const {
    const Block<A> queries = w.rows.from_row(m.tokens + m.width);
    const Block<A> grad_queries = w.grad_rows.from_row(m.tokens + m.width);
    const Block<A> grad_y = w.grad_y.from_row(int64_t{head} * m.width);
    multiply(queries.transposed(), w.solved, pixels_, m.tokens, m.width, w.scores);
    multiply(grad_y.transposed(), w.solved, pixels_, m.tokens, m.width, w.grad_scores);
    for (int pixel = 0; pixel < pixels_; ++pixel) {
      softmax(w.scores.at(pixel, 0), w.scores.column, m.tokens);
      softmax_backward(w.scores.at(pixel, 0), w.grad_scores.at(pixel, 0), w.scores.column,
                       m.tokens);
    }
    multiply(w.scores.transposed(), grad_y, m.tokens, m.width, pixels_, w.grad_latents);
    multiply(w.grad_scores.transposed(), queries, m.tokens, m.width, pixels_, w.grad_latents,
             &w.grad_latents);
    multiply(w.solved.transposed(), w.grad_scores, m.width, pixels_, m.tokens, grad_queries);
    for (int j = 0; j < m.width; ++j) {
      A* at = w.sum_query_bias + (int64_t{head} * m.width + j) * lanes;
      V total = load(at);
      for (int pixel = 0; pixel < pixels_; ++pixel) total += load(grad_queries.at(j, pixel));
      store(at, total);
    }
  }

  // From the gradient of the solved latents to that of the latents, in place.
  void solve_backward(int head, Backward& w) const {
    const int64_t packed_size = int64_t{m.groups} * kPackedGroup;
    for_batches([&](int first, int count) {
      const Phases<A> phases(count, m.fundamental, m.squash,
                             [&](int n) { return load(w.latents.data + (first + n) * lanes); });
      for (int n = 0; n < count; ++n) {
        const int64_t channel = head * m.width + (first + n) % m.width;
        const A* slopes = slopes_.data() + channel * packed_size;
        A* sums = w.sum_series + channel * packed_size * lanes;
        A* offset = w.sum_offset + channel * lanes;
        A* at = w.grad_latents.data + (first + n) * lanes;
        const V grad = load(at);
        const Powers<V> powers = phases.powers(n);
        const V slope =
            evaluate_series(powers, m.groups, [&](int i) { return broadcast(slopes[i]); });
        coefficient_gradients(powers, m.groups, grad, [&](int i, V v) {
          store(sums + i * lanes, load(sums + i * lanes) + v);
        });
        store(offset, load(offset) + grad);
        store(at, grad * (1 + slope) * phases.slope(n));
      }
    });
  }

  // From the gradient of the latents to those of scores and values (in grad_rows).
  void encode_backward(int head, Backward& w) const {
    A* total = w.sum_latent + int64_t{head} * m.tokens * m.width * lanes;
    for (int64_t n = 0; n < int64_t{m.tokens} * m.width * lanes; n += lanes)
      store(total + n, load(total + n) + load(w.grad_latents.data + n));
    const Block<A> values = w.rows.from_row(m.tokens);
    multiply(w.grad_latents, values.transposed(), m.tokens, pixels_, m.width, w.grad_rows);
    for (int t = 0; t < m.tokens; ++t)
      softmax_backward(w.rows.at(t, 0), w.grad_rows.at(t, 0), w.rows.column, pixels_);
    multiply(w.grad_latents.transposed(), w.rows.transposed(), m.width, pixels_, m.tokens,
             w.grad_rows.from_row(m.tokens));
  }

  // -- packing ------------------------------------------------------------------------------------

  // Rows of a head: scores of the tokens, values, queries.
  const A* matrix(int head, int row) const {
    if (row < m.tokens) return &m.score[(int64_t{head} * m.tokens + row) * m.stride];
    const int64_t j = (row - m.tokens) % m.width;
    const std::vector<A>& weight = row < m.tokens + m.width ? m.value : m.query;
    return &weight[(int64_t{head} * m.width + j) * m.stride];
  }
  A bias(int head, int row) const {
    if (row < m.tokens) return m.score_bias[int64_t{head} * m.tokens + row];
    const int64_t j = (row - m.tokens) % m.width;
    return (row < m.tokens + m.width ? m.value_bias : m.query_bias)[int64_t{head} * m.width + j];
  }

  void pack_solver(bool backward) {
    if (!m.solve) return;
    const int64_t size = int64_t{m.groups} * kPackedGroup;
    series_.resize(size * m.channels);
    slopes_.resize(backward ? size * m.channels : 0);
    for (int64_t c = 0; c < m.channels; ++c) {
      const A *sine = m.sine.data() + c * m.basis, *cosine = m.cosine.data() + c * m.basis;
      pack_series(sine, cosine, m.basis, m.fundamental, false, series_.data() + c * size, 1);
      if (backward)
        pack_series(sine, cosine, m.basis, m.fundamental, true, slopes_.data() + c * size, 1);
    }
  }

  // -- blocks -------------------------------------------------------------------------------------

  static constexpr int kMost = 8;  // tokens whose softmax is finished together

  // Pixel by pixel, an odd number of vectors apart: a power of two would send the same channel of
  // all pixels to the same few lines of the cache.
  int64_t pixel_block_size() const {
    return Scratch<A>::round_up(pixels_ * int64_t{m.channels | 1} * lanes);
  }
  Block<A> pixel_block(Scratch<A>& memory) const {
    return {memory.take(pixel_block_size()), lanes, int64_t{m.channels | 1} * lanes};
  }
  int64_t row_block_size() const {
    return Scratch<A>::round_up(int64_t{m.tokens + 2 * m.width} * pixels_ * lanes);
  }
  Block<A> row_block(Scratch<A>& memory) const {
    return dense_block(memory.take(row_block_size()), pixels_);
  }
  int64_t score_block_size() const {
    return Scratch<A>::round_up(int64_t{pixels_} * m.tokens * lanes);
  }
  Block<A> score_block(Scratch<A>& memory) const {
    return dense_block(memory.take(score_block_size()), m.tokens);
  }
  int64_t latent_block_size() const {
    return Scratch<A>::round_up(int64_t{m.tokens} * m.width * lanes);
  }
  Block<A> latent_block(Scratch<A>& memory) const {
    return dense_block(memory.take(latent_block_size()), m.width);
  }
  int64_t line_size() const { return Scratch<A>::round_up(lanes * m.cut.patch_columns); }
  int64_t lane_sums_size() const {
    return Scratch<A>::round_up(int64_t{m.channels} * (m.tokens + 2 + m.groups * kPackedGroup) *
                                lanes);
  }

  // -- latents in memory: (patches, tokens, C) ----------------------------------------------------

  // Call f(element, lane of the block) on the head's latents of the strip's patches.
  template <typename T, typename F>
  void for_latents(T* latents, int64_t index, int count, int head, Block<A> block,
                   const F& f) const {
    for (int lane = 0; lane < count; ++lane)
      for (int t = 0; t < m.tokens; ++t) {
        T* row = latents + ((index * lanes + lane) * m.tokens + t) * m.channels + head * m.width;
        for (int j = 0; j < m.width; ++j) f(row[j], block.at(t, j)[lane]);
      }
  }
  void read_latents(const void* from, int64_t index, int count, int head, Block<A> to) const {
    std::fill(to.data, to.data + latent_block_size(), A(0));
    with_stored_type<A>(m.type, [&](auto zero) {
      for_latents(static_cast<const decltype(zero)*>(from), index, count, head, to,
                  [](const auto& element, A& value) { value = widen(element); });
    });
  }
  void write_latents(Block<A> from, int64_t index, int count, int head, void* to) const {
    if (to == nullptr) return;
    with_stored_type<A>(m.type, [&](auto zero) {
      using T = decltype(zero);
      for_latents(static_cast<T*>(to), index, count, head, from,
                  [](T& element, const A& value) { element = narrow<T>(value); });
    });
  }

  const Model<A>& m;
  int pixels_, first_row_, rows_;
  std::vector<A> memory_, series_, slopes_;
  std::vector<Panels<A>> panels_, back_;
};

}  // namespace fastfusion::FF_CAPABILITY
