// CoFusion's multiscale attention on the CPU: tile by tile, so that the responses of the filters
// never leave the cache. The backward pass makes them again, and from them the gradient of each
// response, which is then that of a depthwise convolution.
#include "multiscale_attention.h"

#include "depthwise_image.h"
#include "depthwise_slab.h"
#include "parallel.h"

namespace fastfusion::FF_CAPABILITY {
namespace {

// Call f(b, channel, channels, row, column, columns, responses, offset) for each line of each tile:
// `responses[s]` holds that line's responses to filter s.
template <typename T, typename F>
void for_responses(const Image& x, const std::vector<FilterView>& views, bool across, const F& f) {
  using A = Accumulator<T>;
  std::vector<Filter<A>> filters;
  int64_t row_edge = 0, column_edge = 0;
  for (const FilterView& view : views) {
    filters.push_back(Filter<A>::template pack<T>(view, x.channels, across, false));
    row_edge = std::max(row_edge, view.shape.row_padding());
    column_edge = std::max(column_edge, view.shape.column_padding());
  }
  // Tiles whose halo costs little and whose slabs stay in the cache: one channel at a time along
  // the columns, some at a time across.
  const int64_t channels = across ? std::min<int64_t>(x.channels, 64) : 1;
  const int64_t rows = std::max<int64_t>(across ? 8 : 16, row_edge);
  const int64_t columns =
      std::min(x.columns, std::max<int64_t>(across ? 32 : 512, 2 * column_edge));
  const int64_t bands = (x.rows + rows - 1) / rows, strips = (x.columns + columns - 1) / columns;
  const int64_t blocks = (x.channels + channels - 1) / channels;
  parallel_for(0, x.batch * blocks * bands, 1, [&](int64_t begin, int64_t end) {
    Slab<A> input(across, channels, rows + 2 * row_edge, columns + 2 * column_edge);
    std::vector<Slab<A>> made;
    for (size_t s = 0; s < views.size(); ++s) made.emplace_back(across, channels, rows, columns);
    std::vector<const A*> pointers, lines(views.size());
    for (int64_t unit = begin; unit < end; ++unit) {
      // Across the channels, those of a band follow each other; along, the bands of a channel.
      const int64_t b = unit / (blocks * bands), rest = unit % (blocks * bands);
      const int64_t block = across ? rest % blocks : rest / bands;
      const int64_t band = across ? rest / blocks : rest % bands;
      const int64_t channel = block * channels, count = std::min(channels, x.channels - channel);
      const int64_t first = band * rows, last = std::min(x.rows, first + rows);
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t left = strip * columns, right = std::min(x.columns, left + columns);
        input.first_column = left - column_edge;
        copy_into<T>(input, across, x, b, channel, count, first - row_edge, last + row_edge,
                     left - column_edge, right + column_edge);
        for (size_t s = 0; s < views.size(); ++s) {
          made[s].first_column = left;
          convolve_slab(filters[s], channel, count, input, x.rows, made[s], first, last, left,
                        right, pointers);
        }
        for (int64_t row = first; row < last; ++row) {
          for (size_t s = 0; s < views.size(); ++s) lines[s] = made[s].at(0, row, left);
          f(Line<A>{lines[0], b, channel, row, left, right - left, count, made[0].step()}, lines);
        }
      }
    }
  });
}

// Call f(responses at `offset` of the line, offset in the image, count) for the line's vectors.
template <typename A, typename F>
FF_INLINE void for_places(bool across, const Line<A>& line, const Image& image, const F& f) {
  const auto place = [&](Vector<A>, const A* sums, int64_t offset, int count) {
    f(sums - line.sums, offset, count);
  };
  if (across) {
    for_vectors<true>(line, image, place);
  } else {
    for_vectors<false>(line, image, place);
  }
}

// Over the scales at one place: the largest response r, the sum of e^(r - largest), and the mean of
// the responses weighted by these.
template <typename A>
struct Softmax {
  Vector<A> largest, total, mean;

  Softmax(const std::vector<const A*>& lines, int64_t place) {
    largest = load(lines[0] + place);
    for (size_t s = 1; s < lines.size(); ++s) largest = max(load(lines[s] + place), largest);
    total = mean = Vector<A>{};
    for (const A* line : lines) {
      const Vector<A> r = load(line + place), e = exp(r - largest);
      total += e;
      mean = fma(e, r, mean);
    }
    mean /= total;
  }
};

}  // namespace

void multiscale_attention(Type type, const Image& x, const std::vector<FilterView>& filters,
                          bool across, const Image& y) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    for_responses<T>(x, filters, across,
                     [&](const Line<A>& line, const std::vector<const A*>& lines) {
                       T* to = y.at<T>(line.b, line.channel, line.row, line.column);
                       for_places(across, line, y, [&](int64_t place, int64_t offset, int count) {
                         const Vector<A> mean = Softmax<A>(lines, place).mean;
                         if (count == kLanes<A>) {
                           store(to + offset, mean);
                         } else {
                           store(to + offset, mean, count);
                         }
                       });
                     });
  });
}

void multiscale_attention_backward(Type type, const Image& grad, const Image& x,
                                   const std::vector<FilterView>& filters, bool across,
                                   const Image& grad_x, const std::vector<void*>& grad_weights,
                                   const std::vector<void*>& grad_biases) {
  with_type(type, [&](auto zero) {
    using T = decltype(zero);
    using A = Accumulator<T>;
    const int64_t size = x.batch * x.channels * x.rows * x.columns;
    std::vector<Buffer<A>> memory;
    std::vector<Image> responses;  // first the gradients of the responses
    for (size_t s = 0; s < filters.size(); ++s) {
      memory.emplace_back(size);
      responses.push_back(grad);
      responses.back().data = memory.back().get();
    }
    for_responses<T>(
        x, filters, across, [&](const Line<A>& line, const std::vector<const A*>& lines) {
          const T* from = grad.at<T>(line.b, line.channel, line.row, line.column);
          for_places(across, line, grad, [&](int64_t place, int64_t offset, int count) {
            const Softmax<A> softmax(lines, place);
            const Vector<A> g = load(from + offset, count);
            for (size_t s = 0; s < lines.size(); ++s) {
              const Vector<A> r = load(lines[s] + place);
              const Vector<A> share = exp(r - softmax.largest) / softmax.total;
              A* to = responses[s].at<A>(line.b, line.channel, line.row, line.column);
              store(to + offset, g * share * (1 + r - softmax.mean), count);
            }
          });
        });
    for (size_t s = 0; s < filters.size(); ++s) {
      if (grad_weights[s] != nullptr || grad_biases[s] != nullptr)
        weight_gradient<T, T, A>(x, responses[s], filters[s].shape, across,
                                 static_cast<T*>(grad_weights[s]), static_cast<T*>(grad_biases[s]));
    }
    if (grad_x.data == nullptr) return;
    const Buffer<A> sum_memory(size), part_memory(size);
    Image sum = grad, part = grad;
    sum.data = sum_memory.get();
    part.data = part_memory.get();
    for (size_t s = 0; s < filters.size(); ++s) {
      FilterView plain = filters[s];
      plain.bias = nullptr;
      convolve_image<T, A, A>(responses[s], plain, true, across, s == 0 ? sum : part);
      if (s > 0)
        for_elements<A>(size, [&](int64_t i, int count) {
          store(&sum_memory[i], load(&sum_memory[i], count) + load(&part_memory[i], count), count);
        });
    }
    for_elements<A>(size, [&](int64_t i, int count) {
      store(grad_x.at<T>(0, 0) + i, load(&sum_memory[i], count), count);
    });
  });
}

}  // namespace fastfusion::FF_CAPABILITY
