// The depthwise convolution and the two attentions that stand on it, forward and backward.
//
// depthwise_kernel: 8 rows of a column a thread (correlate.h), every image read from memory once
// and written once. depthwise_tile_kernel: the same sums for the filters of float32 that would wait
// for their addresses rather than for memory, out of tiles in shared memory, the next of which is
// on its way while one is summed up. depthwise_weight_bwd_kernel: a block takes one channel (or 32
// of them in channels_last) of a chunk of the image and goes through it once for each column of
// taps, the chunk in the first-level cache; a thread holds the sums of P taps of a column in
// registers and slides their window down its column. The chunks' sums are added in order by a
// second kernel, so that a result has one value however the blocks are scheduled.
#include <algorithm>
#include <string>
#include <type_traits>

#include "../bindings/schemas.h"
#include "../bindings/torch_calls.h"
#include "correlate.h"

namespace fastfusion::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kSums = 8;        // pixels that a thread computes
constexpr int kChunkRows = 32;  // of the image, whose products one block adds up

template <typename T>
__device__ void put(const View<T>& y, const View<const float>& plus, int64_t batch, int64_t channel,
                    int64_t row, int64_t column, float value) {
  if (plus.data != nullptr) value += *plus.at(batch, channel, row, column);
  *y.at(batch, channel, row, column) = narrow<T>(value);
}

// y = act(filter(x)) + plus; with SLOPE y = grad * act'(filter(x)).
template <typename In, typename W, typename Out, int K, bool LAST, bool SLOPE>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_kernel(View<const In> x, Filter<W> filter, Activation activation, View<const W> grad,
                     View<const float> plus, View<Out> y, Shape image, Shape units) {
  const Place at = place<LAST>(units);
  if (!at.inside) return;
  const int rows = static_cast<int>(image.rows);
  int row = first_row<kSums>(at.row, rows, filter.row_dilation);
  float sum[kSums];
  correlate<kSums, K>(x, filter, image, at.image, at.channel, row, static_cast<int>(at.column),
                      sum);
#pragma unroll
  for (int i = 0; i < kSums; ++i, row += filter.row_dilation) {
    if (row >= rows) return;
    float value;
    if constexpr (SLOPE)
      value = widen(*grad.at(at.image, at.channel, row, at.column)) * slope(activation, sum[i]);
    else
      value = activate(activation, sum[i]);
    put(y, plus, at.image, at.channel, row, at.column, value);
  }
}

// A tile of a plane, and what the filter sees around it; K x K taps, D apart. Whole lattices of
// rows.
template <int K, int D>
struct alignas(16) DepthwiseTile {
  static constexpr int kGroups = D == 1 ? 4 : 2 * D;  // of kSums rows
  static constexpr int kRows = kSums * kGroups, kColumns = 64;
  static constexpr int kReach = K / 2 * D, kMargin = (kReach + 3) / 4 * 4;  // copies of 16 bytes
  static constexpr int kLines = kRows + 2 * kReach, kLine = kColumns + 2 * kMargin;
  static constexpr int kThreads = kColumns * kGroups;

  float value[2][kLines][kLine];
  float taps[K * K];
};

// y = act(filter(x)) + plus. A block has `tiles` tiles, one below the other, of one plane; rows lie
// at multiples of 16 bytes.
template <int K, int D>
__global__ void __launch_bounds__(DepthwiseTile<K, D>::kThreads, 2)
    depthwise_tile_kernel(View<const float> x, Filter<float> filter, Activation activation,
                          View<const float> plus, View<float> y, Shape image, int tiles,
                          unsigned across, unsigned down) {
  using Tile = DepthwiseTile<K, D>;
  Tile& tile = shared_memory<Tile>();
  const int rows = static_cast<int>(image.rows), columns = static_cast<int>(image.columns);
  const int first_column = static_cast<int>(blockIdx.x % across) * Tile::kColumns;
  const int first_tile = static_cast<int>(blockIdx.x / across % down) * tiles;
  const int64_t plane = blockIdx.x / across / down;
  const int64_t channel = plane % image.channels, batch = plane / image.channels;
  const auto top = [&](int t) { return (first_tile + t) * Tile::kRows; };
  const auto fetch = [&](int t) {
    constexpr int kPieces = Tile::kLine / 4;
    for (int i = threadIdx.x; i < Tile::kLines * kPieces; i += Tile::kThreads) {
      const int line = i / kPieces, at = i % kPieces * 4;
      const int row = top(t) - Tile::kReach + line, column = first_column - Tile::kMargin + at;
      const bool seen = row >= 0 && row < rows && column >= 0 && column < columns;
      const int there = !seen ? 0 : columns - column < 4 ? columns - column : 4;
      const float* from = seen ? x.at(batch, channel, row, column) : x.data;
      copy_async<4>(&tile.value[t % 2][line][at], from, there);
    }
  };
  const int left = (rows - top(0) + Tile::kRows - 1) / Tile::kRows;
  const int count = left < tiles ? left : tiles;
  const int column = static_cast<int>(threadIdx.x) % Tile::kColumns;
  const int line = first_row<kSums>(threadIdx.x / Tile::kColumns, Tile::kRows, D);

  fetch(0);
  commit_copies();
  if (threadIdx.x < K * K)
    tile.taps[threadIdx.x] = filter.taps[channel * filter.channel + threadIdx.x * filter.tap];
  for (int t = 0; t < count; ++t) {
    wait_for_copies<0>();
    __syncthreads();  // this tile is here, and nobody needs the one before any more
    if (t + 1 < count) fetch(t + 1);
    commit_copies();
    float sum[kSums] = {};
#pragma unroll 1
    for (int q = 0; q < K; ++q) {
      const float* from = &tile.value[t % 2][line][Tile::kMargin - Tile::kReach + column + q * D];
      const auto next = [&] {
        const float value = *from;
        from += D * Tile::kLine;
        return value;
      };
      add_column<kSums, K>(next, tile.taps + q, K, sum);
    }
    add_bias(filter, channel, sum);
    int row = top(t) + line;
    const int to = first_column + column;
#pragma unroll
    for (int i = 0; i < kSums; ++i, row += D)
      if (row < rows && to < columns)
        put(y, plus, batch, channel, row, to, activate(activation, sum[i]));
  }
}

// -- gradients of the filters --------------------------------------------------------------------

template <int P, bool LAST>
struct WeightSums {
  float value[kThreads / kWarp][P + 1][LAST ? kWarp : 1];
};

// The sums over a chunk, for each channel: kh x kw taps, then the gradient itself (the bias).
// `partial` is (chunks, C, kh * kw + 1).
template <typename T, typename G, int P, bool LAST>
__global__ void __launch_bounds__(kThreads, 2)
    depthwise_weight_bwd_kernel(View<const T> x, View<const G> grad, float* partial, Shape image,
                                int kh, int kw, int row_dilation, int column_dilation) {
  const int lane = threadIdx.x, warp = threadIdx.y;
  const int rows = static_cast<int>(image.rows), columns = static_cast<int>(image.columns);
  // Which channels, image, rows and columns this block has.
  const int width = LAST ? kThreads / kWarp : kThreads;
  const unsigned channel_tiles =
      static_cast<unsigned>(LAST ? (image.channels + kWarp - 1) / kWarp : image.channels);
  const unsigned column_tiles = (columns + width - 1) / width;
  const unsigned row_tiles = (rows + kChunkRows - 1) / kChunkRows;
  const int64_t chunk = blockIdx.x / channel_tiles;
  const int64_t channel =
      static_cast<int64_t>(blockIdx.x % channel_tiles) * (LAST ? kWarp : 1) + (LAST ? lane : 0);
  unsigned rest = static_cast<unsigned>(chunk);
  const int column = rest % column_tiles * width + (LAST ? warp : warp * kWarp + lane);
  rest /= column_tiles;
  const int begin = rest % row_tiles * kChunkRows;
  const int end = begin + kChunkRows < rows ? begin + kChunkRows : rows;
  const int64_t batch = rest / row_tiles;
  const bool busy = channel < image.channels && column < columns;

  auto& sums = shared_memory<WeightSums<P, LAST>>();
  for (int q = 0; q < kw; ++q) {
    const int from_column = column + (q - kw / 2) * column_dilation;
    const bool seen = busy && from_column >= 0 && from_column < columns;
    for (int first = 0; first < kh; first += P) {
      float sum[P + 1] = {};
      if (busy) {
        for (int phase = 0; phase < row_dilation && begin + phase < end; ++phase) {
          int row = begin + phase;
          int from_row = row + (first - kh / 2) * row_dilation;
          const auto next = [&] {
            const bool inside = seen && from_row >= 0 && from_row < rows;
            const float value = inside ? widen(*x.at(batch, channel, from_row, from_column)) : 0.0f;
            from_row += row_dilation;
            return value;
          };
          float window[P];  // a ring: in step s its first value is window[s]
#pragma unroll
          for (int j = 0; j < P - 1; ++j) window[j] = next();
          while (row < end) {
#pragma unroll
            for (int s = 0; s < P; ++s) {
              if (row >= end) break;
              window[(s + P - 1) % P] = next();
              const float g = widen(*grad.at(batch, channel, row, column));
#pragma unroll
              for (int j = 0; j < P; ++j) sum[j] += g * window[(s + j) % P];
              sum[P] += g;
              row += row_dilation;
            }
          }
        }
      }
#pragma unroll
      for (int j = 0; j <= P; ++j) {
        const float total = LAST ? sum[j] : warp_sum(sum[j]);
        if (LAST || lane == 0) sums.value[warp][j][LAST ? lane : 0] = total;
      }
      __syncthreads();
      // Warp by warp in order; a thread adds up one tap (of its lane's channel).
      for (int j = LAST ? warp : lane; j <= P; j += LAST ? kThreads / kWarp : kWarp) {
        const bool bias = j == P;
        if ((!LAST && warp > 0) || channel >= image.channels) break;
        if (bias ? q > 0 || first > 0 : first + j >= kh) continue;
        float total = 0;
        for (int w = 0; w < kThreads / kWarp; ++w) total += sums.value[w][j][LAST ? lane : 0];
        const int tap = bias ? kh * kw : (first + j) * kw + q;
        partial[(chunk * image.channels + channel) * (kh * kw + 1) + tap] = total;
      }
      __syncthreads();
    }
  }
}

// Adds up the chunks in order. A thread has one tap, or the bias, of one channel.
template <typename T>
__global__ void depthwise_reduce_bwd_kernel(const float* partial, int64_t chunks, int64_t channels,
                                            int taps, T* grad_weight, T* grad_bias) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t count = channels * (taps + 1);
  if (index >= count) return;
  float sum = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * count + index];
  const int64_t channel = index / (taps + 1);
  const int tap = static_cast<int>(index % (taps + 1));
  if (tap == taps) {
    if (grad_bias != nullptr) grad_bias[channel] = narrow<T>(sum);
  } else if (grad_weight != nullptr) {
    grad_weight[channel * taps + tap] = narrow<T>(sum);
  }
}

// -- the attentions ------------------------------------------------------------------------------

// y = x * (attention + bias), or with `grad` its gradients: that of x and that of the attention.
template <typename T, bool LAST>
__global__ void __launch_bounds__(kThreads, 2)
    attend_kernel(View<const T> x, View<const float> attention, const T* bias, View<const T> grad,
                  View<T> y, View<float> grad_x, View<float> grad_attention, Shape image) {
  const Place at = place<LAST>(image);
  if (!at.inside) return;
  const auto there = [&](const auto& view) {
    return view.at(at.image, at.channel, at.row, at.column);
  };
  const float weight = *there(attention) + (bias == nullptr ? 0.0f : widen(bias[at.channel]));
  const float value = widen(*there(x));
  if (y.data != nullptr) *there(y) = narrow<T>(value * weight);
  if (grad_x.data != nullptr) *there(grad_x) = widen(*there(grad)) * weight;
  if (grad_attention.data != nullptr) *there(grad_attention) = widen(*there(grad)) * value;
}

constexpr int kMostScales = 8;

struct Scales {
  int count;
  int rows[kMostScales], columns[kMostScales], first[kMostScales];
};

template <typename T>
__device__ Filter<T> scale_of(const Filter<T>& packed, const Scales& scales, int s,
                              int64_t channels) {
  Filter<T> filter = packed;
  filter.taps += scales.first[s] * packed.tap;
  filter.bias += s * channels;
  filter.rows = scales.rows[s];
  filter.columns = scales.columns[s];
  return filter;
}

// Several filters of one image, weighted by the softmax over their responses, which runs along.
// With `grad` what is written is the gradient of each response, (S, B, C, H, W).
template <typename T, bool LAST, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 2)
    multiscale_kernel(View<const T> x, Filter<T> packed, Scales scales, View<const T> grad,
                      View<T> y, View<float> grad_response, int64_t response_step, Shape image,
                      Shape units) {
  const Place at = place<LAST>(units);
  if (!at.inside) return;
  const int rows = static_cast<int>(image.rows), column = static_cast<int>(at.column);
  const int row = first_row<kSums>(at.row, rows, 1);
  float most[kSums], total[kSums], weighted[kSums], response[kSums];
#pragma unroll
  for (int i = 0; i < kSums; ++i) most[i] = -INFINITY, total[i] = 0, weighted[i] = 0;
  for (int s = 0; s < scales.count; ++s) {
    const Filter<T> filter = scale_of(packed, scales, s, image.channels);
    correlate<kSums, 0>(x, filter, image, at.image, at.channel, row, column, response);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const float r = response[i], higher = fmaxf(most[i], r);
      const float before = expf(most[i] - higher), now = expf(r - higher);
      total[i] = total[i] * before + now;
      weighted[i] = weighted[i] * before + now * r;
      most[i] = higher;
    }
  }
  if constexpr (!BACKWARD) {
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      if (row + i < rows)
        *y.at(at.image, at.channel, row + i, column) = narrow<T>(weighted[i] / total[i]);
  } else {
    for (int s = 0; s < scales.count; ++s) {
      const Filter<T> filter = scale_of(packed, scales, s, image.channels);
      correlate<kSums, 0>(x, filter, image, at.image, at.channel, row, column, response);
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (row + i >= rows) break;
        const float share = expf(response[i] - most[i]) / total[i];
        const float g = widen(*grad.at(at.image, at.channel, row + i, column));
        grad_response.at(at.image, at.channel, row + i, column)[s * response_step] =
            g * share * (1.0f + response[i] - weighted[i] / total[i]);
      }
    }
  }
}

// -- launches ------------------------------------------------------------------------------------

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "silu") return Activation::kSilu;
  return Activation::kNone;
}

bool is_last(const Tensor& x) { return layout_of(x) == MemoryFormat::ChannelsLast; }

Tensor float_image(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, x.device(), std::nullopt,
                              layout_of(x));
}
Tensor float_image(const Tensor& x) { return float_image(x, shape_of(x)); }

// The filters of an operator: (C, taps) for images along the columns; taps by channels for
// channels_last, where the lanes are channels. Owns the copies that may need.
struct Taps {
  Tensor weight;
  MaybeTensor bias;
  int64_t channels, rows, columns, row_dilation, column_dilation;
  bool last;

  Taps(const Tensor& w, const MaybeTensor& b, int64_t rows, int64_t columns, int64_t row_dilation,
       int64_t column_dilation, bool last)
      : weight(torch::stable::contiguous(w)),
        channels(w.size(0)),
        rows(rows),
        columns(columns),
        row_dilation(row_dilation),
        column_dilation(column_dilation),
        last(last) {
    const int64_t taps = weight.numel() / std::max<int64_t>(channels, 1);
    weight = torch::stable::reshape(weight, {channels, taps});
    if (last) weight = torch::stable::contiguous(torch::stable::transpose(weight, 0, 1));
    if (b) bias = torch::stable::contiguous(*b);
    STD_TORCH_CHECK(rows * row_dilation < (1 << 30) && columns * column_dilation < (1 << 30),
                    "dilation is too large");
  }

  template <typename T>
  Filter<T> filter() const {
    return {data<const T>(weight),          bias ? data<const T>(*bias) : nullptr,
            last ? 1 : weight.size(1),      last ? channels : 1,
            static_cast<int>(rows),         static_cast<int>(columns),
            static_cast<int>(row_dilation), static_cast<int>(column_dilation)};
  }

  // Turned round and without its bias, as the gradient of the image wants it.
  template <typename T>
  Filter<T> turned() const {
    Filter<T> filter = this->filter<T>();
    filter.taps += (rows * columns - 1) * filter.tap;
    filter.tap = -filter.tap;
    filter.bias = nullptr;
    return filter;
  }
};

Shape units_of(const Tensor& x, int64_t dilation) {
  STD_TORCH_CHECK(x.size(2) < (1 << 30) && x.size(3) < (1 << 30), "the image is too large");
  return {x.size(0), x.size(1), row_groups<kSums>(x.size(2), dilation), x.size(3)};
}

template <typename T>
View<T> maybe_view(const MaybeTensor& x) {
  return x ? view<T>(*x) : View<T>{};
}

// Whether copies of 16 bytes can be made of the rows of an image.
bool in_sixteens(const View<const float>& x) {
  const auto whole = [](int64_t step) { return step % 4 == 0; };
  return x.column == 1 && whole(x.row) && whole(x.channel) && whole(x.batch) &&
         reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
}

// Blocks that fill a large GPU: four for each multiprocessor of an H200.
constexpr int64_t kFilled = 528;
template <int N>
constexpr std::integral_constant<int, N> kInt{};
constexpr int64_t kMostTiles = 4;  // of a block: the first of them is waited for

template <int K, int D>
void convolve_tiles(const Stream& stream, const View<const float>& x, const Filter<float>& filter,
                    Activation activation, const View<const float>& plus, const Tensor& y) {
  using Tile = DepthwiseTile<K, D>;
  const Shape image = shape(y);
  const int64_t planes = image.batch * image.channels;
  const int64_t across = divided(image.columns, Tile::kColumns);
  const int64_t tall = divided(image.rows, Tile::kRows);
  const int64_t tiles = std::clamp<int64_t>(planes * across * tall / kFilled, 1, kMostTiles);
  const int64_t down = divided(tall, tiles);
  launch(stream, planes * across * down, dim3(Tile::kThreads), depthwise_tile_kernel<K, D>, x,
         filter, activation, plus, view<float>(y), image, tiles, across, down);
}

// y = act(filter(x)) + plus.
template <typename In, typename W, typename Out>
void convolve(const Stream& stream, const Tensor& x, const Filter<W>& filter, Activation activation,
              const MaybeTensor& plus, const Tensor& y) {
  const bool last = is_last(y);
  const Shape units = units_of(x, filter.row_dilation);
  const int square = filter.rows == filter.columns ? filter.rows : 0;
  if constexpr (std::is_same_v<In, float> && std::is_same_v<W, float> &&
                std::is_same_v<Out, float>) {
    const View<const float> from = view<const float>(x), added = maybe_view<const float>(plus);
    const int64_t step = filter.row_dilation == filter.column_dilation ? filter.row_dilation : 0;
    const auto tiles = [&](auto size, auto dilation) {
      constexpr int kSize = decltype(size)::value, kDilation = decltype(dilation)::value;
      if (last || square != kSize || step != kDilation || !in_sixteens(from)) return false;
      convolve_tiles<kSize, kDilation>(stream, from, filter, activation, added, y);
      return true;
    };
    if (tiles(kInt<5>, kInt<1>) || tiles(kInt<7>, kInt<1>) || tiles(kInt<7>, kInt<3>)) return;
  }
  const Grid grid = grid_over(units, last);
  with_bool(last, [&](auto pixels) {
    constexpr bool kLast = decltype(pixels)::value;
    const auto run = [&](auto* kernel) {
      launch(stream, grid.blocks, grid.threads, kernel, view<const In>(x), filter, activation,
             View<const W>{}, maybe_view<const float>(plus), view<Out>(y), shape(x), units);
    };
    if constexpr (std::is_same_v<In, W> && std::is_same_v<W, Out>) {
      if (square == 3) return run(depthwise_kernel<In, W, Out, 3, kLast, false>);
      if (square == 5) return run(depthwise_kernel<In, W, Out, 5, kLast, false>);
      if (square == 7) return run(depthwise_kernel<In, W, Out, 7, kLast, false>);
    }
    run(depthwise_kernel<In, W, Out, 0, kLast, false>);
  });
}

// grad * act'(filter(x)), in float.
template <typename T>
Tensor slopes(const Stream& stream, const Tensor& x, const Filter<T>& filter, Activation activation,
              const Tensor& grad) {
  const Tensor y = float_image(x);
  const Shape units = units_of(x, filter.row_dilation);
  const Grid grid = grid_over(units, is_last(y));
  with_bool(is_last(y), [&](auto pixels) {
    launch(stream, grid.blocks, grid.threads,
           depthwise_kernel<T, T, float, 0, decltype(pixels)::value, true>, view<const T>(x),
           filter, activation, view<const T>(grad), View<const float>{}, view<float>(y), shape(x),
           units);
  });
  return y;
}

// The gradients of a filter (C, 1, kh, kw) and of its bias, given that of its response.
template <typename T, typename G, typename Out>
void weight_gradient(const Stream& stream, const Tensor& x, const Tensor& grad, const Taps& filter,
                     Out* grad_weight, Out* grad_bias) {
  if (grad_weight == nullptr && grad_bias == nullptr) return;
  const bool last = is_last(x);
  const int64_t taps = filter.rows * filter.columns, channels = x.size(1);
  const int64_t width = last ? kThreads / kWarp : kThreads;
  const int64_t chunks = x.size(0) * divided(x.size(2), kChunkRows) * divided(x.size(3), width);
  const Tensor partial = torch::stable::empty({chunks, channels, taps + 1}, ScalarType::Float,
                                              std::nullopt, x.device());
  const int64_t blocks = chunks * (last ? divided(channels, kWarp) : channels);
  with_bool(last, [&](auto pixels) {
    constexpr bool kLast = decltype(pixels)::value;
    const auto run = [&](auto* kernel) {
      launch(stream, blocks, dim3(kWarp, kThreads / kWarp), kernel, view<const T>(x),
             view<const G>(grad), data<float>(partial), shape(x), filter.rows, filter.columns,
             filter.row_dilation, filter.column_dilation);
    };
    if (filter.rows <= 3)
      run(depthwise_weight_bwd_kernel<T, G, 3, kLast>);
    else
      run(depthwise_weight_bwd_kernel<T, G, 8, kLast>);
  });
  launch(stream, divided(channels * (taps + 1), kThreads), dim3(kThreads),
         depthwise_reduce_bwd_kernel<Out>, data<const float>(partial), chunks, channels, taps,
         grad_weight, grad_bias);
}

// The gradients that a mask wants, each of its shape; the first is the image's.
struct Gradients {
  std::vector<Tensor> tensors;

  std::vector<bool> wanted;

  Gradients(const Tensor& x, const std::vector<Sizes>& shapes, const std::vector<bool>& mask)
      : wanted(mask) {
    for (size_t i = 0; i < mask.size(); ++i)
      tensors.push_back(!mask[i] ? no_gradient(x)
                        : i == 0 ? empty_image_like(x)
                                 : empty_tensor(x, shapes[i]));
  }
  template <typename T>
  T* at(int i) const {
    return wanted[i] ? data<T>(tensors[i]) : nullptr;
  }
};

Tensor depthwise_conv2d(Tensor x, Tensor weight, MaybeTensor bias, int64_t row_dilation,
                        int64_t column_dilation, std::string activation) {
  const Stream stream(x);
  const Tensor y = empty_image_like(x);
  const Taps filter(weight, bias, weight.size(2), weight.size(3), row_dilation, column_dilation,
                    is_last(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    convolve<T, T, T>(stream, x, filter.filter<T>(), activation_of(activation), std::nullopt, y);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight,
                                                             MaybeTensor bias, int64_t row_dilation,
                                                             int64_t column_dilation,
                                                             std::string activation,
                                                             std::vector<bool> mask) {
  const Stream stream(x);
  const Gradients found(x, {{}, shape_of(weight), {x.size(1)}}, mask);
  const Taps filter(weight, bias, weight.size(2), weight.size(3), row_dilation, column_dilation,
                    is_last(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const auto go = [&](const Tensor& flow, auto kind) {
      using G = decltype(kind);
      if (mask[0])
        convolve<G, T, T>(stream, flow, filter.turned<T>(), Activation::kNone, std::nullopt,
                          found.tensors[0]);
      weight_gradient<T, G, T>(stream, x, flow, filter, found.at<T>(1), found.at<T>(2));
    };
    if (activation == "none") return go(grad, type);
    go(slopes<T>(stream, x, filter.filter<T>(), activation_of(activation), grad), float());
  });
  return {found.tensors[0], found.tensors[1], found.tensors[2]};
}

// (B, C, H, W) in either layout as the matrices that the mixing multiplies, and back.
Tensor pixels_first(const Tensor& x) {  // (B, H, W, C)
  return torch::stable::transpose(torch::stable::transpose(x, 1, 2), 2, 3);
}
Tensor pixels_last(const Tensor& x) {
  return torch::stable::transpose(torch::stable::transpose(x, 2, 3), 1, 2);
}
Tensor product(const Tensor& a, const Tensor& b) { return call("aten::matmul", "", a, b); }
Tensor transposed(const Tensor& x) { return torch::stable::transpose(x, -2, -1); }

// weight x of each pixel, by the vendor's matrix product.
Tensor mixed(const Tensor& weight, const Tensor& x, bool last) {
  if (last) return pixels_last(product(pixels_first(x), transposed(weight)));
  const Sizes size = shape_of(x);
  return shaped(product(weight, shaped(x, {size[0], size[1], size[2] * size[3]})), size);
}

// The sum over all pixels of a b^T.
Tensor outer(const Tensor& a, const Tensor& b, bool last) {
  const int64_t channels = a.size(1), pixels = a.size(2) * a.size(3), batch = a.size(0);
  if (last)
    return product(transposed(shaped(pixels_first(a), {batch * pixels, channels})),
                   shaped(pixels_first(b), {batch * pixels, channels}));
  const Tensor each = product(shaped(a, {batch, channels, pixels}),
                              transposed(shaped(b, {batch, channels, pixels})));
  return total(each, {0});
}

// What the forward pass makes, in float.
struct Attention {
  Tensor local, context, map;  // the map without its bias
};

template <typename T>
Attention attention_of(const Stream& stream, const Tensor& x, const Taps& local,
                       const Taps& context, const Tensor& mix, bool last) {
  const Tensor near = float_image(x), far = float_image(x);
  convolve<T, T, float>(stream, x, local.filter<T>(), Activation::kNone, std::nullopt, near);
  convolve<float, T, float>(stream, near, context.filter<T>(), Activation::kNone, std::nullopt,
                            far);
  return {near, far, mixed(mix, far, last)};
}

Tensor large_kernel_attention(Tensor x, Tensor local_weight, MaybeTensor local_bias,
                              Tensor context_weight, MaybeTensor context_bias, Tensor mix_weight,
                              MaybeTensor mix_bias, int64_t row_dilation, int64_t column_dilation) {
  const Stream stream(x);
  const bool last = is_last(x);
  const Taps local(local_weight, local_bias, local_weight.size(2), local_weight.size(3), 1, 1,
                   last);
  const Taps context(context_weight, context_bias, context_weight.size(2), context_weight.size(3),
                     row_dilation, column_dilation, last);
  if (mix_bias) mix_bias = torch::stable::contiguous(*mix_bias);
  const Tensor y = empty_image_like(x), mix = wide(mix_weight);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Attention found = attention_of<T>(stream, x, local, context, mix, last);
    const Grid grid = grid_over(shape(x), last);
    with_bool(last, [&](auto pixels) {
      launch(stream, grid.blocks, grid.threads, attend_kernel<T, decltype(pixels)::value>,
             view<const T>(x), view<const float>(found.map),
             mix_bias ? data<const T>(*mix_bias) : nullptr, View<const T>{}, view<T>(y),
             View<float>{}, View<float>{}, shape(x));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> large_kernel_attention_backward(
    Tensor grad, Tensor x, Tensor local_weight, MaybeTensor local_bias, Tensor context_weight,
    MaybeTensor context_bias, Tensor mix_weight, MaybeTensor mix_bias, int64_t row_dilation,
    int64_t column_dilation, std::vector<bool> mask) {
  const Stream stream(x);
  const bool last = is_last(x);
  const Taps local(local_weight, local_bias, local_weight.size(2), local_weight.size(3), 1, 1,
                   last);
  const Taps context(context_weight, context_bias, context_weight.size(2), context_weight.size(3),
                     row_dilation, column_dilation, last);
  if (mix_bias) mix_bias = torch::stable::contiguous(*mix_bias);
  const Tensor mix = wide(mix_weight);
  const Sizes vector = {x.size(1)};
  Gradients found(x, {{}, shape_of(local_weight), vector, shape_of(context_weight), vector, {}, {}},
                  mask);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const Attention made = attention_of<T>(stream, x, local, context, mix, last);
    const Tensor direct = float_image(x), of_map = float_image(x);
    const Grid grid = grid_over(shape(x), last);
    with_bool(last, [&](auto pixels) {
      launch(stream, grid.blocks, grid.threads, attend_kernel<T, decltype(pixels)::value>,
             view<const T>(x), view<const float>(made.map),
             mix_bias ? data<const T>(*mix_bias) : nullptr, view<const T>(grad), View<T>{},
             view<float>(direct), view<float>(of_map), shape(x));
    });
    if (mask[5]) found.tensors[5] = fastfusion::narrow(outer(of_map, made.context, last), x);
    if (mask[6]) found.tensors[6] = fastfusion::narrow(total(of_map, {0, 2, 3}), x);
    if (!mask[0] && !mask[1] && !mask[2] && !mask[3] && !mask[4]) return;
    const Tensor of_context =
        torch::stable::contiguous(mixed(transposed(mix), of_map, last), layout_of(x));
    weight_gradient<float, float, T>(stream, made.local, of_context, context, found.at<T>(3),
                                     found.at<T>(4));
    if (!mask[0] && !mask[1] && !mask[2]) return;
    const Tensor of_local = float_image(x);
    convolve<float, T, float>(stream, of_context, context.turned<T>(), Activation::kNone,
                              std::nullopt, of_local);
    weight_gradient<T, float, T>(stream, x, of_local, local, found.at<T>(1), found.at<T>(2));
    if (mask[0])
      convolve<float, T, T>(stream, of_local, local.turned<T>(), Activation::kNone, direct,
                            found.tensors[0]);
  });
  const auto& g = found.tensors;
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6]};
}

Scales scales_of(const std::vector<int64_t>& sizes) {
  Scales scales{static_cast<int>(sizes.size() / 2), {}, {}, {}};
  STD_TORCH_CHECK(scales.count <= kMostScales, "at most ", kMostScales, " scales");
  for (int s = 0, first = 0; s < scales.count; ++s) {
    scales.rows[s] = static_cast<int>(sizes[2 * s]);
    scales.columns[s] = static_cast<int>(sizes[2 * s + 1]);
    scales.first[s] = first;
    first += scales.rows[s] * scales.columns[s];
  }
  return scales;
}

Tensor multiscale_attention(Tensor x, Tensor weight, Tensor bias, std::vector<int64_t> sizes) {
  const Stream stream(x);
  const Tensor y = empty_image_like(x);
  const Taps packed(weight, bias, 1, weight.size(1), 1, 1, is_last(x));
  const Shape units = units_of(x, 1);
  const Grid grid = grid_over(units, is_last(x));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    with_bool(is_last(x), [&](auto pixels) {
      launch(stream, grid.blocks, grid.threads,
             multiscale_kernel<T, decltype(pixels)::value, false>, view<const T>(x),
             packed.filter<T>(), scales_of(sizes), View<const T>{}, view<T>(y), View<float>{},
             int64_t{0}, shape(x), units);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> multiscale_attention_backward(Tensor grad, Tensor x,
                                                                 Tensor weight, Tensor bias,
                                                                 std::vector<int64_t> sizes,
                                                                 std::vector<bool> mask) {
  const Stream stream(x);
  const bool last = is_last(x);
  Gradients found(x, {{}, shape_of(weight), shape_of(bias)}, mask);
  const Taps packed(weight, bias, 1, weight.size(1), 1, 1, last);
  const Scales scales = scales_of(sizes);
  const Shape units = units_of(x, 1);
  const Grid grid = grid_over(units, last);
  // The responses' gradients, scale after scale, each in the layout of x.
  Sizes stacked = shape_of(x);
  stacked[0] *= scales.count;
  Tensor flows = float_image(x, stacked);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    with_bool(last, [&](auto pixels) {
      launch(stream, grid.blocks, grid.threads, multiscale_kernel<T, decltype(pixels)::value, true>,
             view<const T>(x), packed.filter<T>(), scales, view<const T>(grad), View<T>{},
             view<float>(flows), x.numel(), shape(x), units);
    });
    MaybeTensor sum;
    for (int s = 0; s < scales.count; ++s) {
      const int64_t taps = int64_t{scales.rows[s]} * scales.columns[s], first = scales.first[s];
      const Tensor flow = torch::stable::narrow(flows, 0, s * x.size(0), x.size(0));
      const Taps filter(torch::stable::narrow(weight, 1, first, taps), std::nullopt, scales.rows[s],
                        scales.columns[s], 1, 1, last);
      if (mask[0]) {
        if (s + 1 == scales.count) {
          convolve<float, T, T>(stream, flow, filter.turned<T>(), Activation::kNone, sum,
                                found.tensors[0]);
        } else {
          const Tensor next = float_image(x);
          convolve<float, T, float>(stream, flow, filter.turned<T>(), Activation::kNone, sum, next);
          sum = next;
        }
      }
      if (!mask[1] && !mask[2]) continue;
      const Tensor grad_taps = empty_tensor(x, {x.size(1), taps});
      const Tensor grad_bias = empty_tensor(x, {x.size(1)});
      weight_gradient<T, float, T>(stream, x, flow, filter, data<T>(grad_taps), data<T>(grad_bias));
      if (mask[1]) {
        Tensor part = torch::stable::narrow(found.tensors[1], 1, first, taps);
        torch::stable::copy_(part, grad_taps);
      }
      if (mask[2]) {
        Tensor part = torch::stable::select(found.tensors[2], 0, s);
        torch::stable::copy_(part, grad_bias);
      }
    }
  });
  return {found.tensors[0], found.tensors[1], found.tensors[2]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_depthwise(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_backward", TORCH_BOX(&depthwise_conv2d_backward));
  m.impl("large_kernel_attention", TORCH_BOX(&large_kernel_attention));
  m.impl("large_kernel_attention_backward", TORCH_BOX(&large_kernel_attention_backward));
  m.impl("multiscale_attention", TORCH_BOX(&multiscale_attention));
  m.impl("multiscale_attention_backward", TORCH_BOX(&multiscale_attention_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
