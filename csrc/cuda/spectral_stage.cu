// SpeCAM's first stage: the split, a 3x3 filter and GELU on both parts, never in memory.
//
// A thread walks down a column of 2x2 blocks and keeps the rows above in registers, so that each
// pixel is loaded once. Along the columns a warp has 32 neighbouring blocks, of which the outer two
// are there only to hand their pixels to the inner thirty by shuffles; in channels_last the lanes
// are channels, and a thread loads its neighbours' blocks too (the first-level cache has them).
//
// spectral_maxima: of each channel's responses only the extremes leave a thread. The GELU falls and
// then rises, so its maximum is that of the largest or of the smallest response. Backward finds
// them again and writes the image's gradient once. spectral_mix writes the weighted sum; its
// gradients need the bands at every pixel and are composed of the steps' kernels.
#include <array>
#include <string>

#include "../bindings/schemas.h"
#include "correlate.h"
#include "operators.h"

namespace fastfusion::cuda {
namespace {

constexpr int kWarps = 8;      // of a block of threads
constexpr int kBlockRows = 8;  // of 2x2 blocks, down which a thread walks
constexpr int64_t kNowhere = INT64_MAX;

template <typename T>
struct Filters {
  const T *weight[2], *bias[2];  // low, high; (C, 1, 3, 3) and (C) or null
};

// Which image and channel a thread has, which column of blocks, and the rows of blocks [begin,
// end).
template <bool LAST>
struct Walk {
  int64_t image, channel;
  int column, begin, end;
  int64_t chunk, chunks;  // of the channel, numbered: what one block of threads has of it
  bool counts;            // whether the thread's pixels are its own to use

  __device__ explicit Walk(const Shape& size) {
    const int down = static_cast<int>((size.rows + 1) / 2);
    const int across = static_cast<int>((size.columns + 1) / 2);
    const int width = LAST ? kWarps : kWarp - 2, height = LAST ? kBlockRows : kBlockRows * kWarps;
    const unsigned strips = (across + width - 1) / width, bands = (down + height - 1) / height;
    const unsigned channels =
        static_cast<unsigned>(LAST ? (size.channels + kWarp - 1) / kWarp : size.channels);
    const int lane = threadIdx.x, warp = threadIdx.y;
    unsigned index = blockIdx.x;
    chunks = static_cast<int64_t>(strips) * bands;
    chunk = index % chunks;
    index /= static_cast<unsigned>(chunks);
    channel = static_cast<int64_t>(index % channels) * (LAST ? kWarp : 1) + (LAST ? lane : 0);
    image = index / channels;
    column = static_cast<int>(chunk % strips) * width + (LAST ? warp : lane - 1);
    begin = static_cast<int>(chunk / strips) * height + (LAST ? 0 : warp * kBlockRows);
    end = begin + kBlockRows < down ? begin + kBlockRows : down;
    const bool own = LAST || (lane > 0 && lane < kWarp - 1);
    counts = own && column < across && channel < size.channels;
  }
};

int64_t blocks_of(const Shape& size, bool last, int64_t* chunks) {
  const int64_t width = last ? kWarps : kWarp - 2, height = last ? kBlockRows : kBlockRows * kWarps;
  *chunks = divided(divided(size.columns, 2), width) * divided(divided(size.rows, 2), height);
  return size.batch * (last ? divided(size.channels, kWarp) : size.channels) * *chunks;
}

// Both bands at the two rows of a row of blocks; 0 outside the image.
struct Own {
  float low[2][2], high[2][2];
};
struct Rows {            // with the pixel to the left and the one to the right
  float value[2][2][4];  // band, row, column
};

template <typename T>
__device__ Own own_bands(const View<const T>& x, const Shape& size, int64_t image, int64_t channel,
                         int row, int column) {
  Own own{};
  const bool inside = row >= 0 && 2 * row < size.rows && column >= 0 && 2 * column < size.columns &&
                      channel < size.channels;
  if (!inside) return own;
  const bool right = 2 * column + 1 < size.columns, below = 2 * row + 1 < size.rows;
  const T* upper = x.at(image, channel, 2 * row, 2 * column);
  const T* lower = below ? upper + x.row : upper;  // a missing row repeats the one before
  const int64_t step = right ? x.column : 0;       // and so does a missing column
  const float a = widen(*upper), b = widen(upper[step]);
  const float c = widen(*lower), d = widen(lower[step]);
  // Halved twice, as in the split.
  const float mean = ((a + b) + (c + d)) * 0.5f * 0.5f;
  own.low[0][0] = mean, own.high[0][0] = a - mean;
  if (right) own.low[0][1] = mean, own.high[0][1] = b - mean;
  if (below) own.low[1][0] = mean, own.high[1][0] = c - mean;
  if (right && below) own.low[1][1] = mean, own.high[1][1] = d - mean;
  return own;
}

template <bool LAST, typename T>
__device__ Rows bands(const View<const T>& x, const Shape& size, const Walk<LAST>& walk, int row) {
  const Own own = own_bands(x, size, walk.image, walk.channel, row, walk.column);
  Own left{}, right{};
  if constexpr (LAST) {
    left = own_bands(x, size, walk.image, walk.channel, row, walk.column - 1);
    right = own_bands(x, size, walk.image, walk.channel, row, walk.column + 1);
  }
  Rows rows;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    rows.value[0][r][1] = own.low[r][0], rows.value[0][r][2] = own.low[r][1];
    rows.value[1][r][1] = own.high[r][0], rows.value[1][r][2] = own.high[r][1];
    if constexpr (LAST) {
      rows.value[0][r][0] = left.low[r][1], rows.value[0][r][3] = right.low[r][0];
      rows.value[1][r][0] = left.high[r][1], rows.value[1][r][3] = right.high[r][0];
    } else {
      rows.value[0][r][0] = __shfl_up_sync(kAllLanes, own.low[r][1], 1);
      rows.value[0][r][3] = __shfl_down_sync(kAllLanes, own.low[r][0], 1);
      rows.value[1][r][0] = __shfl_up_sync(kAllLanes, own.high[r][1], 1);
      rows.value[1][r][3] = __shfl_down_sync(kAllLanes, own.high[r][0], 1);
    }
  }
  return rows;
}

// Calls use(band, row, column, response) for each pixel of the walk, in the image or not.
template <bool LAST, typename T, typename Use>
__device__ void each_response(const View<const T>& x, const Filters<T>& filters, const Shape& size,
                              const Walk<LAST>& walk, const Use& use) {
  const bool known = walk.channel < size.channels;
  float taps[2][9], bias[2];
#pragma unroll
  for (int band = 0; band < 2; ++band) {
#pragma unroll
    for (int tap = 0; tap < 9; ++tap)
      taps[band][tap] = known ? widen(filters.weight[band][walk.channel * 9 + tap]) : 0;
    bias[band] =
        known && filters.bias[band] != nullptr ? widen(filters.bias[band][walk.channel]) : 0;
  }
  Rows before = bands(x, size, walk, walk.begin - 1), now = bands(x, size, walk, walk.begin);
  for (int row = walk.begin; row < walk.end; ++row) {
    const Rows after = bands(x, size, walk, row + 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int band = 0; band < 2; ++band) {
          const float* above = r == 0 ? before.value[band][1] : now.value[band][0];
          const float* middle = now.value[band][r];
          const float* below = r == 0 ? now.value[band][1] : after.value[band][0];
          const float* w = taps[band];
          float sum = 0;
#pragma unroll
          for (int q = 0; q < 3; ++q)
            sum += above[c + q] * w[q] + middle[c + q] * w[3 + q] + below[c + q] * w[6 + q];
          use(band, 2 * row + r, 2 * walk.column + c, sum + bias[band]);
        }
      }
    }
    before = now, now = after;
  }
}

// -- the maxima ----------------------------------------------------------------------------------

// A response and its place, row by row. NaN is greater than any number; of equals the first counts.
struct Extreme {
  float value;
  int64_t at;
};

__device__ bool better(const Extreme& a, const Extreme& b) {
  const bool unknown = a.value != a.value, other = b.value != b.value;
  if (unknown != other) return unknown;
  if (a.value > b.value) return true;
  return (unknown || a.value == b.value) && a.at < b.at;
}

// For each band the largest response, and the smallest with its sign changed.
struct Extremes {
  Extreme of[2][2];

  __device__ static Extremes none() {
    const Extreme nothing = {-INFINITY, kNowhere};
    return {{{nothing, nothing}, {nothing, nothing}}};
  }
  __device__ void take(int band, int kind, const Extreme& found) {
    if (better(found, of[band][kind])) of[band][kind] = found;
  }
};

template <bool LAST>
struct Found {
  Extremes of[kWarps][LAST ? kWarp : 1];
};

// `partial` is (B, C, chunks).
template <typename T, bool LAST>
__global__ void __launch_bounds__(kWarp* kWarps)
    spectral_maxima_search_kernel(View<const T> x, Filters<T> filters, Extremes* partial,
                                  Shape size) {
  const Walk<LAST> walk(size);
  const int lane = threadIdx.x, warp = threadIdx.y;
  Extremes extremes = Extremes::none();
  each_response(x, filters, size, walk, [&](int band, int row, int column, float response) {
    if (!walk.counts || row >= size.rows || column >= size.columns) return;
    const int64_t at = row * size.columns + column;
    extremes.take(band, 0, {response, at});
    extremes.take(band, 1, {-response, at});
  });
  auto& found = shared_memory<Found<LAST>>();
  if constexpr (!LAST) {
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const Extreme own = extremes.of[i / 2][i % 2];
        extremes.take(i / 2, i % 2,
                      {__shfl_xor_sync(kAllLanes, own.value, bits),
                       __shfl_xor_sync(kAllLanes, own.at, bits)});
      }
    }
  }
  if (LAST || lane == 0) found.of[warp][LAST ? lane : 0] = extremes;
  __syncthreads();
  if (warp > 0 || (!LAST && lane > 0) || walk.channel >= size.channels) return;
  for (int other = 1; other < kWarps; ++other)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      extremes.take(i / 2, i % 2, found.of[other][LAST ? lane : 0].of[i / 2][i % 2]);
  partial[(walk.image * size.channels + walk.channel) * walk.chunks + walk.chunk] = extremes;
}

// The maximum of one band of one channel, the response behind it, and its place.
struct Maximum {
  float value, response;
  int64_t at;
};

__device__ Maximum maximum(const Extremes* partial, int64_t chunks, int band) {
  Extremes extremes = Extremes::none();
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int kind = 0; kind < 2; ++kind) extremes.take(band, kind, partial[chunk].of[band][kind]);
  const Extreme most = extremes.of[band][0], least = extremes.of[band][1];
  const float upper = activate(Activation::kGelu, most.value);
  const float lower = activate(Activation::kGelu, -least.value);
  const bool falling =
      lower > upper || (lower != lower && upper == upper) || (lower == upper && least.at < most.at);
  return falling ? Maximum{lower, -least.value, least.at} : Maximum{upper, most.value, most.at};
}

template <typename T>
__global__ void spectral_maxima_fwd_kernel(const Extremes* partial, T* maxima, int64_t batch,
                                           int64_t channels, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= batch * 2 * channels) return;
  const int64_t channel = index % channels, band = index / channels % 2;
  const int64_t image = index / channels / 2;
  const Extremes* own = partial + (image * channels + channel) * chunks;
  maxima[index] = narrow<T>(maximum(own, chunks, static_cast<int>(band)).value);
}

// What flows back to a response, and where that is; (B, 2, C).
struct Flow {
  float value;
  int row, column;
};

// A band of a channel, image by image: its filter's gradients, and what flows to the image.
template <typename T>
__global__ void spectral_maxima_bwd_kernel(View<const T> x, const T* grad, const Extremes* partial,
                                           Flow* flows, T* low_weight, T* low_bias, T* high_weight,
                                           T* high_bias, Shape size, int64_t chunks) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 2 * size.channels) return;
  const int64_t channel = index % size.channels;
  const int band = static_cast<int>(index / size.channels);
  float of_weight[9] = {}, of_bias = 0;
  for (int64_t image = 0; image < size.batch; ++image) {
    const Maximum found =
        maximum(partial + (image * size.channels + channel) * chunks, chunks, band);
    const int64_t slot = image * 2 * size.channels + index;
    const float flow = widen(grad[slot]) * slope(Activation::kGelu, found.response);
    const int row = static_cast<int>(found.at / size.columns);
    const int column = static_cast<int>(found.at % size.columns);
    flows[slot] = {flow, row, column};
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      const int r = row + tap / 3 - 1, c = column + tap % 3 - 1;
      if (r < 0 || r >= size.rows || c < 0 || c >= size.columns) continue;
      const Own own = own_bands(x, size, image, channel, r / 2, c / 2);
      of_weight[tap] += flow * (band == 0 ? own.low : own.high)[r % 2][c % 2];
    }
    of_bias += flow;
  }
  T* const weight = band == 0 ? low_weight : high_weight;
  T* const bias = band == 0 ? low_bias : high_bias;
  if (weight != nullptr)
    for (int tap = 0; tap < 9; ++tap) weight[channel * 9 + tap] = narrow<T>(of_weight[tap]);
  if (bias != nullptr) bias[channel] = narrow<T>(of_bias);
}

// The gradient of x: 0 but around the two maxima of each channel. A thread has one block of 2x2.
template <typename T, bool LAST>
__global__ void spectral_maxima_spread_kernel(Filters<T> filters, const Flow* flows, View<T> grad_x,
                                              Shape size, Shape units) {
  const Place at = place<LAST>(units);
  if (!at.inside) return;
  const int row = static_cast<int>(2 * at.row), column = static_cast<int>(2 * at.column);
  const bool right = column + 1 < size.columns, below = row + 1 < size.rows;
  float of[2][2][2];  // band, row, column
#pragma unroll
  for (int band = 0; band < 2; ++band) {
    const Flow flow = flows[(at.image * 2 + band) * size.channels + at.channel];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = row + i / 2, c = column + i % 2;
      const int down = r - flow.row + 1, across = c - flow.column + 1;
      const bool seen =
          r < size.rows && c < size.columns && down >= 0 && down < 3 && across >= 0 && across < 3;
      of[band][i / 2][i % 2] =
          seen ? widen(filters.weight[band][at.channel * 9 + down * 3 + across]) * flow.value : 0;
    }
  }
  // As the split's gradient: what the mean gets is shared, and folded where a row was repeated.
  float share = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) share += of[0][i / 2][i % 2] - of[1][i / 2][i % 2];
  share *= 0.25f * (right ? 1 : 2) * (below ? 1 : 2);
  const float* high = of[1][0];
  T* to = grad_x.at(at.image, at.channel, row, column);
  *to = narrow<T>(share + high[0]);
  if (right) to[grad_x.column] = narrow<T>(share + high[1]);
  if (below) to[grad_x.row] = narrow<T>(share + high[2]);
  if (right && below) to[grad_x.row + grad_x.column] = narrow<T>(share + high[3]);
}

// -- the mixture ---------------------------------------------------------------------------------

template <typename T>
struct Gates {  // (B, C), low and high
  const T* of[2];
};

template <typename T, bool LAST>
__global__ void __launch_bounds__(kWarp* kWarps)
    spectral_mix_kernel(View<const T> x, Filters<T> filters, Gates<T> gates, View<T> y,
                        Shape size) {
  const Walk<LAST> walk(size);
  const bool known = walk.channel < size.channels;
  const int64_t slot = walk.image * size.channels + walk.channel;
  const float gate[2] = {known ? widen(gates.of[0][slot]) : 0,
                         known ? widen(gates.of[1][slot]) : 0};
  float low = 0;
  each_response(x, filters, size, walk, [&](int band, int row, int column, float response) {
    const float part = gate[band] * activate(Activation::kGelu, response);
    if (band == 0)
      low = part;
    else if (walk.counts && row < size.rows && column < size.columns)
      *y.at(walk.image, walk.channel, row, column) = narrow<T>(low + part);
  });
}

// -- launches ------------------------------------------------------------------------------------

bool is_last(const Tensor& x) { return layout_of(x) == MemoryFormat::ChannelsLast; }

// The filters, contiguous; owns the copies that may need.
struct FilterTensors {
  Tensor low_weight, high_weight;
  MaybeTensor low_bias, high_bias;

  FilterTensors(const Tensor& low_weight, const MaybeTensor& low_bias, const Tensor& high_weight,
                const MaybeTensor& high_bias)
      : low_weight(torch::stable::contiguous(low_weight)),
        high_weight(torch::stable::contiguous(high_weight)) {
    if (low_bias) this->low_bias = torch::stable::contiguous(*low_bias);
    if (high_bias) this->high_bias = torch::stable::contiguous(*high_bias);
  }
  template <typename T>
  Filters<T> view() const {
    return {{data<const T>(low_weight), data<const T>(high_weight)},
            {low_bias ? data<const T>(*low_bias) : nullptr,
             high_bias ? data<const T>(*high_bias) : nullptr}};
  }
};

struct Search {
  Tensor partial;  // bytes: Extremes of (B, C, chunks)
  int64_t chunks;
};

Search search(const Stream& stream, const Tensor& x, const FilterTensors& filters) {
  const Shape size = shape(x);
  int64_t chunks = 0;
  const int64_t blocks = blocks_of(size, is_last(x), &chunks);
  const int64_t bytes = size.batch * size.channels * chunks * sizeof(Extremes);
  const Tensor partial = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, x.device());
  with_type(x, [&](auto type) {
    using T = decltype(type);
    with_bool(is_last(x), [&](auto last) {
      launch(stream, blocks, dim3(kWarp, kWarps),
             spectral_maxima_search_kernel<T, decltype(last)::value>, view<const T>(x),
             filters.view<T>(), data<Extremes>(partial), size);
    });
  });
  return {partial, chunks};
}

Tensor spectral_maxima(Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
                       MaybeTensor high_bias) {
  const Stream stream(x);
  const FilterTensors filters(low_weight, low_bias, high_weight, high_bias);
  const Search found = search(stream, x, filters);
  const Tensor maxima = empty_tensor(x, {x.size(0), 2 * x.size(1)});
  with_type(x, [&](auto type) {
    using T = decltype(type);
    launch(stream, divided(maxima.numel(), kWarp), dim3(kWarp), spectral_maxima_fwd_kernel<T>,
           data<const Extremes>(found.partial), data<T>(maxima), x.size(0), x.size(1),
           found.chunks);
  });
  return maxima;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> spectral_maxima_backward(
    Tensor grad, Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
    MaybeTensor high_bias, std::vector<bool> mask) {
  const Stream stream(x);
  const Shape size = shape(x);
  const FilterTensors filters(low_weight, low_bias, high_weight, high_bias);
  const Search found = search(stream, x, filters);
  const Tensor upstream = torch::stable::contiguous(grad);
  const Tensor flows =
      torch::stable::empty({2 * size.batch * size.channels * static_cast<int64_t>(sizeof(Flow))},
                           ScalarType::Byte, std::nullopt, x.device());
  std::vector<Tensor> made;
  for (int i = 0; i < 5; ++i)
    made.push_back(!mask[i]     ? no_gradient(x)
                   : i == 0     ? empty_image_like(x)
                   : i % 2 == 1 ? empty_tensor(x, {size.channels, 1, 3, 3})
                                : empty_tensor(x, {size.channels}));
  with_type(x, [&](auto type) {
    using T = decltype(type);
    const auto to = [&](int i) { return mask[i] ? data<T>(made[i]) : nullptr; };
    launch(stream, divided(2 * size.channels, kWarp), dim3(kWarp), spectral_maxima_bwd_kernel<T>,
           view<const T>(x), data<const T>(upstream), data<const Extremes>(found.partial),
           data<Flow>(flows), to(1), to(2), to(3), to(4), size, found.chunks);
    if (!mask[0]) return;
    const Shape units = {size.batch, size.channels, divided(size.rows, 2),
                         divided(size.columns, 2)};
    const Grid grid = grid_over(units, is_last(x));
    with_bool(is_last(x), [&](auto last) {
      launch(stream, grid.blocks, grid.threads,
             spectral_maxima_spread_kernel<T, decltype(last)::value>, filters.view<T>(),
             data<const Flow>(flows), view<T>(made[0]), size, units);
    });
  });
  return {made[0], made[1], made[2], made[3], made[4]};
}

Tensor spectral_mix(Tensor x, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
                    MaybeTensor high_bias, Tensor low_gate, Tensor high_gate) {
  const Stream stream(x);
  const FilterTensors filters(low_weight, low_bias, high_weight, high_bias);
  const Tensor low = torch::stable::contiguous(low_gate);
  const Tensor high = torch::stable::contiguous(high_gate);
  const Tensor y = empty_image_like(x);
  int64_t chunks = 0;
  const int64_t blocks = blocks_of(shape(x), is_last(x), &chunks);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    with_bool(is_last(x), [&](auto last) {
      launch(stream, blocks, dim3(kWarp, kWarps), spectral_mix_kernel<T, decltype(last)::value>,
             view<const T>(x), filters.view<T>(),
             Gates<T>{{data<const T>(low), data<const T>(high)}}, view<T>(y), shape(x));
    });
  });
  return y;
}

// By the kernels of the steps, in float, since the gradients need the bands at every pixel.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spectral_mix_backward(
    Tensor grad, Tensor given, Tensor low_weight, MaybeTensor low_bias, Tensor high_weight,
    MaybeTensor high_bias, Tensor low_gate, Tensor high_gate, std::vector<bool> mask) {
  const MemoryFormat layout = layout_of(given);
  const Tensor x = wide(given, layout), upstream = wide(grad, layout);
  const auto parts = run<2>("fastfusion_cuda::haar_split2d", x);
  std::vector<Tensor> found(7, no_gradient(given));
  std::array<Tensor, 2> grad_parts = parts;
  const auto band = [&](int index, const Tensor& raw_weight, const MaybeTensor& raw_bias,
                        const Tensor& raw_gate) {
    const Tensor weight = wide(raw_weight);
    const MaybeTensor bias = wide(raw_bias);
    const int64_t one = 1;
    const std::string gelu = "gelu";
    const int of_weight = 1 + 2 * index, of_bias = of_weight + 1, of_gate = 5 + index;
    if (mask[of_gate]) {
      const auto [response] =
          run<1>("fastfusion_cuda::depthwise_conv2d", parts[index], weight, bias, one, one, gelu);
      found[of_gate] = fastfusion::narrow(total(times(upstream, response), {2, 3}), given);
    }
    const std::array<bool, 3> wanted = {mask[0], mask[of_weight], mask[of_bias]};
    if (!wanted[0] && !wanted[1] && !wanted[2]) return;
    const Tensor gate = shaped(wide(raw_gate), {x.size(0), x.size(1), 1, 1});
    const Tensor scaled = torch::stable::contiguous(times(upstream, gate), layout);
    const auto made = run<3>("fastfusion_cuda::depthwise_conv2d_backward", scaled, parts[index],
                             weight, bias, one, one, gelu, flags(wanted));
    grad_parts[index] = made[0];
    if (wanted[1]) found[of_weight] = fastfusion::narrow(made[1], given);
    if (wanted[2]) found[of_bias] = fastfusion::narrow(made[2], given);
  };
  band(0, low_weight, low_bias, low_gate);
  band(1, high_weight, high_bias, high_gate);
  if (mask[0]) {
    const auto [grad_x] = run<1>("fastfusion_cuda::haar_split2d_backward", grad_parts[0],
                                 grad_parts[1], x, flags(std::array<bool, 1>{true}));
    found[0] = fastfusion::narrow(grad_x, given, layout);
  }
  return {found[0], found[1], found[2], found[3], found[4], found[5], found[6]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_spectral_stage(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("spectral_mix", TORCH_BOX(&spectral_mix));
  m.impl("spectral_mix_backward", TORCH_BOX(&spectral_mix_backward));
  m.impl("spectral_maxima", TORCH_BOX(&spectral_maxima));
  m.impl("spectral_maxima_backward", TORCH_BOX(&spectral_maxima_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
