// The filter in the Fourier domain.
//
// Zeros: between the vendor's transforms one kernel mixes, filters and shifts both parts of the
// half spectrum. A block has some channels of a strip of 64 bins and walks down it, two rows at a
// time: these are mixed from all input channels, the next of which are on their way meanwhile, into
// a ring of rows in shared memory, where the filter finds its neighbours; nothing but the response
// leaves the block.
//
// Circular: no transform. A block has 64 channels by 64 pixels. It mixes the even and the odd half
// of the input, a pixel and its mirror image, and multiplies them by the filters' windows, which
// are products of the taps with cosines; all of these sums stay in registers.
//
// Backward, the middle is composed of the depthwise kernels and the vendor's matrix products.
#include <cmath>

#include "../bindings/frequency_filter.h"
#include "../bindings/schemas.h"
#include "launch.h"
#include "operators.h"
#include "product.h"

namespace fastfusion::cuda {
namespace {

using namespace frequency;
using torch::stable::matmul;
using torch::stable::select;

__host__ __device__ constexpr int64_t rounded(int64_t size, int64_t to) {
  return (size + to - 1) / to * to;
}

// -- zeros ---------------------------------------------------------------------------------------

constexpr int kThreads = 128;
constexpr int kAcross = 64;             // bins of a strip, with the filter's reach on both sides
constexpr int kLine = kAcross + 8;      // of the ring; the filter reads beyond the strip, zeros
constexpr int kSlab = 2 * kAcross + 4;  // two rows of the strip, and 4 more: other banks
constexpr int kStep = 8;                // input channels that are mixed at a time
constexpr int kRing = 12288 - 2 * kStep * kSlab;
constexpr int64_t kMostBins = 33;  // of a filter, that the ring holds for four channels

template <typename T>
struct Parts {  // real and imaginary, (B, C, H, W//2+1)
  View<T> of[2];
};

struct Plan {
  int64_t batch, rows, bins;
  int inputs, outputs, size;                                            // channels; of the filter
  int group, groups;                                                    // channels of a block
  int band, bands, strips;                                              // rows of a block
  __host__ __device__ int width() const { return kAcross - size + 1; }  // bins of a block
  __host__ __device__ int64_t depth() const { return rounded(inputs, kStep); }
  __host__ __device__ int64_t lines() const { return rounded(outputs, 16); }
  __host__ __device__ int taps_line() const { return (size + 3) / 4 * 4; }
  __host__ __device__ int taps() const { return (size + 2) * taps_line(); }
};

struct alignas(16) ZerosRoom {
  float slab[2][kStep][kSlab];
  float ring[kRing];  // (rows of the ring, channels, kLine)
};

// `mixing` is (2, lines, depth), `taps` (2, lines, size + 2, taps_line) with a line of zeros before
// and behind; `mixing_bias` and `bias` are (2, outputs) or null.
template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    frequency_zeros_fwd_kernel(Parts<const float> spectrum, const float* mixing,
                               const float* mixing_bias, const float* taps, const float* bias,
                               Parts<T> response, Plan plan) {
  ZerosRoom& room = shared_memory<ZerosRoom>();
  unsigned index = blockIdx.x;
  const int strip = static_cast<int>(index % plan.strips);
  index /= plan.strips;
  const int64_t first_row = static_cast<int64_t>(index % plan.bands) * plan.band;
  index /= plan.bands;
  const int first = static_cast<int>(index % plan.groups) * plan.group;
  index /= plan.groups;
  const int part = static_cast<int>(index % 2);
  const int64_t image = index / 2;

  const int size = plan.size, reach = size / 2, slots = size + 1, thread = threadIdx.x;
  const int64_t first_bin = static_cast<int64_t>(strip) * plan.width();
  const int64_t band_end = first_row + plan.band < plan.rows ? first_row + plan.band : plan.rows;
  const View<const float> from = part == 0 ? spectrum.of[0] : spectrum.of[1];
  const View<T> to = part == 0 ? response.of[0] : response.of[1];
  mixing += (part * plan.lines() + first) * plan.depth();
  taps += (part * plan.lines() + first) * plan.taps();

  for (int i = thread; i < slots * plan.group * kLine; i += kThreads) room.ring[i] = 0;
  // The thread's share of a step: what it loads, and which 4 channels of which 4 bins it mixes.
  const int load_row = thread / kAcross;
  const int64_t load_bin = first_bin - reach + thread % kAcross;
  const int channel = thread / 32 * 4, place = thread % 32 * 4;
  const int mix_row = place / kAcross, mix_column = place % kAcross;
  const int64_t mix_bin = first_bin - reach + mix_column;

  const int steps = (static_cast<int>(band_end - first_row) + 2 * reach + 1) / 2;
  const auto row_of = [&](int step) { return first_row - reach + 2 * step; };
  const auto fetch = [&](int step, int k, int to_slab) {
    const int64_t at = row_of(step) + load_row;
    const bool seen = at >= 0 && at < plan.rows && load_bin >= 0 && load_bin < plan.bins;
#pragma unroll
    for (int i = 0; i < kStep; ++i) {
      const bool there = seen && k + i < plan.inputs;
      const float* value = there ? from.at(image, k + i, at, load_bin) : from.data;
      copy_async<1>(&room.slab[to_slab][i][thread], value, there ? 1 : 0);
    }
  };
  fetch(0, 0, 0);
  commit_copies();
  int slab = 0;
  for (int step = 0; step < steps; ++step) {
    const int64_t row = row_of(step);
    float sum[4][4] = {};
    for (int k = 0; k < plan.depth(); k += kStep, slab = 1 - slab) {
      wait_for_copies<0>();
      __syncthreads();  // this slab is here, and nobody needs the other any more
      if (k + kStep < plan.depth())
        fetch(step, k + kStep, 1 - slab);
      else if (step + 1 < steps)
        fetch(step + 1, 0, 1 - slab);
      commit_copies();
      if (channel < plan.group)
        add_product(Lines{mixing + k, static_cast<int>(plan.depth())}, channel,
                    Lines{room.slab[slab][0], kSlab}, place, kStep, sum);
    }
    if (channel < plan.group) {
      const int64_t mixed_row = row + mix_row;
      const bool within = mixed_row >= 0 && mixed_row < plan.rows;
      float* line = room.ring + ((2 * step + mix_row) % slots * plan.group + channel) * kLine;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = first + channel + i;
        const float shift =
            mixing_bias != nullptr && c < plan.outputs ? mixing_bias[part * plan.outputs + c] : 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const bool inside = within && mix_bin + j >= 0 && mix_bin + j < plan.bins;
          line[i * kLine + mix_column + j] = inside ? sum[i][j] + shift : 0.0f;
        }
      }
    }
    __syncthreads();
    if (step < reach) continue;
    const int64_t out_row = first_row + 2 * (step - reach);
    const int columns = (plan.width() + 3) / 4;
    for (int task = thread; task < plan.group * columns; task += kThreads) {
      const int n = task / columns, column = task % columns * 4, c = first + n;
      if (c >= plan.outputs) break;
      float upper[4] = {}, lower[4] = {};
      for (int i = 0; i <= size; ++i) {
        const float* line =
            room.ring + ((2 * (step - reach) + i) % slots * plan.group + n) * kLine + column;
        const float* of_lower = taps + n * plan.taps() + i * plan.taps_line();
        const float* of_upper = of_lower + plan.taps_line();
        float now[4], window[8];
        load(line, now);
#pragma unroll 1
        for (int q = 0; q < size; q += 4) {
          float next[4], a[4], b[4];
          load(line + q + 4, next);
          load(of_upper + q, a);
          load(of_lower + q, b);
#pragma unroll
          for (int j = 0; j < 4; ++j) window[j] = now[j], window[4 + j] = next[j], now[j] = next[j];
#pragma unroll
          for (int tap = 0; tap < 4; ++tap)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              upper[j] += a[tap] * window[tap + j];
              lower[j] += b[tap] * window[tap + j];
            }
        }
      }
      const float shift = bias == nullptr ? 0.0f : bias[part * plan.outputs + c];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t bin = first_bin + column + j;
        if (column + j >= plan.width() || bin >= plan.bins) continue;
        if (out_row < band_end) *to.at(image, c, out_row, bin) = narrow<T>(upper[j] + shift);
        if (out_row + 1 < band_end)
          *to.at(image, c, out_row + 1, bin) = narrow<T>(lower[j] + shift);
      }
    }
  }
}

// The matrices padded with zeros, (2, lines, depth).
template <typename T>
__global__ void frequency_pack_mixing_kernel(const T* mixing, float* to, int outputs, int inputs,
                                             int64_t lines, int64_t depth) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 2 * lines * depth) return;
  const int64_t k = index % depth, n = index / depth % lines, part = index / depth / lines;
  const bool there = n < outputs && k < inputs;
  to[index] = there ? widen(mixing[(part * outputs + n) * inputs + k]) : 0.0f;
}

// The filters with the gain in their taps, (2, lines, size + 2, taps_line), zeros around them.
template <typename T>
__global__ void frequency_pack_taps_kernel(const T* kernel, const T* gain, float* to, Plan plan) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= 2 * plan.lines() * plan.taps()) return;
  const int column = static_cast<int>(index % plan.taps_line());
  const int row = static_cast<int>(index / plan.taps_line() % (plan.size + 2)) - 1;
  const int64_t n = index / plan.taps() % plan.lines(), part = index / plan.taps() / plan.lines();
  float tap = 0;
  if (n < plan.outputs && row >= 0 && row < plan.size && column < plan.size) {
    const int64_t channel = part * plan.outputs + n;
    tap = widen(kernel[(channel * plan.size + row) * plan.size + column]);
    if (gain != nullptr) tap *= widen(gain[channel]);
  }
  to[index] = tap;
}

// Replaces columns 0 and (`edges` 2) the last by (F[k] + conj F[-k]) / 2, in place. An entry and
// its mirror image belong to one thread.
__global__ void frequency_edges_kernel(float* spectrum, int64_t images, int64_t rows, int64_t bins,
                                       int edges) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t half = rows / 2 + 1, row = index % half, edge = index / half % edges;
  const int64_t image = index / half / edges;
  if (image >= images) return;
  float* column = spectrum + (image * rows * bins + edge * (bins - 1)) * 2;
  float* here = column + row * bins * 2;
  float* mirror = column + (rows - row) % rows * bins * 2;
  const float real = 0.5f * (here[0] + mirror[0]), imag = 0.5f * (here[1] - mirror[1]);
  here[0] = mirror[0] = real;
  here[1] = imag;
  mirror[1] = -imag;
}

// Between complex numbers (B, C, H, W//2+1) and their parts (B, 2, C, H, W//2+1), the columns that
// stand for two by `inner`, the others by `edge`.
template <bool JOIN>
__global__ void frequency_parts_kernel(float* spectrum, float* parts, int64_t images,
                                       int64_t channels, int64_t rows, int64_t columns, float edge,
                                       float inner) {
  const int64_t bins = columns / 2 + 1, plane = rows * bins;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= images * channels * plane) return;
  const int64_t bin = index % bins, channel = index / plane % channels;
  const int64_t image = index / plane / channels;
  const float weight = bin == 0 || 2 * bin == columns ? edge : inner;
  float* real = parts + (image * 2 * channels + channel) * plane + index % plane;
  float* imag = real + channels * plane;
  float* both = spectrum + 2 * index;
  if (JOIN) {
    both[0] = *real * weight;
    both[1] = *imag * weight;
  } else {
    *real = both[0] * weight;
    *imag = both[1] * weight;
  }
}

// -- circular ------------------------------------------------------------------------------------

constexpr int kTile = 64;  // channels, and pixels, of a block
constexpr int kTileThreads = 256;
constexpr int kDepth = 16;  // input channels, or taps, that are in shared memory at a time

struct Circle {
  int64_t batch, rows, columns;
  int inputs, outputs, size;
  int count;  // of the taps that are not another's opposite
  int groups;
  int64_t tiles;
  bool last;  // channels are what is adjacent in memory

  __device__ int64_t pixels() const { return rows * columns; }
};

struct alignas(16) CircularRoom {
  float matrix[2][kTile][kDepth + 4];
  float slab[2][kDepth][kTile + 4];
  int row[kTile], column[kTile];
  int noted[kTileThreads / kWarp];
};

__device__ int64_t mirrored(int64_t index, int64_t size) { return (size - index) % size; }

// The cosine of a tap at a pixel; whole turns are taken off in integers, where they are exact.
__device__ float wave(int tap, int64_t row, int64_t column, const Circle& circle) {
  const int reach = circle.size / 2, p = tap / circle.size - reach, q = tap % circle.size - reach;
  // Of the absolute values: where these are small, so is the division.
  const int64_t of_row = (p < 0 ? -p : p) * row % circle.rows;
  const int64_t of_column = (q < 0 ? -q : q) * column % circle.columns;
  const int64_t down = p < 0 ? -of_row : of_row, across = q < 0 ? -of_column : of_column;
  const float turns = static_cast<float>(down) / static_cast<float>(circle.rows) +
                      static_cast<float>(across) / static_cast<float>(circle.columns);
  // cos(2 pi turns) is the sine of the distance from a quarter turn.
  const float x = (0.25f - fabsf(turns - rintf(turns))) * 6.28318530717958648f;
  const float z = x * x;
  const float series = 1.0f / 362880 - z * (1.0f / 39916800);
  return x * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * series))));
}

// A block's tile, and a thread's 4 channels by 4 pixels of it.
struct CircularTile {
  CircularRoom& room;
  const Circle& circle;
  int64_t image, first_pixel;
  int first;  // channel
  int channel, place;

  __device__ CircularTile(CircularRoom& room, const Circle& circle)
      : room(room),
        circle(circle),
        image(blockIdx.x / circle.tiles / circle.groups),
        first_pixel(blockIdx.x / circle.groups % circle.tiles * kTile),
        first(static_cast<int>(blockIdx.x % circle.groups) * kTile),
        channel(threadIdx.x / 16 * 4),
        place(threadIdx.x % 16 * 4) {
    const int p = threadIdx.x;
    if (p < kTile) {
      const int64_t pixel = first_pixel + p;
      room.row[p] = pixel < circle.pixels() ? static_cast<int>(pixel / circle.columns) : -1;
      room.column[p] = static_cast<int>(pixel % circle.columns);
    }
    __syncthreads();
  }

  // The next kDepth columns of a matrix (outputs, depth), from column k on.
  template <typename T>
  __device__ void read_matrix(const T* matrix, int depth, int k, int to) const {
    for (int i = threadIdx.x; i < kTile * kDepth; i += kTileThreads) {
      const int column = i % kDepth, n = i / kDepth;
      const bool there = first + n < circle.outputs && k + column < depth;
      const int64_t line = first + n;
      room.matrix[to][n][column] = there ? widen(matrix[line * depth + k + column]) : 0.0f;
    }
  }

  // A part's window of the thread's channels at its pixels.
  __device__ void window(const float* taps, int part, float (&sum)[4][4]) const {
    taps += static_cast<int64_t>(part) * circle.outputs * circle.count;
    for (int t = 0; t < circle.count; t += kDepth) {
      __syncthreads();
      read_matrix(taps, circle.count, t, 0);
      for (int i = threadIdx.x; i < kDepth * kTile; i += kTileThreads) {
        const int p = i % kTile, tap = i / kTile;
        const bool there = t + tap < circle.count && room.row[p] >= 0;
        room.slab[0][tap][p] = there ? wave(t + tap, room.row[p], room.column[p], circle) : 0.0f;
      }
      __syncthreads();
      add_product(Lines{room.matrix[0][0], kDepth + 4}, channel, Lines{room.slab[0][0], kTile + 4},
                  place, kDepth, sum);
    }
  }

  // Call f(i, j, channel, row, column) for the thread's values that are there.
  template <typename F>
  __device__ void each(const F& f) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (first + channel + i < circle.outputs && room.row[place + j] >= 0)
          f(i, j, first + channel + i, room.row[place + j], room.column[place + j]);
  }
};

// even(mixed by M_0) window_0 + odd(mixed by M_1) window_1; constants land on pixel 0. `taps` is
// (2, outputs, count); each block notes whether it met NaN or infinity.
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2)
    frequency_circular_fwd_kernel(View<const T> x, const T* mixing, const T* mixing_bias,
                                  const float* taps, const T* bias, View<T> y, int* notes,
                                  Circle circle) {
  CircularRoom& room = shared_memory<CircularRoom>();
  const CircularTile tile(room, circle);
  float even[4][4] = {}, odd[4][4] = {};
  for (int k = 0; k < circle.inputs; k += kDepth) {
    __syncthreads();
    tile.read_matrix(mixing, circle.inputs, k, 0);
    tile.read_matrix(mixing + static_cast<int64_t>(circle.outputs) * circle.inputs, circle.inputs,
                     k, 1);
    for (int i = threadIdx.x; i < kDepth * kTile; i += kTileThreads) {
      const int p = circle.last ? i / kDepth : i % kTile;
      const int c = circle.last ? i % kDepth : i / kTile;
      float here = 0, there = 0;
      if (k + c < circle.inputs && room.row[p] >= 0) {
        here = widen(*x.at(tile.image, k + c, room.row[p], room.column[p]));
        there = widen(*x.at(tile.image, k + c, mirrored(room.row[p], circle.rows),
                            mirrored(room.column[p], circle.columns)));
      }
      room.slab[0][c][p] = 0.5f * (here + there);
      room.slab[1][c][p] = 0.5f * (here - there);
    }
    __syncthreads();
    add_product(Lines{room.matrix[0][0], kDepth + 4}, tile.channel,
                Lines{room.slab[0][0], kTile + 4}, tile.place, kDepth, even);
    add_product(Lines{room.matrix[1][0], kDepth + 4}, tile.channel,
                Lines{room.slab[1][0], kTile + 4}, tile.place, kDepth, odd);
  }
  bool special = false;
  tile.each([&](int i, int j, int, int, int) {
    const float mixed = even[i][j] + odd[i][j];
    special = special || mixed - mixed != 0;
  });
  if (mixing_bias != nullptr)
    tile.each([&](int i, int j, int c, int row, int column) {
      if (row == 0 && column == 0) even[i][j] += widen(mixing_bias[c]);
    });
  float window[4][4] = {}, other[4][4] = {};
  tile.window(taps, 0, window);
  tile.each([&](int i, int j, int, int, int) { even[i][j] *= window[i][j]; });
  tile.window(taps, 1, other);
  tile.each([&](int i, int j, int c, int row, int column) {
    float value = even[i][j] + odd[i][j] * other[i][j];
    if (bias != nullptr && row == 0 && column == 0) value += widen(bias[c]);
    *y.at(tile.image, c, row, column) = narrow<T>(value);
  });
  const unsigned any = __ballot_sync(kAllLanes, special);
  if (threadIdx.x % kWarp == 0) room.noted[threadIdx.x / kWarp] = any != 0;
  __syncthreads();
  if (threadIdx.x == 0) {
    int noted = 0;
    for (const int of_warp : room.noted) noted |= of_warp;
    notes[blockIdx.x] = noted;
  }
}

struct Noted {
  int warp[kTileThreads / kWarp];
};

// Where one of an image's `count` notes is set, all of it becomes NaN, as a transform has it. `y`
// is dense, `size` elements an image, of which a block has kTileThreads.
template <typename T>
__global__ void frequency_special_kernel(T* y, const int* notes, int64_t size, int64_t count) {
  const int64_t blocks = (size + kTileThreads - 1) / kTileThreads;
  const int64_t image = blockIdx.x / blocks;
  bool noted = false;
  for (int64_t i = threadIdx.x; i < count; i += kTileThreads)
    noted = noted || notes[image * count + i] != 0;
  const unsigned any = __ballot_sync(kAllLanes, noted);
  Noted& all = shared_memory<Noted>();
  if (threadIdx.x % kWarp == 0) all.warp[threadIdx.x / kWarp] = any != 0;
  __syncthreads();
  int found = 0;
  for (const int of_warp : all.warp) found |= of_warp;
  const int64_t place = blockIdx.x % blocks * kTileThreads + threadIdx.x;
  if (found != 0 && place < size) y[image * size + place] = narrow<T>(NAN);
}

// By the halves of the gradient, even and odd: times the windows, the gradients of the two
// mixtures; times the mixtures, what the gradients of the taps are sums of. All (B, 2, outputs, H,
// W), what is not wanted null.
__global__ void __launch_bounds__(kTileThreads, 2)
    frequency_circular_bwd_kernel(View<const float> grad, const float* mixed,
                                  const float* mixing_bias, const float* taps, float* of_mixed,
                                  float* of_windows, Circle circle) {
  CircularRoom& room = shared_memory<CircularRoom>();
  const CircularTile tile(room, circle);
  for (int part = 0; part < 2; ++part) {
    float window[4][4] = {};
    if (of_mixed != nullptr) tile.window(taps, part, window);
    tile.each([&](int i, int j, int c, int row, int column) {
      const float here = *grad.at(tile.image, c, row, column);
      const float there =
          *grad.at(tile.image, c, mirrored(row, circle.rows), mirrored(column, circle.columns));
      const float half = 0.5f * (part == 0 ? here + there : here - there);
      const int64_t line = (tile.image * 2 + part) * circle.outputs + c;
      const int64_t at = line * circle.pixels() + tile.first_pixel + tile.place + j;
      if (of_mixed != nullptr) of_mixed[at] = half * window[i][j];
      if (of_windows != nullptr) {
        const bool shifted = part == 0 && mixing_bias != nullptr && row == 0 && column == 0;
        of_windows[at] = half * (mixed[at] + (shifted ? mixing_bias[c] : 0.0f));
      }
    });
  }
}

// The cosines, (count, H, W).
__global__ void frequency_waves_kernel(float* waves, Circle circle) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= circle.count * circle.pixels()) return;
  const int64_t pixel = index % circle.pixels();
  waves[index] = wave(static_cast<int>(index / circle.pixels()), pixel / circle.columns,
                      pixel % circle.columns, circle);
}

// A tap and its opposite share a cosine: (2 outputs, m m) to (2 outputs, (m m + 1) / 2), with the
// gain in them.
template <typename T>
__global__ void frequency_halve_taps_kernel(const T* kernel, const T* gain, float* to,
                                            int64_t filters, int taps) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int count = taps / 2 + 1;
  if (index >= filters * count) return;
  const int64_t filter = index / count;
  const int tap = static_cast<int>(index % count), opposite = taps - 1 - tap;
  float sum = widen(kernel[filter * taps + tap]);
  if (opposite != tap) sum += widen(kernel[filter * taps + opposite]);
  to[index] = gain == nullptr ? sum : sum * widen(gain[filter]);
}

// And the gradient's way back.
__global__ void frequency_double_taps_kernel(const float* from, float* to, int64_t filters,
                                             int taps) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= filters * taps) return;
  const int tap = static_cast<int>(index % taps), opposite = taps - 1 - tap;
  to[index] = from[index / taps * (taps / 2 + 1) + (tap < opposite ? tap : opposite)];
}

// -- launches ------------------------------------------------------------------------------------

template <typename T>
const T* data_of(const MaybeTensor& x) {
  return x ? data<const T>(*x) : nullptr;
}

// The arguments of both operators, the parameters dense.
struct Arguments {
  Tensor x, mixing, kernel;
  MaybeTensor mixing_bias, gain, bias;

  Arguments(const Tensor& x, const Tensor& mixing, const Tensor& kernel,
            const MaybeTensor& mixing_bias, const MaybeTensor& gain, const MaybeTensor& bias)
      : x(x),
        mixing(torch::stable::contiguous(mixing)),
        kernel(torch::stable::contiguous(kernel)),
        mixing_bias(dense(mixing_bias)),
        gain(dense(gain)),
        bias(dense(bias)) {}

  Arguments in_float() const {
    return {fastfusion::wide(x),           fastfusion::wide(mixing), fastfusion::wide(kernel),
            fastfusion::wide(mixing_bias), fastfusion::wide(gain),   fastfusion::wide(bias)};
  }
  int64_t outputs() const { return mixing.size(1); }
  int64_t size() const { return kernel.size(3); }
};

// The half spectrum (B, C, H, W//2+1, 2).
Tensor spectrum_of(const Tensor& x) {
  return torch::stable::contiguous(
      as_real(call("aten::_fft_r2c", "", fastfusion::wide(x), Sizes{2, 3}, kNotScaled, true)));
}

// The image of a half spectrum, which is overwritten, as the operator defines it.
Tensor image_of(const Stream& stream, const Tensor& spectrum, int64_t columns, int64_t scaling) {
  const int64_t images = spectrum.size(0) * spectrum.size(1), rows = spectrum.size(2);
  const int edges = columns % 2 == 0 ? 2 : 1;
  launch(stream, divided(images * edges * (rows / 2 + 1), kThreads), dim3(kThreads),
         frequency_edges_kernel, data<float>(spectrum), images, rows, spectrum.size(3), edges);
  return call("aten::_fft_c2r", "", as_complex(spectrum), Sizes{2, 3}, scaling, columns);
}

void convert(const Stream& stream, bool join, const Tensor& spectrum, const Tensor& parts,
             int64_t columns, double edge, double inner) {
  launch(stream, divided(parts.numel() / 2, kThreads), dim3(kThreads),
         join ? frequency_parts_kernel<true> : frequency_parts_kernel<false>, data<float>(spectrum),
         data<float>(parts), spectrum.size(0), spectrum.size(1), spectrum.size(2), columns,
         static_cast<float>(edge), static_cast<float>(inner));
}

// The parts (B, 2, C, H, W//2+1) of an image's spectrum, times `edge` or `inner`.
Tensor parts_of(const Stream& stream, const Tensor& x, double edge, double inner) {
  const Tensor spectrum = spectrum_of(x);
  const Tensor parts = floats(x, {x.size(0), 2, x.size(1), spectrum.size(2), spectrum.size(3)});
  convert(stream, false, spectrum, parts, x.size(3), edge, inner);
  return parts;
}

// mixing (2, D, C), or its transpose, times parts (B, 2, C, rows, columns), plus a bias (2, D).
Tensor mix(const Tensor& mixing, const Tensor& parts, const MaybeTensor& bias) {
  Tensor mixed = matmul(mixing, lines(parts));
  if (bias) mixed = plus(mixed, shaped(*bias, {2, bias->size(1), 1}));
  return shaped(mixed, {parts.size(0), 2, mixing.size(1), parts.size(3), parts.size(4)});
}

// The filters with the gain in them, (2 D, 1, m, m).
Tensor filters_of(const Arguments& of) {
  return torch::stable::contiguous(
      shaped(with_gain(of.kernel, of.gain), {2 * of.outputs(), 1, of.size(), of.size()}));
}

// Parts (B, 2, C, H, K) as images of 2 C channels.
Tensor channels_of(const Tensor& parts) {
  return shaped(parts, {parts.size(0), 2 * parts.size(2), parts.size(3), parts.size(4)});
}

// -- zeros ---------------------------------------------------------------------------------------

// The mixed, filtered and shifted half spectrum, to a real and an imaginary image.
template <typename O>
void respond(const Stream& stream, const Arguments& of, const Parts<O>& to) {
  const Tensor spectrum = spectrum_of(of.x);
  Plan plan{};
  plan.batch = spectrum.size(0), plan.rows = spectrum.size(2), plan.bins = spectrum.size(3);
  plan.inputs = static_cast<int>(of.x.size(1)), plan.outputs = static_cast<int>(of.outputs());
  plan.size = static_cast<int>(of.size());
  STD_TORCH_CHECK(plan.size <= kMostBins, "filters of up to ", kMostBins, " bins, got ", plan.size);
  for (plan.group = 16; plan.group * (plan.size + 1) * kLine > kRing;) plan.group /= 2;
  plan.groups = static_cast<int>(divided(plan.outputs, plan.group));
  plan.strips = static_cast<int>(divided(plan.bins, plan.width()));
  const auto blocks = [&] {
    plan.bands = static_cast<int>(divided(plan.rows, plan.band));
    return plan.batch * 2 * plan.groups * plan.bands * plan.strips;
  };
  // A band mixes 2 * (size / 2) rows more than it writes: tall ones, where these are blocks enough.
  for (plan.band = 32; blocks() < 512 && plan.band > 8;) plan.band /= 2;

  const Tensor mixing = floats(of.x, {2, plan.lines(), plan.depth()});
  const Tensor taps = floats(of.x, {2, plan.lines(), plan.taps()});
  with_type(of.mixing, [&](auto type) {
    using T = decltype(type);
    launch(stream, divided(mixing.numel(), kThreads), dim3(kThreads),
           frequency_pack_mixing_kernel<T>, data<const T>(of.mixing), data<float>(mixing),
           plan.outputs, plan.inputs, plan.lines(), plan.depth());
    launch(stream, divided(taps.numel(), kThreads), dim3(kThreads), frequency_pack_taps_kernel<T>,
           data<const T>(of.kernel), data_of<T>(of.gain), data<float>(taps), plan);
  });
  const MaybeTensor mixing_bias = fastfusion::wide(of.mixing_bias);
  const MaybeTensor bias = fastfusion::wide(of.bias);
  const auto part = [&](int index) {
    const auto stride = spectrum.strides();
    return View<const float>{data<const float>(spectrum) + index, stride[0], stride[1], stride[2],
                             stride[3]};
  };
  launch(stream, blocks(), dim3(kThreads), frequency_zeros_fwd_kernel<O>,
         Parts<const float>{{part(0), part(1)}}, data<const float>(mixing),
         data_of<float>(mixing_bias), data<const float>(taps), data_of<float>(bias), to, plan);
}

// Through filter and mixing to the arguments; `grad` is that of the response's parts, all in float.
Gradients response_backward(const Stream& stream, const Tensor& grad, const Arguments& of,
                            const std::vector<bool>& mask) {
  Gradients found;
  const bool of_filter = mask[kKernel] || mask[kGain];
  const bool below = mask[kX] || mask[kMixing] || mask[kMixingBias];
  const Tensor parts = parts_of(stream, of.x, 1, 1);
  const Tensor mixed = mix(of.mixing, parts, of.mixing_bias);
  const int64_t one = 1;
  const std::string none = "none";
  const auto made = run<3>("fastfusion_cuda::depthwise_conv2d_backward", channels_of(grad),
                           channels_of(mixed), filters_of(of), MaybeTensor(), one, one, none,
                           flags(std::array<bool, 3>{below, of_filter, false}));
  if (of_filter) put_kernel(shaped(made[1], shape_of(of.kernel)), of.kernel, of.gain, found);
  if (mask[kBias]) found[kBias] = total(grad, {0, 3, 4});
  if (!below) return found;
  const Tensor grad_mixed = shaped(made[0], shape_of(grad));
  if (mask[kMixing]) found[kMixing] = mixing_gradient(grad_mixed, parts);
  if (mask[kMixingBias]) found[kMixingBias] = total(grad_mixed, {0, 3, 4});
  if (mask[kX]) {
    // The adjoint of the transform is the inverse's: columns that stand for two are counted once.
    const Tensor grad_parts = torch::stable::contiguous(
        mix(torch::stable::transpose(of.mixing, 1, 2), grad_mixed, std::nullopt));
    const Tensor spectrum =
        floats(of.x, {of.x.size(0), of.x.size(1), grad.size(3), grad.size(4), 2});
    convert(stream, true, spectrum, grad_parts, of.x.size(3), 1, 0.5);
    found[kX] = image_of(stream, spectrum, of.x.size(3), kNotScaled);
  }
  return found;
}

Tensor zeros_forward(const Stream& stream, const Arguments& of) {
  const int64_t rows = of.x.size(2), bins = of.x.size(3) / 2 + 1;
  const Tensor response = floats(of.x, {of.x.size(0), of.outputs(), rows, bins, 2});
  const auto part = [&](int index) {
    return View<float>{data<float>(response) + index, response.stride(0), response.stride(1),
                       response.stride(2), response.stride(3)};
  };
  respond(stream, of, Parts<float>{{part(0), part(1)}});
  return image_of(stream, response, of.x.size(3), kByLength);
}

Gradients zeros_backward(const Stream& stream, const Tensor& grad, const Arguments& of,
                         const std::vector<bool>& mask) {
  // The adjoint of the inverse is the transform, its inner columns counted twice.
  const double scale = 1.0 / static_cast<double>(of.x.size(2) * of.x.size(3));
  return response_backward(stream, parts_of(stream, grad, scale, 2 * scale), of, mask);
}

// -- circular ------------------------------------------------------------------------------------

Circle circle_of(const Arguments& of, const Tensor& image) {
  Circle circle{};
  circle.batch = of.x.size(0), circle.rows = of.x.size(2), circle.columns = of.x.size(3);
  circle.inputs = static_cast<int>(of.x.size(1)), circle.outputs = static_cast<int>(of.outputs());
  circle.size = static_cast<int>(of.size()), circle.count = circle.size * circle.size / 2 + 1;
  circle.groups = static_cast<int>(divided(circle.outputs, kTile));
  circle.tiles = divided(circle.rows * circle.columns, kTile);
  circle.last = layout_of(image) == MemoryFormat::ChannelsLast;
  return circle;
}

Tensor halved_taps(const Stream& stream, const Arguments& of) {
  const int64_t filters = 2 * of.outputs(), taps = of.size() * of.size();
  const Tensor half = floats(of.x, {filters, taps / 2 + 1});
  with_type(of.kernel, [&](auto type) {
    using T = decltype(type);
    launch(stream, divided(half.numel(), kThreads), dim3(kThreads), frequency_halve_taps_kernel<T>,
           data<const T>(of.kernel), data_of<T>(of.gain), data<float>(half), filters,
           static_cast<int>(taps));
  });
  return half;
}

Tensor circular_forward(const Stream& stream, const Arguments& of) {
  const Circle circle = circle_of(of, of.x);
  const Tensor half = halved_taps(stream, of);
  const Tensor y = empty_image(of.x, {circle.batch, circle.outputs, circle.rows, circle.columns});
  const int64_t count = circle.tiles * circle.groups;
  const Tensor notes =
      torch::stable::empty({circle.batch * count}, ScalarType::Int, std::nullopt, of.x.device());
  with_type(of.x, [&](auto type) {
    using T = decltype(type);
    launch(stream, circle.batch * count, dim3(kTileThreads), frequency_circular_fwd_kernel<T>,
           view<const T>(of.x), data<const T>(of.mixing), data_of<T>(of.mixing_bias),
           data<const float>(half), data_of<T>(of.bias), view<T>(y), data<int>(notes), circle);
    const int64_t size = y.numel() / circle.batch;
    launch(stream, circle.batch * divided(size, kTileThreads), dim3(kTileThreads),
           frequency_special_kernel<T>, data<T>(y), data<const int>(notes), size, count);
  });
  return y;
}

Gradients circular_backward(const Stream& stream, const Tensor& grad, const Arguments& of,
                            const std::vector<bool>& mask) {
  Gradients found;
  const Circle circle = circle_of(of, grad);
  const int64_t batch = circle.batch, outputs = circle.outputs,
                pixels = circle.rows * circle.columns;
  const bool of_filter = mask[kKernel] || mask[kGain];
  const bool below = mask[kX] || mask[kMixing] || mask[kMixingBias];
  const Tensor matrices = shaped(of.mixing, {2 * outputs, circle.inputs});
  const Tensor x = shaped(of.x, {batch, 1, circle.inputs, circle.rows, circle.columns});
  const Tensor flat = shaped(of.x, {batch, circle.inputs, pixels});
  const Sizes shape = {batch, 2, outputs, circle.rows, circle.columns};
  MaybeTensor mixed, of_mixed, of_windows;
  if (of_filter) mixed = torch::stable::contiguous(matmul(matrices, flat));
  if (of_filter) of_windows = floats(grad, shape);
  if (below) of_mixed = floats(grad, shape);
  const Tensor half = halved_taps(stream, of);
  if (of_filter || below)
    launch(stream, batch * circle.tiles * circle.groups, dim3(kTileThreads),
           frequency_circular_bwd_kernel, view<const float>(grad), data_of<float>(mixed),
           data_of<float>(of.mixing_bias), data<const float>(half),
           below ? data<float>(*of_mixed) : nullptr, of_filter ? data<float>(*of_windows) : nullptr,
           circle);
  if (of_filter) {
    const Tensor waves = floats(grad, {circle.count, pixels});
    launch(stream, divided(waves.numel(), kThreads), dim3(kThreads), frequency_waves_kernel,
           data<float>(waves), circle);
    const Tensor of_half = total(matmul(shaped(*of_windows, {batch, 2 * outputs, pixels}),
                                        torch::stable::transpose(waves, 0, 1)),
                                 {0});
    const int64_t taps = of.size() * of.size();
    const Tensor grad_filters = floats(grad, {2 * outputs, taps});
    launch(stream, divided(grad_filters.numel(), kThreads), dim3(kThreads),
           frequency_double_taps_kernel, data<const float>(torch::stable::contiguous(of_half)),
           data<float>(grad_filters), 2 * outputs, static_cast<int>(taps));
    put_kernel(shaped(grad_filters, shape_of(of.kernel)), of.kernel, of.gain, found);
  }
  if (mask[kBias]) found[kBias] = of_real_part(origin(grad));
  if (mask[kMixingBias]) found[kMixingBias] = of_real_part(origin(select(*of_mixed, 1, 0)));
  if (mask[kMixing]) found[kMixing] = mixing_gradient(*of_mixed, x);
  if (mask[kX])
    found[kX] = shaped(matmul(torch::stable::transpose(matrices, 0, 1),
                              shaped(*of_mixed, {batch, 2 * outputs, pixels})),
                       shape_of(of.x));
  return found;
}

// -- the operators -------------------------------------------------------------------------------

Tensor frequency_filter2d(Tensor x, Tensor mixing, Tensor kernel, MaybeTensor mixing_bias,
                          MaybeTensor gain, MaybeTensor bias, Word padding_mode) {
  const Stream stream(x);
  const Arguments of(x, mixing, kernel, mixing_bias, gain, bias);
  if (padding_mode.text == "circular") return circular_forward(stream, of);
  return result(zeros_forward(stream, of), x, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frequency_filter2d_backward(
    Tensor grad, Tensor x, Tensor mixing, Tensor kernel, MaybeTensor mixing_bias, MaybeTensor gain,
    MaybeTensor bias, Word padding_mode, std::vector<bool> mask) {
  const Stream stream(x);
  const Arguments of = Arguments(x, mixing, kernel, mixing_bias, gain, bias).in_float();
  const Tensor upstream = fastfusion::wide(grad);
  const Gradients found = padding_mode.text == "circular"
                              ? circular_backward(stream, upstream, of, mask)
                              : zeros_backward(stream, upstream, of, mask);
  const auto of_mask = [&](int index) { return wanted(found, mask, x, index); };
  return {of_mask(kX),          of_mask(kMixing), of_mask(kKernel),
          of_mask(kMixingBias), of_mask(kGain),   of_mask(kBias)};
}

std::tuple<Tensor, Tensor> frequency_response2d(Tensor x, Tensor mixing, Tensor kernel,
                                                MaybeTensor mixing_bias) {
  const Stream stream(x);
  const Arguments of(x, mixing, kernel, mixing_bias, std::nullopt, std::nullopt);
  const Sizes shape = {x.size(0), of.outputs(), x.size(2), x.size(3) / 2 + 1};
  const Tensor real = empty_image(x, shape), imag = empty_image(x, shape);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    respond(stream, of, Parts<T>{{view<T>(real), view<T>(imag)}});
  });
  return {real, imag};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frequency_response2d_backward(
    Tensor grad_real, Tensor grad_imag, Tensor x, Tensor mixing, Tensor kernel,
    MaybeTensor mixing_bias, std::vector<bool> mask) {
  const Stream stream(x);
  const Arguments of =
      Arguments(x, mixing, kernel, mixing_bias, std::nullopt, std::nullopt).in_float();
  const Tensor grad = joined(grad_real, grad_imag, of.x);
  const std::vector<bool> all = {mask[0], mask[1], mask[2], mask[3], false, false};
  const Gradients found = response_backward(stream, grad, of, all);
  const auto of_mask = [&](int index) { return wanted(found, mask, x, index); };
  return {of_mask(kX), of_mask(kMixing), of_mask(kKernel), of_mask(kMixingBias)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_frequency_filter(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("frequency_filter2d", TORCH_BOX(&frequency_filter2d));
  m.impl("frequency_filter2d_backward", TORCH_BOX(&frequency_filter2d_backward));
  m.impl("frequency_response2d", TORCH_BOX(&frequency_response2d));
  m.impl("frequency_response2d_backward", TORCH_BOX(&frequency_response2d_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
