// The latent operator: which kernel takes a call, how its patches are shared out, and how the
// gradients of the parameters come together.
#include "latent_operator.h"

#include <algorithm>

#include "latent_run.h"
#include "latent_strip.h"
#include "parallel.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Whether strips of patches take fewer multiplications than runs of pixels, lanes left empty
// included, and fit the second-level cache.
template <typename A>
bool prefer_strips(const Model<A>& m) {
  constexpr int64_t lanes = kLanes<A>;
  constexpr int64_t cache = (768 << 10) / kVectorBytes;  // in vectors
  if (StripKernel<A>::working_set(m) > cache) return false;
  const double channels = m.channels, tokens = m.tokens, rows = m.score_rows;
  const double pixels = static_cast<double>(m.cut.pixels());
  const int64_t patches = m.cut.count();
  const double used_by_strips =
      static_cast<double>(patches) / static_cast<double>(padded_to_lanes(patches, lanes));
  const double vectors = static_cast<double>(padded_to_lanes(m.cut.pixels(), lanes) / lanes);
  const double used_by_runs = pixels / (vectors * lanes);
  // Bringing 16 sums of lanes together costs as much as about 4 products on each of 16 vectors.
  const double averages = rows * channels * (1 + 4 / vectors);
  double strips = 0, runs = 0;
  if (m.encode) {
    strips += rows * channels + channels * channels + tokens * channels;
    runs += rows * channels + averages + tokens * channels * channels / pixels;
  }
  if (m.decode) {
    strips += channels * channels + 2 * tokens * channels;
    runs += rows * channels + tokens * channels + tokens * channels * channels / pixels;
  }
  return strips / used_by_strips < runs / used_by_runs;
}

// Into how many sums the patches' gradients go before they are added up: enough for many threads,
// at most 32 MiB, and the same whatever the number of threads.
int64_t sum_count(int64_t units, int64_t bytes) {
  const int64_t room =
      std::clamp<int64_t>((int64_t{32} << 20) / std::max<int64_t>(bytes, 1), 2, 64);
  return std::min(units, room);
}

// All sums into the first.
template <typename A>
void merge(A* sums, int64_t size, int64_t count) {
  parallel_for(0, size, 4096, [&](int64_t first, int64_t last) {
    for (int64_t n = 1; n < count; ++n)
      for (int64_t i = first; i < last; ++i) sums[i] += sums[n * size + i];
  });
}

// The gradients of the parameters, as the operator's arguments have them.
template <typename A>
void finish(const Model<A>& m, const Sums<A>& s, const LatentResult& result) {
  const A scale = static_cast<A>(m.scale);
  const auto write = [&](void* to, int64_t at, A value) {
    if (to == nullptr) return;
    with_stored_type<A>(m.type, [&](auto zero) {
      using T = decltype(zero);
      static_cast<T*>(to)[at] = narrow<T>(value);
    });
  };
  const int64_t channels = m.channels;
  if (m.encode) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      const int64_t head = channel / m.width, j = channel % m.width;
      std::vector<A> key(channels);
      A bias = 0, key_bias = 0;
      for (int64_t row = head * m.tokens; row < (head + 1) * m.tokens; ++row) {
        const A factor = m.prompts[row * m.width + j] * scale;
        A prompt = 0;
        for (int64_t c = 0; c < channels; ++c) {
          key[c] += factor * s.score[row * m.stride + c];
          prompt += s.score[row * m.stride + c] * m.key[channel * m.stride + c];
        }
        write(result.prompts, row * m.width + j, s.latent[row * m.width + j] + scale * prompt);
        bias += s.latent[row * m.width + j];
        // The softmax does not see the keys' bias: its gradient is 0, or NaN like the scores'.
        key_bias += 0 * prompt;
      }
      for (int64_t c = 0; c < channels; ++c) {
        write(result.key_weight, channel * channels + c, key[c]);
        write(result.value_weight, channel * channels + c, s.value[channel * m.stride + c]);
      }
      write(result.key_bias, channel, key_bias);
      write(result.value_bias, channel, bias);
    }
  }
  if (m.decode) {
    for (int64_t channel = 0; channel < channels; ++channel) {
      for (int64_t c = 0; c < channels; ++c)
        write(result.query_weight, channel * channels + c, scale * s.query[channel * m.stride + c]);
      write(result.query_bias, channel, scale * s.query_bias[channel]);
    }
  }
  if (m.solve) {
    std::vector<A> sine(m.basis), cosine(m.basis);
    for (int64_t channel = 0; channel < channels; ++channel) {
      const A* series = s.series + channel * m.groups * kPackedGroup;
      unpack_gradients([&](int64_t i) { return series[i]; }, m.basis, sine.data(), cosine.data());
      for (int64_t q = 0; q < m.basis; ++q) {
        write(result.sine, channel * m.basis + q, sine[q]);
        write(result.cosine, channel * m.basis + q, cosine[q]);
      }
      write(result.offset, channel, s.offset[channel]);
    }
  }
}

template <typename A>
void forward(const LatentCall& call, const LatentResult& result) {
  const Model<A> model(call);
  if (prefer_strips(model)) {
    const StripKernel<A> kernel(model, false);
    parallel_for(0, kernel.strips(), 1, [&](int64_t first, int64_t last) {
      typename StripKernel<A>::Forward work(kernel);
      for (int64_t strip = first; strip < last; ++strip) kernel.forward(call, result, strip, work);
    });
    return;
  }
  const RunKernel<A> kernel(model, false);
  using Patch = typename RunKernel<A>::Patch;
  const int64_t encoded_size = RunKernel<A>::Encoded::size(model);
  if (kernel.parts() > 1) {
    Patch patch(model);
    std::vector<A> encoded(kernel.parts() * encoded_size);
    for (int64_t n = 0; n < model.cut.count(); ++n)
      kernel.forward_parts(call, result, n, patch, encoded);
    return;
  }
  parallel_for(0, model.cut.count(), 1, [&](int64_t first, int64_t last) {
    Patch patch(model);
    typename RunKernel<A>::Work work(kernel);
    std::vector<A> encoded(encoded_size);
    for (int64_t n = first; n < last; ++n)
      kernel.forward(call, result, n, patch, work, encoded.data());
  });
}

template <typename A>
void backward(const LatentCall& call, const Image& grad, const void* grad_latents,
              const LatentResult& result) {
  const Model<A> model(call);
  const int64_t size = Sums<A>::size(model), bytes = size * static_cast<int64_t>(sizeof(A));

  // Call f(first unit, last unit, sums) on each share of the units.
  std::vector<A> memory;
  const auto share_out = [&](int64_t units, const auto& f) {
    const int64_t count = sum_count(units, bytes);
    memory.assign(count * size, A(0));
    parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        Sums<A> sums(memory.data() + n * size, model);
        f(n * units / count, (n + 1) * units / count, sums);
      }
    });
    merge(memory.data(), size, count);
  };

  if (prefer_strips(model)) {
    const StripKernel<A> kernel(model, true);
    share_out(kernel.strips(), [&](int64_t first, int64_t last, Sums<A>& sums) {
      typename StripKernel<A>::Backward work(kernel);
      for (int64_t strip = first; strip < last; ++strip)
        kernel.backward(call, grad, grad_latents, result, strip, work, sums);
      kernel.finish(work, sums);
    });
  } else {
    const RunKernel<A> kernel(model, true);
    using Patch = typename RunKernel<A>::Patch;
    using PatchGradients = typename RunKernel<A>::PatchGradients;
    using Work = typename RunKernel<A>::Work;
    const int64_t pixels = model.cut.pixels();
    if (kernel.parts() > 1) {
      memory.assign(size, A(0));
      Sums<A> sums(memory.data(), model);
      Patch patch(model);
      PatchGradients gradients(model);
      std::vector<A> partial(kernel.parts() * kernel.partial_size());
      const auto each_part = [&](const auto& f) {
        parallel_for(0, kernel.parts(), 1, [&](int64_t first, int64_t last) {
          Work work(kernel, true);
          for (int64_t part = first; part < last; ++part)
            f(part, part * kPart, std::min((part + 1) * kPart, pixels), work);
        });
      };
      for (int64_t n = 0; n < model.cut.count(); ++n)
        kernel.backward(call, grad, grad_latents, result, n, patch, gradients, partial, each_part,
                        sums);
    } else {
      share_out(model.cut.count(), [&](int64_t first, int64_t last, Sums<A>& sums) {
        Patch patch(model);
        PatchGradients gradients(model);
        Work work(kernel, true);
        std::vector<A> partial(kernel.partial_size());
        const auto each_part = [&](const auto& f) { f(int64_t{0}, int64_t{0}, pixels, work); };
        for (int64_t n = first; n < last; ++n)
          kernel.backward(call, grad, grad_latents, result, n, patch, gradients, partial, each_part,
                          sums);
      });
    }
  }
  finish(model, Sums<A>(memory.data(), model), result);
}

}  // namespace

void latent_forward(const LatentCall& call, const LatentResult& result) {
  if (call.type == Type::kDouble)
    forward<double>(call, result);
  else
    forward<float>(call, result);
}

void latent_backward(const LatentCall& call, const Image& grad, const void* grad_latents,
                     const LatentResult& result) {
  if (call.type == Type::kDouble)
    backward<double>(call, grad, grad_latents, result);
  else
    backward<float>(call, grad, grad_latents, result);
}

}  // namespace fastfusion::FF_CAPABILITY
