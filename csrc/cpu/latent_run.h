// The latent operator on large patches: a run of pixels of one patch at a time, a lane each.
//
// Averages come before products here. With A the attention of a token to the pixels,
//   A V + prompt = W_v (A x) + b_v + prompt,
// so the pixels are averaged once for each head and token, and only the averages are projected.
// Likewise a query meets a token as (W_q x + b_q) . s = (W_q^T s) . x + b_q . s: the tokens of a
// patch become one matrix, whose rows r = head * tokens + token are multiplied by the pixels.
//
// The pixels of a patch are read twice, in runs that fit the cache: once to encode, with a softmax
// that rescales what it has summed when a run brings a higher score, and once to decode. A patch of
// more than kPart pixels is encoded in parts that do not depend on the number of threads.
#pragma once

#include "latent_model.h"
#include "parallel.h"

namespace fastfusion::FF_CAPABILITY {

// Pixels of a part of a patch.
constexpr int64_t kPart = 4096;

template <typename A>
class RunKernel {
 public:
  using V = Vector<A>;
  static constexpr int lanes = kLanes<A>;

  RunKernel(const Model<A>& model, bool backward)
      : m(model), vectors_(static_cast<int>(m.stride / lanes)) {
    // As many pixels as keep a run's pixels and scores within 256 KiB, at most 512.
    const int64_t fit = (256 << 10) / (sizeof(A) * (m.channels + m.score_rows));
    run_ = std::clamp<int64_t>(fit / lanes * lanes, 2 * lanes, 512);
    run_ = std::min(run_, padded_to_lanes(m.cut.pixels(), lanes));
    if (m.encode) {
      score_memory_.resize(Panels<A>::size(m.score_rows, m.channels));
      score_ = pack(
          score_memory_.data(), m.score_rows, m.channels,
          [&](int row, int c) { return m.score[row * m.stride + c]; },
          [&](int row) { return m.score_bias[row]; });
      if (backward) {
        score_back_memory_.resize(Panels<A>::size(m.channels, m.score_rows));
        score_back_ = pack(
            score_back_memory_.data(), m.channels, m.score_rows,
            [&](int c, int row) { return m.score[row * m.stride + c]; }, zero);
      }
    }
    pack_solver(backward);
  }

  int64_t parts() const { return (m.cut.pixels() + kPart - 1) / kPart; }

  // What a part of a patch tells the whole: highest scores, sums of exponentials, and the sums of
  // the pixels weighted by them.
  struct Encoded {
    A *highest, *sum, *average;  // (rows,), (rows,), (rows, stride)

    static int64_t size(const Model<A>& m) { return m.score_rows * (m.stride + 2); }
    Encoded(A* data, const Model<A>& m)
        : highest(data), sum(data + m.score_rows), average(data + 2 * m.score_rows) {}
  };

  // What decoding needs of a patch, and its derivatives.
  struct Patch {
    std::vector<A> latents, solved;       // (tokens, stride)
    std::vector<A> query;                 // (rows, stride): the tokens as queries' matrix
    std::vector<A> panels, token_panels;  // it, and the tokens, packed
    Panels<A> queries;
    std::vector<Panels<A>> tokens;  // of a head: (d, tokens)

    explicit Patch(const Model<A>& m)
        : latents(m.tokens * m.stride),
          solved(m.tokens * m.stride),
          query(m.score_rows * m.stride),
          panels(Panels<A>::size(m.score_rows, m.channels)),
          token_panels(m.heads * Panels<A>::size(m.width, m.tokens)),
          tokens(m.heads) {}
  };

  // Memory of one thread.
  struct Work {
    Scratch<A> memory;
    A* line;
    Block<A> x, scores, grad_y, grad_scores;

    explicit Work(const RunKernel& k, bool backward = false)
        : memory((backward ? 2 : 1) * (k.pixel_size() + k.score_size()) + k.run_ + 5 * 16) {
      line = memory.take(k.run_);
      x = {memory.take(k.pixel_size()), lanes, (k.m.channels | 1) * lanes};
      scores = {memory.take(k.score_size()), lanes, (k.m.score_rows | 1) * lanes};
      if (!backward) return;
      grad_y = {memory.take(k.pixel_size()), lanes, (k.m.channels | 1) * lanes};
      grad_scores = {memory.take(k.score_size()), lanes, (k.m.score_rows | 1) * lanes};
    }
  };

  // -- forward ------------------------------------------------------------------------------------

  // One patch, all by the calling thread.
  void forward(const LatentCall& call, const LatentResult& result, int64_t patch, Patch& p, Work& w,
               A* encoded) const {
    if (m.encode) {
      encode(call.x, patch, 0, m.cut.pixels(), w, Encoded(encoded, m));
      finish_encoding(Encoded(encoded, m), p);
    } else {
      read_latents(call.latents, patch, p.latents.data());
    }
    solve(p);
    if (!m.decode) return write_latents(p.solved.data(), patch, result.latents);
    prepare_decoding(p);
    decode(call.x, patch, 0, m.cut.pixels(), p, w, result.image,
           m.cut.pixels() <= run_ && m.encode);
  }

  // One patch, part by part in parallel.
  void forward_parts(const LatentCall& call, const LatentResult& result, int64_t patch, Patch& p,
                     std::vector<A>& encoded) const {
    if (m.encode) {
      encode_parts(call.x, patch, encoded);
      finish_encoding(Encoded(encoded.data(), m), p);
    } else {
      read_latents(call.latents, patch, p.latents.data());
    }
    solve(p);
    if (!m.decode) return write_latents(p.solved.data(), patch, result.latents);
    prepare_decoding(p);
    parallel_for(0, parts(), 1, [&](int64_t first, int64_t last) {
      Work w(*this);
      decode(call.x, patch, first * kPart, std::min(last * kPart, m.cut.pixels()), p, w,
             result.image, false);
    });
  }

  // -- backward -----------------------------------------------------------------------------------

  // The gradients that a patch's decoding sums up.
  struct Decoded {
    A *query, *query_bias, *solved;  // (rows, stride), (rows,), (tokens, stride)

    static int64_t size(const Model<A>& m) {
      return m.score_rows * (m.stride + 1) + m.tokens * m.stride;
    }
    Decoded(A* data, const Model<A>& m)
        : query(data),
          query_bias(query + m.score_rows * m.stride),
          solved(query_bias + m.score_rows) {}
  };

  // What the gradient of the pixels needs of a patch.
  struct PatchGradients {
    std::vector<A> latents, average,
        dot;                 // (tokens, stride), (rows, stride), (rows,)
    std::vector<A> inverse;  // (rows,): 1 / sums of exponentials
    std::vector<A> memory;
    Panels<A> averages, averages_back, queries_back;
    std::vector<Panels<A>> tokens;  // of a head: (tokens, d)

    explicit PatchGradients(const Model<A>& m)
        : latents(m.tokens * m.stride),
          average(m.score_rows * m.stride),
          dot(m.score_rows),
          inverse(m.score_rows),
          memory(Panels<A>::size(m.score_rows, m.channels) +
                 2 * Panels<A>::size(m.channels, m.score_rows) +
                 m.heads * Panels<A>::size(m.tokens, m.width)),
          tokens(m.heads) {}
  };

  // One patch; each_part(f) calls f(part index, first pixel, last pixel) for all parts, and
  // `partial` has room for one Encoded, Decoded or matrix of scores for each.
  template <typename EachPart>
  void backward(const LatentCall& call, const Image& grad, const void* grad_latents,
                const LatentResult& result, int64_t patch, Patch& p, PatchGradients& g,
                std::vector<A>& partial, const EachPart& each_part, Sums<A>& sums) const {
    const int64_t size = partial_size();
    std::vector<A> kept(Encoded::size(m));
    if (m.encode) {
      each_part([&](int64_t part, int64_t first, int64_t last, Work& w) {
        encode(call.x, patch, first, last, w, Encoded(&partial[part * size], m));
      });
      merge_encoded(partial, size);
      finish_encoding(Encoded(partial.data(), m), p);
      std::copy(partial.begin(), partial.begin() + Encoded::size(m), kept.begin());
    } else {
      read_latents(call.latents, patch, p.latents.data());
    }
    solve(p);
    if (m.decode) {
      prepare_decoding(p);
      prepare_gradients(p, g);
      each_part([&](int64_t part, int64_t first, int64_t last, Work& w) {
        decode_backward(call.x, grad, patch, first, last, p, g, w,
                        Decoded(&partial[part * size], m));
      });
      merge(partial, size, Decoded::size(m));
      finish_decoding(Decoded(partial.data(), m), p, g, sums);
    } else {
      read_latents(grad_latents, patch, g.latents.data());
    }
    if (m.solve) solve_backward(p, g, sums);
    if (m.encode)
      average_backward(Encoded(kept.data(), m), g, sums);
    else
      write_latents(g.latents.data(), patch, result.latents);
    each_part([&](int64_t part, int64_t first, int64_t last, Work& w) {
      A* score = &partial[part * size];
      pixels_backward(call.x, grad, patch, first, last, p, g, Encoded(kept.data(), m), w, score,
                      result.image);
    });
    if (!m.encode) return;
    merge(partial, size, m.score_rows * m.stride);
    for (int64_t n = 0; n < m.score_rows * m.stride; ++n) sums.score[n] += partial[n];
  }

  int64_t partial_size() const { return std::max(Encoded::size(m), Decoded::size(m)); }

 private:
  // -- encoding -----------------------------------------------------------------------------------

  // The exponentials of a run's scores by their highest so far; lanes without a pixel get 0.
  void mask_scores(Block<A> scores, int count) const {
    const int rest = count % lanes, last = count / lanes;
    if (rest == 0) return;
    for (int row = 0; row < m.score_rows; ++row)
      for (int lane = rest; lane < lanes; ++lane)
        scores.at(row, last)[lane] = -std::numeric_limits<A>::infinity();
  }

  void encode(const Image& x, int64_t patch, int64_t first, int64_t last, Work& w,
              Encoded to) const {
    std::fill(to.highest, to.highest + m.score_rows, -std::numeric_limits<A>::infinity());
    std::fill(to.sum, to.sum + m.score_rows, A(0));
    std::fill(to.average, to.average + m.score_rows * m.stride, A(0));
    for (int64_t pixel = first; pixel < last; pixel += run_) {
      const int count = static_cast<int>(std::min(run_, last - pixel));
      const int vectors = (count + lanes - 1) / lanes;
      Run<A>(m.cut, patch, pixel, count).read(m.type, x, 0, m.channels, w.x, w.line);
      project(score_, w.x, vectors, w.scores);
      mask_scores(w.scores, count);
      for (int row = 0; row < m.score_rows; ++row) {
        V highest = load(w.scores.at(row, 0));
        for (int n = 1; n < vectors; ++n) highest = max(highest, load(w.scores.at(row, n)));
        A most = to.highest[row];
        for (int lane = 0; lane < lanes; ++lane) most = most > highest[lane] ? most : highest[lane];
        rescale(to, row, most);
        const V shift = softmax_shift(broadcast(most));
        V sum = {};
        for (int n = 0; n < vectors; ++n) {
          const V weight = softmax_weight(load(w.scores.at(row, n)), shift);
          store(w.scores.at(row, n), weight);
          sum += weight;
        }
        to.sum[row] += fastfusion::FF_CAPABILITY::sum(sum);
      }
      multiply_lanes(w.scores, w.x, m.score_rows, m.channels, vectors, to.average, m.stride);
    }
  }

  // Bring a row to a higher highest score.
  void rescale(Encoded to, int row, A most) const {
    if (most == to.highest[row]) return;
    const A factor = softmax_weight(broadcast(to.highest[row]), softmax_shift(broadcast(most)))[0];
    to.highest[row] = most;
    to.sum[row] *= factor;
    for (int64_t c = 0; c < m.stride; ++c) to.average[row * m.stride + c] *= factor;
  }

  void encode_parts(const Image& x, int64_t patch, std::vector<A>& encoded) const {
    const int64_t size = Encoded::size(m);
    parallel_for(0, parts(), 1, [&](int64_t first, int64_t last) {
      Work w(*this);
      for (int64_t part = first; part < last; ++part)
        encode(x, patch, part * kPart, std::min((part + 1) * kPart, m.cut.pixels()), w,
               Encoded(&encoded[part * size], m));
    });
    merge_encoded(encoded, size);
  }

  // All parts into the first.
  void merge_encoded(std::vector<A>& encoded, int64_t size) const {
    Encoded whole(encoded.data(), m);
    for (int64_t part = 1; part < parts(); ++part) {
      Encoded other(&encoded[part * size], m);
      for (int row = 0; row < m.score_rows; ++row) {
        const A most = std::max(whole.highest[row], other.highest[row]);
        rescale(whole, row, most);
        rescale(other, row, most);
        whole.sum[row] += other.sum[row];
        for (int64_t c = 0; c < m.stride; ++c)
          whole.average[row * m.stride + c] += other.average[row * m.stride + c];
      }
    }
  }

  // Averages from sums, and the latents from the averages.
  void finish_encoding(Encoded e, Patch& p) const {
    for (int row = 0; row < m.score_rows; ++row) {
      const A inverse = 1 / e.sum[row];
      e.sum[row] = inverse;
      for (int64_t c = 0; c < m.stride; ++c) e.average[row * m.stride + c] *= inverse;
    }
    for (int t = 0; t < m.tokens; ++t)
      for (int head = 0; head < m.heads; ++head)
        for (int j = 0; j < m.width; ++j)
          p.latents[t * m.stride + head * m.width + j] =
              m.value_bias[head * m.width + j] + m.prompt(head, t)[j];
    for (int head = 0; head < m.heads; ++head)
      multiply_lanes(rows_of(e.average + head * m.tokens * m.stride),
                     rows_of(m.value.data() + head * m.width * m.stride), m.tokens, m.width,
                     vectors_, p.latents.data() + head * m.width, m.stride);
  }

  // -- the solver, channel by lane ----------------------------------------------------------------

  // Call f(first token, tokens, first channel) on vectors of channels, a few tokens at a time.
  template <typename F>
  void for_batches(const F& f) const {
    for (int64_t c = 0; c < m.stride; c += lanes)
      for (int first = 0; first < m.tokens; first += Phases<A>::kCount)
        f(first, std::min(Phases<A>::kCount, m.tokens - first), c);
  }

  void solve(Patch& p) const {
    p.solved = p.latents;
    if (!m.solve) return;
    for_batches([&](int first, int count, int64_t c) {
      A* at = &p.solved[first * m.stride + c];
      const Phases<A> phases(count, m.fundamental, m.squash,
                             [&](int n) { return load(at + n * m.stride); });
      for (int n = 0; n < count; ++n) {
        const V sum = evaluate_series(phases.powers(n), m.groups,
                                      [&](int i) { return load(&series_[i * m.stride + c]); });
        store(at + n * m.stride, phases.z[n] + load(&m.offset[c]) + sum);
      }
    });
  }

  void solve_backward(const Patch& p, PatchGradients& g, Sums<A>& sums) const {
    const int64_t packed = int64_t{m.groups} * kPackedGroup;
    std::vector<A> series((packed + 1) * m.stride);
    for_batches([&](int first, int count, int64_t c) {
      const Phases<A> phases(count, m.fundamental, m.squash,
                             [&](int n) { return load(&p.latents[(first + n) * m.stride + c]); });
      const auto add = [&](int64_t i, V v) {
        A* sum = &series[i * m.stride + c];
        store(sum, load(sum) + v);
      };
      for (int n = 0; n < count; ++n) {
        A* at = &g.latents[(first + n) * m.stride + c];
        const V grad = load(at);
        const Powers<V> powers = phases.powers(n);
        const V slope = evaluate_series(powers, m.groups,
                                        [&](int i) { return load(&slopes_[i * m.stride + c]); });
        coefficient_gradients(powers, m.groups, grad, add);
        add(packed, grad);
        store(at, grad * (1 + slope) * phases.slope(n));
      }
    });
    for (int c = 0; c < m.channels; ++c) {
      for (int64_t i = 0; i < packed; ++i) sums.series[c * packed + i] += series[i * m.stride + c];
      sums.offset[c] += series[packed * m.stride + c];
    }
  }

  // -- decoding -----------------------------------------------------------------------------------

  void prepare_decoding(Patch& p) const {
    std::fill(p.query.begin(), p.query.end(), A(0));
    std::vector<A> bias(m.score_rows), pack_memory(Panels<A>::size(m.tokens, m.width));
    A* next = p.token_panels.data();
    for (int head = 0; head < m.heads; ++head) {
      const auto token = [&](int t, int j) { return p.solved[t * m.stride + head * m.width + j]; };
      const Panels<A> tokens = pack(pack_memory.data(), m.tokens, m.width, token, zero);
      project(tokens, rows_of(m.query.data() + head * m.width * m.stride), vectors_,
              rows_of(p.query.data() + head * m.tokens * m.stride));
      p.tokens[head] =
          pack(next, m.width, m.tokens, [&](int j, int t) { return token(t, j); }, zero);
      next += Panels<A>::size(m.width, m.tokens);
      for (int t = 0; t < m.tokens; ++t)
        for (int j = 0; j < m.width; ++j)
          bias[head * m.tokens + t] += token(t, j) * m.query_bias[head * m.width + j];
    }
    p.queries = pack(
        p.panels.data(), m.score_rows, m.channels,
        [&](int row, int c) { return p.query[row * m.stride + c]; },
        [&](int row) { return bias[row]; });
  }

  // The attention of a run's pixels to the tokens, in w.scores.
  void attend(const Patch& p, int vectors, Work& w) const {
    project(p.queries, w.x, vectors, w.scores);
    for (int n = 0; n < vectors; ++n)
      for (int head = 0; head < m.heads; ++head)
        softmax(w.scores.at(head * m.tokens, n), w.scores.row, m.tokens);
  }

  void decode(const Image& x, int64_t patch, int64_t first, int64_t last, const Patch& p, Work& w,
              const Image& y, bool already_read) const {
    for (int64_t pixel = first; pixel < last; pixel += run_) {
      const int count = static_cast<int>(std::min(run_, last - pixel));
      const int vectors = (count + lanes - 1) / lanes;
      const Run<A> run(m.cut, patch, pixel, count);
      if (!already_read) run.read(m.type, x, 0, m.channels, w.x, w.line);
      attend(p, vectors, w);
      const Run<A> next(m.cut, std::min(patch + 1, m.cut.count() - 1), 0, count);
      for (int head = 0; head < m.heads; ++head) {
        const int64_t begin = int64_t{head} * m.width, end = begin + m.width;
        if (already_read) {  // short rows: what the processor does not foresee
          run.template prefetch<1>(m.type, y, begin, end);
          next.template prefetch<0>(m.type, x, begin, end);
        }
        project<true>(p.tokens[head], w.scores.from_row(head * m.tokens), vectors,
                      w.x.from_row(begin));
      }
      run.write(m.type, w.x, 0, m.channels, y, w.line);
    }
  }

  // -- backward -----------------------------------------------------------------------------------

  // The attention of a run's pixels (w.scores) and the gradients of its scores (w.grad_scores).
  void attend_backward(const Patch& p, const PatchGradients& g, int vectors, Work& w) const {
    attend(p, vectors, w);
    for (int head = 0; head < m.heads; ++head)
      project(g.tokens[head], w.grad_y.from_row(head * m.width), vectors,
              w.grad_scores.from_row(head * m.tokens));
    for (int n = 0; n < vectors; ++n)
      for (int head = 0; head < m.heads; ++head)
        softmax_backward(w.scores.at(head * m.tokens, n), w.grad_scores.at(head * m.tokens, n),
                         w.scores.row, m.tokens);
  }

  void prepare_gradients(const Patch& p, PatchGradients& g) const {
    A* next = g.memory.data();
    for (int head = 0; head < m.heads; ++head) {
      g.tokens[head] = pack(
          next, m.tokens, m.width,
          [&](int t, int j) { return p.solved[t * m.stride + head * m.width + j]; }, zero);
      next += Panels<A>::size(m.tokens, m.width);
    }
    g.queries_back = pack(
        next, m.channels, m.score_rows, [&](int c, int row) { return p.query[row * m.stride + c]; },
        zero);
  }

  // The gradients of the patch's tokens, both as values and in the queries' matrix.
  void decode_backward(const Image& x, const Image& grad, int64_t patch, int64_t first,
                       int64_t last, const Patch& p, const PatchGradients& g, Work& w,
                       Decoded to) const {
    std::fill(to.query, to.query + Decoded::size(m), A(0));
    for (int64_t pixel = first; pixel < last; pixel += run_) {
      const int count = static_cast<int>(std::min(run_, last - pixel));
      const int vectors = (count + lanes - 1) / lanes;
      const Run<A> run(m.cut, patch, pixel, count);
      run.read(m.type, x, 0, m.channels, w.x, w.line);
      run.read(m.type, grad, 0, m.channels, w.grad_y, w.line);
      attend_backward(p, g, vectors, w);
      multiply_lanes(w.grad_scores, w.x, m.score_rows, m.channels, vectors, to.query, m.stride);
      for (int row = 0; row < m.score_rows; ++row) {
        V total = {};
        for (int n = 0; n < vectors; ++n) total += load(w.grad_scores.at(row, n));
        to.query_bias[row] += sum(total);
      }
      for (int head = 0; head < m.heads; ++head)
        multiply_lanes(w.scores.from_row(head * m.tokens), w.grad_y.from_row(head * m.width),
                       m.tokens, m.width, vectors, to.solved + head * m.width, m.stride);
    }
  }

  // The gradients of the solved latents and of the queries' weights from those of the matrix.
  void finish_decoding(Decoded d, const Patch& p, PatchGradients& g, Sums<A>& sums) const {
    std::copy(d.solved, d.solved + m.tokens * m.stride, g.latents.begin());
    for (int head = 0; head < m.heads; ++head) {
      const int64_t row = head * m.tokens, channel = head * m.width;
      multiply_lanes(rows_of(d.query + row * m.stride),
                     rows_of(m.query.data() + channel * m.stride), m.tokens, m.width, vectors_,
                     g.latents.data() + channel, m.stride);
      project<true>(p.tokens[head], rows_of(d.query + row * m.stride), vectors_,
                    rows_of(sums.query + channel * m.stride));
      for (int t = 0; t < m.tokens; ++t)
        for (int j = 0; j < m.width; ++j) {
          g.latents[t * m.stride + channel + j] +=
              d.query_bias[row + t] * m.query_bias[channel + j];
          sums.query_bias[channel + j] +=
              d.query_bias[row + t] * p.solved[t * m.stride + channel + j];
        }
    }
  }

  // The gradients of the averages and of the values' weights from that of the latents.
  void average_backward(Encoded e, PatchGradients& g, Sums<A>& sums) const {
    std::vector<A> memory(Panels<A>::size(m.tokens, m.width) + Panels<A>::size(m.width, m.tokens));
    for (int head = 0; head < m.heads; ++head) {
      const int64_t row = head * m.tokens, channel = head * m.width;
      const auto latent = [&](int t, int j) { return g.latents[t * m.stride + channel + j]; };
      const Panels<A> forth = pack(memory.data(), m.tokens, m.width, latent, zero);
      const Panels<A> back = pack(
          memory.data() + Panels<A>::size(m.tokens, m.width), m.width, m.tokens,
          [&](int j, int t) { return latent(t, j); }, zero);
      project(forth, rows_of(m.value.data() + channel * m.stride), vectors_,
              rows_of(g.average.data() + row * m.stride));
      project<true>(back, rows_of(e.average + row * m.stride), vectors_,
                    rows_of(sums.value + channel * m.stride));
      for (int t = 0; t < m.tokens; ++t)
        for (int j = 0; j < m.width; ++j) sums.latent[(row + t) * m.width + j] += latent(t, j);
    }
    for (int row = 0; row < m.score_rows; ++row) {
      A dot = 0;
      for (int c = 0; c < m.channels; ++c)
        dot += g.average[row * m.stride + c] * e.average[row * m.stride + c];
      g.dot[row] = dot;
      g.inverse[row] = e.sum[row];
    }
    A* next = g.memory.data() + m.heads * Panels<A>::size(m.tokens, m.width) +
              Panels<A>::size(m.channels, m.score_rows);
    g.averages = pack(
        next, m.score_rows, m.channels,
        [&](int row, int c) { return g.average[row * m.stride + c]; }, zero);
    next += Panels<A>::size(m.score_rows, m.channels);
    g.averages_back = pack(
        next, m.channels, m.score_rows,
        [&](int c, int row) { return g.average[row * m.stride + c]; }, zero);
  }

  // The gradient of the pixels, and that of the scores' matrix.
  void pixels_backward(const Image& x, const Image& grad, int64_t patch, int64_t first,
                       int64_t last, const Patch& p, const PatchGradients& g, Encoded e, Work& w,
                       A* score, const Image& grad_x) const {
    std::fill(score, score + (m.encode ? m.score_rows * m.stride : 0), A(0));
    for (int64_t pixel = first; pixel < last; pixel += run_) {
      const int count = static_cast<int>(std::min(run_, last - pixel));
      const int vectors = (count + lanes - 1) / lanes;
      const Run<A> run(m.cut, patch, pixel, count);
      run.read(m.type, x, 0, m.channels, w.x, w.line);
      if (m.decode) {
        // The residual passes the gradient on: what follows is added to it.
        run.read(m.type, grad, 0, m.channels, w.grad_y, w.line);
        attend_backward(p, g, vectors, w);
        project<true>(g.queries_back, w.grad_scores, vectors, w.grad_y);
      } else {
        for (int n = 0; n < vectors; ++n)
          for (int c = 0; c < m.channels; ++c) store(w.grad_y.at(c, n), V{});
      }
      if (m.encode) {
        project(score_, w.x, vectors, w.scores);
        mask_scores(w.scores, count);
        project(g.averages, w.x, vectors, w.grad_scores);
        for (int row = 0; row < m.score_rows; ++row) {
          const V shift = softmax_shift(broadcast(e.highest[row]));
          for (int n = 0; n < vectors; ++n) {
            const V weight = softmax_weight(load(w.scores.at(row, n)), shift) * g.inverse[row];
            store(w.scores.at(row, n), weight);
            store(w.grad_scores.at(row, n), weight * (load(w.grad_scores.at(row, n)) - g.dot[row]));
          }
        }
        project<true>(score_back_, w.grad_scores, vectors, w.grad_y);
        project<true>(g.averages_back, w.scores, vectors, w.grad_y);
        multiply_lanes(w.grad_scores, w.x, m.score_rows, m.channels, vectors, score, m.stride);
      }
      if (grad_x.data) run.write(m.type, w.grad_y, 0, m.channels, grad_x, w.line);
    }
  }

  void merge(std::vector<A>& partial, int64_t size, int64_t count) const {
    for (int64_t part = 1; part < parts(); ++part)
      for (int64_t n = 0; n < count; ++n) partial[n] += partial[part * size + n];
  }

  // -- the rest -----------------------------------------------------------------------------------

  // The padded rows of a matrix as a block.
  Block<A> rows_of(A* data) const { return {data, m.stride, lanes}; }
  Block<A> rows_of(const A* data) const { return rows_of(const_cast<A*>(data)); }
  static A zero(int) { return A(0); }

  void pack_solver(bool backward) {
    if (!m.solve) return;
    const int64_t packed = int64_t{m.groups} * kPackedGroup;
    series_.resize(packed * m.stride);
    slopes_.resize(backward ? packed * m.stride : 0);
    for (int64_t c = 0; c < m.channels; ++c) {
      const A *sine = m.sine.data() + c * m.basis, *cosine = m.cosine.data() + c * m.basis;
      pack_series(sine, cosine, m.basis, m.fundamental, false, series_.data() + c, m.stride);
      if (backward)
        pack_series(sine, cosine, m.basis, m.fundamental, true, slopes_.data() + c, m.stride);
    }
  }

  void read_latents(const void* from, int64_t patch, A* to) const {
    with_stored_type<A>(m.type, [&](auto zero) {
      const auto* next = static_cast<const decltype(zero)*>(from) + patch * m.tokens * m.channels;
      for (int t = 0; t < m.tokens; ++t)
        for (int c = 0; c < m.channels; ++c) to[t * m.stride + c] = widen(*next++);
    });
  }
  void write_latents(const A* from, int64_t patch, void* to) const {
    if (to == nullptr) return;
    with_stored_type<A>(m.type, [&](auto zero) {
      using T = decltype(zero);
      T* next = static_cast<T*>(to) + patch * m.tokens * m.channels;
      for (int t = 0; t < m.tokens; ++t)
        for (int c = 0; c < m.channels; ++c) *next++ = narrow<T>(from[t * m.stride + c]);
    });
  }

  int64_t pixel_size() const { return run_ / lanes * (m.channels | 1) * lanes; }
  int64_t score_size() const { return run_ / lanes * (m.score_rows | 1) * lanes; }

  const Model<A>& m;
  int vectors_;  // of a padded row of channels
  int64_t run_;  // pixels worked on at a time
  std::vector<A> score_memory_, score_back_memory_, series_, slopes_;
  Panels<A> score_{}, score_back_{};
};

}  // namespace fastfusion::FF_CAPABILITY
