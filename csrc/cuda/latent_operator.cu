// The latent operator: cross-attention to tokens, a trigonometric solver, and back.
//
// A tile is up to 64 pixels of one patch, or of several small patches, by all channels, in shared
// memory as (channel, pixel); to the channels comes one of ones, which carries the biases. The
// heads are done one after the other, so that only what a head needs is computed. Weights lie
// packed, a head's rows together: its keys folded into the prompts, its values, its queries.
//
// - Patches that fit into a tile: encode, solve and decode in one kernel; the image is read once,
//   the result written once, tokens never leave the block.
// - Larger patches: encode by chunks of pixels with an online softmax, the chunks merged in order;
//   solve; decode.
// - Backward: tokens again, then decode, solver and encode backwards, everything between them in
//   float. Each block adds up the parameters' gradients of its tiles in memory of its own.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "../bindings/schemas.h"
#include "../bindings/torch_calls.h"
#include "product.h"
#include "trigonometric.h"

namespace fastfusion::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPixels = 64;         // of a tile, at most
constexpr int64_t kChunk = 256;     // pixels of a large patch that one block takes
constexpr int kMostPrograms = 528;  // blocks that sum gradients: four a multiprocessor of an H200
constexpr int64_t kMostSums = 64 << 20;  // bytes of these sums
constexpr int kTerms = 8;                // of the series, whose gradients one thread sums

// Floats of shared memory: all that a block can have, and little over the half of it. So many
// blocks share a multiprocessor's registers; left to itself, the compiler spills for more.
constexpr int kLargeRoom = 12096, kSmallRoom = 6976;
template <int FLOATS>
constexpr int kBlocks = FLOATS == kSmallRoom ? 5 : 4;

constexpr int padded(int64_t size) { return static_cast<int>((size + 3) / 4 * 4); }

struct Sizes {
  int channels, heads, width, tokens;
  bool last;  // channels are what is adjacent in memory

  __host__ __device__ int lines() const { return (channels + 1 + 3) / 4 * 4; }  // and the ones
  __host__ __device__ int wide() const { return (width + 3) / 4 * 4; }
  __host__ __device__ int many() const { return (tokens + 3) / 4 * 4; }
};

// What a block has at a time: patches together, or a chunk of one patch's pixels.
struct Unit {
  int64_t first_patch, chunk, begin, end;
};

// How images are cut in patches, and these in tiles.
struct Cut {
  int64_t rows, columns, patch_rows, patch_columns, across, down;
  int64_t patches, pixels;  // of the batch; of a patch
  int64_t chunk, chunks;    // pixels of a chunk, chunks of a patch
  int64_t units;            // chunks of a patch, or tiles of small patches
  int slots, together;      // pixels of a patch in a tile, patches in a tile

  __device__ Unit unit(int64_t index) const {
    const int64_t begin = index % chunks * chunk;
    const int64_t end = begin + chunk < pixels ? begin + chunk : pixels;
    return {index / chunks * together, index % chunks, begin, end};
  }
  __host__ __device__ int places() const { return slots * together; }
  __host__ __device__ int stride() const { return places() + 4; }  // 4 more: other banks
};

struct Peak {  // of a token's scores: the largest, and the sum of exp(score - largest)
  float most, total;
};

// -- a tile --------------------------------------------------------------------------------------

template <int FLOATS>
struct alignas(16) Room {
  float value[FLOATS];
  int image[kPixels], row[kPixels], column[kPixels];  // row -1: not in the image
};

// Where a product's 4x4 results go: lines of a matrix in memory, which they replace or, unless
// these are fresh, add to.
struct Stored {
  float* to;
  int stride;

  __device__ void operator()(int row, int column, const float (&sum)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) store(to + (row + i) * stride + column, sum[i]);
  }
};
struct Added {
  float* to;
  int stride;
  bool fresh = false;

  __device__ void operator()(int row, int column, const float (&sum)[4][4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float now[4] = {};
      if (!fresh) load(to + (row + i) * stride + column, now);
#pragma unroll
      for (int k = 0; k < 4; ++k) now[k] += sum[i][k];
      store(to + (row + i) * stride + column, now);
    }
  }
};

struct Tile {
  const Cut& cut;
  const Sizes& size;
  float* free;
  int *image, *row, *column;
  int places, stride, lane, warp;

  template <int FLOATS>
  __device__ Tile(Room<FLOATS>& room, const Cut& cut, const Sizes& size)
      : cut(cut),
        size(size),
        free(room.value),
        image(room.image),
        row(room.row),
        column(room.column),
        places(cut.places()),
        stride(cut.stride()),
        lane(threadIdx.x % kWarp),
        warp(threadIdx.x / kWarp) {}

  __device__ float* take(int floats) {
    float* taken = free;
    free += floats;
    return taken;
  }

  // Call f(channel, place) once for each pair, neighbours in memory by neighbouring lanes.
  template <typename F>
  __device__ void each(int channels, const F& f) const {
    if (size.last) {
      for (int p = warp * 4 + lane % 4; p < places; p += 4 * kWarps)
        for (int c = lane / 4; c < channels; c += 8) f(c, p);
    } else {
      for (int c = warp; c < channels; c += kWarps)
        for (int p = lane; p < places; p += kWarp) f(c, p);
    }
  }

  // Where the pixels from `start` to `end` of the patches are; the ones of `pixels`.
  __device__ void locate(int64_t first_patch, int64_t start, int64_t end, float* pixels) const {
    const int p = threadIdx.x;
    if (p < places) {
      const int64_t patch = first_patch + p / cut.slots, at = start + p % cut.slots;
      const int64_t of_image = cut.across * cut.down, corner = patch % of_image;
      const int64_t r = corner / cut.across * cut.patch_rows + at / cut.patch_columns;
      const int64_t c = corner % cut.across * cut.patch_columns + at % cut.patch_columns;
      const bool inside = patch < cut.patches && at < end;
      image[p] = static_cast<int>(patch / of_image);
      row[p] = inside && r < cut.rows && c < cut.columns ? static_cast<int>(r) : -1;
      column[p] = static_cast<int>(c);
      pixels[size.channels * stride + p] = inside ? 1.0f : 0.0f;
      for (int line = size.channels + 1; line < size.lines(); ++line) pixels[line * stride + p] = 0;
    }
    __syncthreads();
  }

  template <typename T>
  __device__ float at(const View<T>& x, int channel, int p) const {
    return row[p] < 0 ? 0.0f : widen(*x.at(image[p], channel, row[p], column[p]));
  }
  // Pixels are there, for all, after arrive(). In float32 they are copied past the registers, all
  // of a thread's at once; half precision must be widened on the way.
  template <typename T>
  __device__ void read(const View<const T>& x, int first, int channels, int lines,
                       float* to) const {
    each(lines, [&](int c, int p) {
      float* place = to + c * stride + p;
      if constexpr (std::is_same_v<T, float>) {
        const bool there = c < channels && row[p] >= 0;
        const float* from = there ? x.at(image[p], first + c, row[p], column[p]) : x.data;
        copy_async<1>(place, from, there ? 1 : 0);
      } else {
        *place = c < channels ? at(x, first + c, p) : 0.0f;
      }
    });
    commit_copies();
  }
  // A tile of the image: all channels of the pixels from `start` to `end` of some patches.
  template <typename T>
  __device__ void fetch(const View<const T>& x, int64_t first_patch, int64_t start, int64_t end,
                        float* pixels) const {
    locate(first_patch, start, end, pixels);
    read(x, 0, size.channels, size.channels, pixels);
  }
  __device__ void arrive() const {
    wait_for_copies<0>();
    __syncthreads();
  }
  template <typename T>
  __device__ void put(const View<T>& y, int channel, int p, float value) const {
    if (row[p] >= 0) *y.at(image[p], channel, row[p], column[p]) = narrow<T>(value);
  }

  // Each pixel by some rows of the packed weights.
  __device__ void project(const float* weights, int rows, const float* pixels, float* to) const {
    product(
        rows, places, size.lines(), [&](int) { return Lines{weights, size.lines()}; },
        Lines{pixels, stride}, Stored{to, stride});
  }

  // A head's tokens (patch, token, channel of the head) from (patch, T, C), padded with 0.
  __device__ void read_tokens(const float* from, int64_t first_patch, int head, float* to) const {
    const int wide = size.wide(), many = size.many();
    for (int i = threadIdx.x; i < cut.together * many * wide; i += kThreads) {
      const int j = i % wide, t = i / wide % many;
      const int64_t patch = first_patch + i / wide / many;
      const bool there = j < size.width && t < size.tokens && patch < cut.patches;
      to[i] = there ? from[(patch * size.tokens + t) * size.channels + head * size.width + j] : 0;
    }
  }

  // Rows (token, place) from rows (channel of the head, place): each by its patch's tokens.
  __device__ void by_tokens(const float* tokens, const float* from, float* to) const {
    const int wide = size.wide(), many = size.many();
    product(
        many, places, wide,
        [&](int column) { return Lines{tokens + column / cut.slots * many * wide, wide}; },
        Lines{from, stride}, Stored{to, stride});
  }
  // And the other way.
  __device__ void to_channels(const float* tokens, const float* from, float* to) const {
    const int wide = size.wide(), many = size.many();
    product(
        wide, places, many,
        [&](int column) { return Turned{tokens + column / cut.slots * many * wide, wide}; },
        Lines{from, stride}, Stored{to, stride});
  }
};

// -- pieces of the forward pass ------------------------------------------------------------------

// Scores become exp(score - largest so far), a warp a patch and token. `fades` is what earlier sums
// are to be multiplied by, `totals` the sums with these; `peaks` is where they are kept from tile
// to tile, if anywhere, of the `present` first patches.
__device__ void pixel_softmax(const Tile& tile, const float* ones, float* scores, bool fresh,
                              Peak* peaks, int64_t peak_stride, int64_t present, float* fades,
                              float* totals) {
  const int slots = tile.cut.slots, tokens = tile.size.tokens;
  for (int r = tile.warp; r < tile.cut.together * tokens; r += kWarps) {
    const int first = r / tokens * slots;
    float* line = scores + r % tokens * tile.stride + first;
    Peak* peak = peaks + r / tokens * peak_stride + r % tokens;
    float most = -INFINITY, before = 0;
    for (int i = tile.lane; i < slots; i += kWarp)
      if (ones[first + i] > 0) most = fmaxf(most, line[i]);
#pragma unroll
    for (int bits = kWarp / 2; bits > 0; bits /= 2)
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, bits));
    float fade = 0;
    if (!fresh) {
      const Peak earlier = *peak;
      most = fmaxf(most, earlier.most);
      fade = expf(earlier.most - most);
      before = earlier.total * fade;
    }
    float sum = 0;
    for (int i = tile.lane; i < slots; i += kWarp) {
      line[i] = ones[first + i] > 0 ? expf(line[i] - most) : 0.0f;
      sum += line[i];
    }
    sum = warp_sum(sum) + before;
    __syncwarp();  // all lanes have read the peak
    if (tile.lane == 0) {
      fades[r] = fade;
      totals[r] = sum;
      if (r / tokens < present) *peak = {most, sum};
    }
  }
}

// sum over a patch's pixels of weight[token] value[channel of the head].
__device__ float mixed(const Tile& tile, const float* weights, const float* values, int patch,
                       int token, int channel) {
  const float* a = weights + token * tile.stride + patch * tile.cut.slots;
  const float* b = values + channel * tile.stride + patch * tile.cut.slots;
  float sum = 0;
  for (int i = 0; i < tile.cut.slots; i += 4) {
    float of_a[4], of_b[4];
    load(a + i, of_a);
    load(b + i, of_b);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum += of_a[k] * of_b[k];
  }
  return sum;
}

// Call f(patch, token, channel of the head) for all of a tile.
template <typename F>
__device__ void each_token(const Tile& tile, const F& f) {
  const int width = tile.size.width, tokens = tile.size.tokens;
  for (int i = threadIdx.x; i < tile.cut.together * tokens * width; i += kThreads)
    f(i / width / tokens, i / width % tokens, i % width);
}

// The softmax over the tokens of each pixel; rows that pad them become 0.
__device__ void token_softmax(const Tile& tile, float* scores) {
  const int p = threadIdx.x;
  if (p >= tile.places) return;
  float* line = scores + p;
  float most = -INFINITY, sum = 0;
  for (int t = 0; t < tile.size.tokens; ++t) most = fmaxf(most, line[t * tile.stride]);
  for (int t = 0; t < tile.size.tokens; ++t) {
    const float e = expf(line[t * tile.stride] - most);
    line[t * tile.stride] = e;
    sum += e;
  }
  const float share = 1.0f / sum;
  for (int t = 0; t < tile.size.many(); ++t)
    line[t * tile.stride] = t < tile.size.tokens ? line[t * tile.stride] * share : 0.0f;
}

// A head's channels of the result, from its queries, in whose place they are put together.
template <typename T>
__device__ void decode_head(const Tile& tile, const float* tokens, const float* pixels, int head,
                            float* scores, float* queries, const View<T>& y) {
  tile.by_tokens(tokens, queries, scores);
  __syncthreads();
  token_softmax(tile, scores);
  __syncthreads();
  tile.to_channels(tokens, scores, queries);
  __syncthreads();
  const int first = head * tile.size.width;
  tile.each(tile.size.width, [&](int c, int p) {
    tile.put(y, first + c, p, queries[c * tile.stride + p] + pixels[(first + c) * tile.stride + p]);
  });
  __syncthreads();
}

// -- weights -------------------------------------------------------------------------------------

template <typename T>
struct Weights {
  const T *prompts, *key, *value, *value_bias;  // null without the encoding
  const T *query, *query_bias;                  // null without the decoding
};

// Rows of a head in the packed weights.
__host__ __device__ int encoding_rows(const Sizes& size) { return size.many() + size.wide(); }

__device__ float scale_of(const Sizes& size) { return 1 / sqrtf(static_cast<float>(size.width)); }

// (heads, rows, channels and ones): W_k^T prompt / sqrt(d); values; queries / sqrt(d).
template <typename T>
__global__ void latent_pack_kernel(Weights<T> from, float* to, Sizes size, int rows) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int c = static_cast<int>(index % size.lines());
  const int row = static_cast<int>(index / size.lines() % rows);
  const int head = static_cast<int>(index / size.lines() / rows);
  if (head >= size.heads) return;
  const int keys = from.prompts == nullptr ? 0 : size.many();
  const int values = from.prompts == nullptr ? 0 : size.wide();
  float sum = 0;
  const auto projection = [&](const T* weight, const T* bias, int j) {
    if (j >= size.width || c > size.channels) return 0.0f;
    const int64_t o = head * size.width + j;
    return c == size.channels ? widen(bias[o]) : widen(weight[o * size.channels + c]);
  };
  if (row < keys) {
    if (row < size.tokens && c < size.channels) {
      for (int j = 0; j < size.width; ++j)
        sum +=
            widen(from.prompts[(static_cast<int64_t>(head) * size.tokens + row) * size.width + j]) *
            widen(from.key[static_cast<int64_t>(head * size.width + j) * size.channels + c]);
      sum *= scale_of(size);
    }
  } else if (row < keys + values) {
    sum = projection(from.value, from.value_bias, row - keys);
  } else {
    sum = projection(from.query, from.query_bias, row - keys - values) * scale_of(size);
  }
  to[index] = sum;
}

// (Q, C, 2) and the offset behind it.
template <typename T>
__global__ void latent_series_kernel(const T* sine, const T* cosine, const T* offset, float* to,
                                     int channels, int basis) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int c = static_cast<int>(index % channels);
  const int64_t q = index / channels;
  if (q > basis) return;
  if (q == basis) {
    to[2 * q * channels + c] = offset == nullptr ? 0.0f : widen(offset[c]);
  } else {
    to[2 * index] = widen(sine[c * static_cast<int64_t>(basis) + q]);
    to[2 * index + 1] = widen(cosine[c * static_cast<int64_t>(basis) + q]);
  }
}

template <typename T>
__device__ float prompt_of(const T* prompts, const Sizes& size, int head, int token, int j) {
  return widen(prompts[(static_cast<int64_t>(head) * size.tokens + token) * size.width + j]);
}

// -- forward -------------------------------------------------------------------------------------

template <typename T, int FLOATS>
__global__ void __launch_bounds__(kThreads, kBlocks<FLOATS>)
    latent_operator_fwd_kernel(View<const T> x, const float* weights, const T* prompts,
                               Series series, View<T> y, Cut cut, Sizes size) {
  Tile tile(shared_memory<Room<FLOATS>>(), cut, size);
  const int wide = size.wide(), many = size.many(), rows = many + 2 * wide;
  float* pixels = tile.take(size.lines() * tile.stride);
  float* scores = tile.take(rows * tile.stride);
  float* values = scores + many * tile.stride;
  float* queries = values + wide * tile.stride;
  float* tokens = tile.take(cut.together * many * wide);
  float* fades = tile.take(cut.together * size.tokens);
  float* totals = tile.take(cut.together * size.tokens);
  const float* ones = pixels + size.channels * tile.stride;

  tile.fetch(x, static_cast<int64_t>(blockIdx.x) * cut.together, 0, cut.pixels, pixels);
  for (int i = threadIdx.x; i < cut.together * many * wide; i += kThreads) tokens[i] = 0;
  tile.arrive();
  for (int head = 0; head < size.heads; ++head) {
    tile.project(weights + static_cast<int64_t>(head) * rows * size.lines(), rows, pixels, scores);
    __syncthreads();
    pixel_softmax(tile, ones, scores, true, nullptr, 0, 0, fades, totals);
    __syncthreads();
    each_token(tile, [&](int patch, int t, int j) {
      const float mean = mixed(tile, scores, values, patch, t, j) / totals[patch * size.tokens + t];
      tokens[(patch * many + t) * wide + j] =
          solved(mean + prompt_of(prompts, size, head, t, j), head * size.width + j, series);
    });
    __syncthreads();
    decode_head(tile, tokens, pixels, head, scores, queries, y);
  }
}

// The tokens (patches, T, C) where a patch is one chunk, else the chunks' sums (patches, chunks, T,
// C); in any case their peaks (patches, chunks, heads, T).
template <typename T, int FLOATS>
__global__ void __launch_bounds__(kThreads, kBlocks<FLOATS>)
    latent_encode_fwd_kernel(View<const T> x, const float* weights, int head_stride,
                             const T* prompts, float* latents, Peak* peaks, Cut cut, Sizes size) {
  Tile tile(shared_memory<Room<FLOATS>>(), cut, size);
  const int rows = encoding_rows(size);
  float* pixels = tile.take(size.lines() * tile.stride);
  float* scores = tile.take(rows * tile.stride);
  float* values = scores + size.many() * tile.stride;
  float* fades = tile.take(cut.together * size.tokens);
  float* totals = tile.take(cut.together * size.tokens);
  const float* ones = pixels + size.channels * tile.stride;

  const auto [first_patch, chunk, begin, end] = cut.unit(blockIdx.x);
  const int64_t peak_stride = cut.chunks * size.heads * size.tokens;
  for (int64_t start = begin; start < end; start += cut.slots) {
    tile.fetch(x, first_patch, start, end, pixels);
    tile.arrive();
    const bool fresh = start == begin, done = start + cut.slots >= end;
    for (int head = 0; head < size.heads; ++head) {
      tile.project(weights + head * head_stride, rows, pixels, scores);
      __syncthreads();
      const int64_t unit = first_patch * cut.chunks + chunk;
      pixel_softmax(tile, ones, scores, fresh, peaks + (unit * size.heads + head) * size.tokens,
                    peak_stride, cut.patches - first_patch, fades, totals);
      __syncthreads();
      each_token(tile, [&](int patch, int t, int j) {
        if (first_patch + patch >= cut.patches) return;
        const int r = patch * size.tokens + t;
        const int64_t place =
            ((unit + patch * cut.chunks) * size.tokens + t) * size.channels + head * size.width + j;
        float sum = mixed(tile, scores, values, patch, t, j);
        if (!fresh) sum += latents[place] * fades[r];
        if (done && cut.chunks == 1) sum = sum / totals[r] + prompt_of(prompts, size, head, t, j);
        latents[place] = sum;
      });
      __syncthreads();
    }
  }
}

constexpr int kShares = 8;  // of the chunks of a patch, merged by as many threads

struct Shares {
  float sum[kShares][kWarp];
  Peak peak[kShares][kWarp];
};

__device__ float merged(const Peak& a, float of_a, const Peak& b, float of_b, Peak* both) {
  const float most = fmaxf(a.most, b.most);
  // A share without chunks has seen nothing: -infinity, and no difference to it.
  const float fade_a = a.total > 0 || a.total != a.total ? expf(a.most - most) : 0.0f;
  const float fade_b = b.total > 0 || b.total != b.total ? expf(b.most - most) : 0.0f;
  *both = {most, a.total * fade_a + b.total * fade_b};
  return of_a * fade_a + of_b * fade_b;
}

// The chunks' sums to tokens, and the patches' peaks.
template <typename T>
__global__ void latent_merge_kernel(const float* parts, const Peak* part_peaks, const T* prompts,
                                    float* latents, Peak* peaks, Cut cut, Sizes size) {
  const int lines = size.tokens * size.channels, across = (lines + kWarp - 1) / kWarp;
  const int64_t patch = blockIdx.x / across;
  const int i = static_cast<int>(blockIdx.x % across) * kWarp + threadIdx.x;
  const int c = i % size.channels, t = i / size.channels;
  const int head = c / size.width, j = c % size.width;
  Peak peak = {-INFINITY, 0};
  float sum = 0;
  if (i < lines) {
    for (int64_t chunk = threadIdx.y; chunk < cut.chunks; chunk += kShares) {
      const int64_t unit = patch * cut.chunks + chunk;
      sum = merged(peak, sum, part_peaks[(unit * size.heads + head) * size.tokens + t],
                   parts[unit * lines + i], &peak);
    }
  }
  Shares& shares = shared_memory<Shares>();
  shares.sum[threadIdx.y][threadIdx.x] = sum;
  shares.peak[threadIdx.y][threadIdx.x] = peak;
  __syncthreads();
  if (threadIdx.y > 0 || i >= lines) return;
  for (int share = 1; share < kShares; ++share)
    sum = merged(peak, sum, shares.peak[share][threadIdx.x], shares.sum[share][threadIdx.x], &peak);
  latents[patch * lines + i] = sum / peak.total + prompt_of(prompts, size, head, t, j);
  if (j == 0) peaks[(patch * size.heads + head) * size.tokens + t] = peak;
}

__global__ void trigonometric_solve_fwd_kernel(const float* latents, Series series, float* to,
                                               int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index < count)
    to[index] = solved(latents[index], static_cast<int>(index % series.channels), series);
}

template <typename T, int FLOATS>
__global__ void __launch_bounds__(kThreads, kBlocks<FLOATS>)
    latent_decode_fwd_kernel(View<const T> x, const float* latents, const float* weights,
                             int head_stride, View<T> y, Cut cut, Sizes size) {
  Tile tile(shared_memory<Room<FLOATS>>(), cut, size);
  float* pixels = tile.take(size.lines() * tile.stride);
  float* scores = tile.take(size.many() * tile.stride);
  float* queries = tile.take(size.wide() * tile.stride);
  float* tokens = tile.take(cut.together * size.many() * size.wide());

  const auto [first_patch, chunk, begin, end] = cut.unit(blockIdx.x);
  for (int64_t start = begin; start < end; start += cut.slots) {
    tile.fetch(x, first_patch, start, end, pixels);
    tile.arrive();
    for (int head = 0; head < size.heads; ++head) {
      tile.read_tokens(latents, first_patch, head, tokens);
      tile.project(weights + head * head_stride, size.wide(), pixels, queries);
      __syncthreads();
      decode_head(tile, tokens, pixels, head, scores, queries, y);
    }
  }
}

// -- backward ------------------------------------------------------------------------------------

// From the gradients of some rows of the weights' products with the pixels (`flows`): those of the
// pixels, added to `of_pixels`, and those of the weights, added to `sums` unless they are the
// first.
__device__ void spread(const Tile& tile, const float* flows, int rows, const float* weights,
                       const float* pixels, float* of_pixels, float* sums, bool first) {
  const int lines = tile.size.lines(), stride = tile.stride;
  product(
      rows, lines, tile.places, [&](int) { return Lines{flows, stride}; }, Turned{pixels, stride},
      Added{sums, lines, first});
  product(
      lines, tile.places, rows, [&](int) { return Turned{weights, lines}; }, Lines{flows, stride},
      Added{of_pixels, stride});
}

__device__ void clear(float* from, int count) {
  for (int i = threadIdx.x; i < count; i += kThreads) from[i] = 0;
}

// The pixels' gradient by way of the queries and of the residual; the tokens', (patches, chunks, T,
// C); the packed queries', (programs, heads, rows, lines).
template <typename T>
__global__ void __launch_bounds__(kThreads)
    latent_decode_bwd_kernel(View<const T> grad, View<const T> x, const float* latents,
                             const float* weights, int head_stride, View<float> grad_x,
                             float* grad_latents, float* sums, Cut cut, Sizes size) {
  Tile tile(shared_memory<Room<kLargeRoom>>(), cut, size);
  const int wide = size.wide(), many = size.many(), stride = tile.stride, lines = size.lines();
  float* pixels = tile.take(lines * stride);
  float* of_pixels = tile.take(lines * stride);
  float* queries = tile.take(wide * stride);
  float* upstream = tile.take(wide * stride);
  float* attention = tile.take(many * stride);
  float* slopes = tile.take(many * stride);
  float* tokens = tile.take(cut.together * many * wide);

  bool first = true;
  sums += static_cast<int64_t>(blockIdx.x) * size.heads * wide * lines;
  for (int64_t unit = blockIdx.x; unit < cut.units; unit += gridDim.x) {
    const auto [first_patch, chunk, begin, end] = cut.unit(unit);
    for (int64_t start = begin; start < end; start += cut.slots) {
      tile.fetch(x, first_patch, start, end, pixels);
      clear(of_pixels, lines * stride);
      tile.arrive();
      for (int head = 0; head < size.heads; ++head) {
        const float* of_head = weights + head * head_stride;
        tile.read_tokens(latents, first_patch, head, tokens);
        tile.read(grad, head * size.width, size.width, wide, upstream);
        tile.project(of_head, wide, pixels, queries);
        tile.arrive();
        tile.by_tokens(tokens, queries, attention);
        tile.by_tokens(tokens, upstream, slopes);
        __syncthreads();
        token_softmax(tile, attention);
        if (const int p = threadIdx.x; p < tile.places) {
          const float* a = attention + p;
          float* slope = slopes + p;
          float inner = 0;
          for (int t = 0; t < size.tokens; ++t) inner += a[t * stride] * slope[t * stride];
          for (int t = 0; t < many; ++t)
            slope[t * stride] =
                t < size.tokens ? a[t * stride] * (slope[t * stride] - inner) : 0.0f;
        }
        __syncthreads();
        each_token(tile, [&](int patch, int t, int j) {
          if (first_patch + patch >= cut.patches) return;
          float* to =
              grad_latents +
              (((first_patch + patch) * cut.chunks + chunk) * size.tokens + t) * size.channels +
              head * size.width + j;
          const float sum = mixed(tile, attention, upstream, patch, t, j) +
                            mixed(tile, slopes, queries, patch, t, j);
          *to = start == begin ? sum : *to + sum;
        });
        __syncthreads();
        tile.to_channels(tokens, slopes, queries);
        __syncthreads();
        spread(tile, queries, wide, of_head, pixels, of_pixels, sums + head * wide * lines, first);
        __syncthreads();
      }
      tile.each(size.channels, [&](int c, int p) {
        tile.put(grad_x, c, p, of_pixels[c * stride + p] + tile.at(grad, c, p));
      });
      __syncthreads();
      first = false;
    }
  }
}

// The pixels' gradient by way of keys and values (plus `more`, if that is there); the packed keys'
// and values', (programs, heads, rows, lines); the tokens' summed over the patches, (programs, T,
// C). A token without its prompt is the attention's mean, whose product with its gradient is the
// softmax's inner sum.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    latent_encode_bwd_kernel(const float* grad, View<const T> x, const float* latents,
                             const Peak* peaks, const T* prompts, const float* weights,
                             int head_stride, View<const float> more, View<T> grad_x, float* sums,
                             float* token_sums, Cut cut, Sizes size) {
  Tile tile(shared_memory<Room<kLargeRoom>>(), cut, size);
  const int wide = size.wide(), many = size.many(), stride = tile.stride, lines = size.lines();
  const int rows = encoding_rows(size);
  float* pixels = tile.take(lines * stride);
  float* of_pixels = tile.take(lines * stride);
  float* attention = tile.take(many * stride);
  float* slopes = tile.take(many * stride);
  float* values = tile.take(wide * stride);  // behind the slopes, as in the packed weights
  float* flows = tile.take(cut.together * many * wide);
  float* inner = tile.take(cut.together * size.tokens);
  float* most = tile.take(cut.together * size.tokens);
  float* total = tile.take(cut.together * size.tokens);
  const float* ones = pixels + size.channels * stride;
  const bool whole = cut.pixels <= cut.slots;

  bool first = true;
  sums += static_cast<int64_t>(blockIdx.x) * size.heads * rows * lines;
  token_sums += static_cast<int64_t>(blockIdx.x) * size.tokens * size.channels;
  clear(token_sums, size.tokens * size.channels);
  for (int64_t unit = blockIdx.x; unit < cut.units; unit += gridDim.x) {
    const auto [first_patch, chunk, begin, end] = cut.unit(unit);
    for (int64_t start = begin; start < end; start += cut.slots) {
      tile.fetch(x, first_patch, start, end, pixels);
      clear(of_pixels, lines * stride);
      tile.arrive();
      for (int head = 0; head < size.heads; ++head) {
        const float* of_head = weights + head * head_stride;
        tile.read_tokens(grad, first_patch, head, flows);
        for (int r = threadIdx.x; r < cut.together * size.tokens; r += kThreads) {
          const int64_t patch = first_patch + r / size.tokens;
          const int t = r % size.tokens;
          Peak peak = {0, 1};
          float sum = 0;
          if (patch < cut.patches) {
            peak = peaks[(patch * size.heads + head) * size.tokens + t];
            const int64_t from = (patch * size.tokens + t) * size.channels + head * size.width;
            for (int j = 0; j < size.width && !whole; ++j)
              sum += grad[from + j] * (latents[from + j] - prompt_of(prompts, size, head, t, j));
          }
          inner[r] = sum, most[r] = peak.most, total[r] = peak.total;
        }
        tile.project(of_head, many, pixels, attention);
        tile.project(of_head + many * lines, wide, pixels, values);
        __syncthreads();
        tile.by_tokens(flows, values, slopes);
        if (start == 0)
          for (int i = threadIdx.x; i < size.tokens * size.width; i += kThreads) {
            const int t = i / size.width, j = i % size.width;
            float sum = 0;
            for (int patch = 0; patch < cut.together; ++patch)
              sum += flows[(patch * many + t) * wide + j];
            token_sums[t * size.channels + head * size.width + j] += sum;
          }
        __syncthreads();
        for (int r = tile.warp; r < cut.together * many; r += kWarps) {
          const int patch = r / many, t = r % many, peak = patch * size.tokens + t;
          const int place = patch * cut.slots;
          float* a = attention + t * stride + place;
          float* slope = slopes + t * stride + place;
          const bool known = t < size.tokens;
          float sum = 0;
          for (int i = tile.lane; i < cut.slots; i += kWarp) {
            const bool counts = known && ones[place + i] > 0;
            a[i] = counts ? expf(a[i] - most[peak]) / total[peak] : 0.0f;
            sum += counts ? a[i] * slope[i] : 0.0f;
          }
          // Where the tile has the whole patch, of the very values that it is taken from: one pixel
          // alone gets 0.
          sum = whole ? warp_sum(sum) : known ? inner[peak] : 0.0f;
          for (int i = tile.lane; i < cut.slots; i += kWarp)
            slope[i] = known && ones[place + i] > 0 ? a[i] * (slope[i] - sum) : 0.0f;
        }
        __syncthreads();
        tile.to_channels(flows, attention, values);
        __syncthreads();
        spread(tile, slopes, rows, of_head, pixels, of_pixels, sums + head * rows * lines, first);
        __syncthreads();
      }
      tile.each(size.channels, [&](int c, int p) {
        const float rest = more.data == nullptr ? 0.0f : tile.at(more, c, p);
        tile.put(grad_x, c, p, of_pixels[c * stride + p] + rest);
      });
      __syncthreads();
      first = false;
    }
  }
}

template <typename T>
struct Gradients {  // null where not wanted
  T *prompts, *key, *key_bias, *value, *value_bias, *query, *query_bias;
};

// The weights' gradients from the packed ones, (heads, rows, lines): a thread for each (out, in) of
// a weight, the ones included, and for each element of the prompts.
template <typename T>
__global__ void latent_unpack_kernel(const float* encoding, const float* tokens,
                                     const float* decoding, Weights<T> weights, Gradients<T> to,
                                     Sizes size) {
  const int channels = size.channels, width = size.width, lines = size.lines();
  const int rows = encoding_rows(size);
  int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t matrix = static_cast<int64_t>(channels) * (channels + 1);
  if (index < matrix) {
    const int c = static_cast<int>(index % (channels + 1));
    const int o = static_cast<int>(index / (channels + 1)), head = o / width, j = o % width;
    const auto put = [&](T* weight, T* bias, float value) {
      if (c < channels && weight != nullptr) weight[o * channels + c] = narrow<T>(value);
      if (c == channels && bias != nullptr) bias[o] = narrow<T>(value);
    };
    if (encoding != nullptr) {
      const float* of_head = encoding + static_cast<int64_t>(head) * rows * lines;
      // Through the keys, W_k^T prompt / sqrt(d). A softmax over pixels does not see their bias:
      // its gradient is 0 (NaN where that of the scores is).
      const auto of_key = [&](int in) {
        float sum = 0;
        for (int t = 0; t < size.tokens; ++t)
          sum += prompt_of(weights.prompts, size, head, t, j) * of_head[t * lines + in];
        return sum * scale_of(size);
      };
      if (c < channels) {
        put(to.key, nullptr, of_key(c));
      } else {
        float sum = 0;
        for (int in = 0; in < channels; ++in) sum += of_key(in);
        put(nullptr, to.key_bias, 0 * sum);
      }
      put(to.value, to.value_bias, of_head[(size.many() + j) * lines + c]);
    }
    if (decoding != nullptr)
      put(to.query, to.query_bias,
          decoding[(static_cast<int64_t>(head) * size.wide() + j) * lines + c] * scale_of(size));
    return;
  }
  index -= matrix;
  if (to.prompts == nullptr || index >= static_cast<int64_t>(size.tokens) * channels) return;
  const int j = static_cast<int>(index % width);
  const int t = static_cast<int>(index / width % size.tokens);
  const int head = static_cast<int>(index / width / size.tokens);
  const float* line = encoding + (static_cast<int64_t>(head) * rows + t) * lines;
  const T* key = weights.key + static_cast<int64_t>(head * width + j) * channels;
  float sum = 0;
  for (int c = 0; c < channels; ++c) sum += line[c] * widen(key[c]);
  to.prompts[index] = narrow<T>(sum * scale_of(size) + tokens[t * channels + head * width + j]);
}

__global__ void trigonometric_solve_bwd_kernel(const float* grad, const float* latents,
                                               Series series, float* grad_latents, int64_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= count) return;
  const int channel = static_cast<int>(index % series.channels);
  const float z = latents[index];
  const Rotation first = rotation(series.squash ? squashed(z) : z, series);
  Rotation now = first;
  float inner = 0;
  for (int q = 0; q < series.basis; ++q) {
    float ab[2];
    series.term(q, channel, ab);
    inner += static_cast<float>(q + 1) * (ab[0] * now.cosine - ab[1] * now.sine);
    now.turn(first);
  }
  float flow = grad[index] * (1.0f + series.fundamental * inner);
  // 1 - sigmoid(z) = sigmoid(-z), without the cancellation.
  if (series.squash) flow *= squashed(z) / (1.0f + expf(z));
  grad_latents[index] = flow;
}

struct SeriesSums {
  float value[kWarps][2 * kTerms + 1][kWarp];
};

// Of a share of the rows: the sums of grad sin(q w z), grad cos(q w z) for kTerms of the terms, and
// of grad; (shares, 2 groups kTerms + 1, C), a block for 32 channels of a group and a share.
__global__ void __launch_bounds__(kThreads)
    trigonometric_sums_kernel(const float* grad, const float* latents, Series series, float* sums,
                              int64_t rows, int64_t per_share, int groups) {
  const int across = (series.channels + kWarp - 1) / kWarp;
  const int channel = static_cast<int>(blockIdx.x % across) * kWarp + threadIdx.x;
  const int group = static_cast<int>(blockIdx.x / across % groups);
  const int64_t share = blockIdx.x / across / groups;
  float sum[2 * kTerms + 1] = {};
  const int64_t end = (share + 1) * per_share < rows ? (share + 1) * per_share : rows;
  for (int64_t r = share * per_share + threadIdx.y; r < end && channel < series.channels;
       r += kWarps) {
    const float g = grad[r * series.channels + channel];
    const float z = latents[r * series.channels + channel];
    const Rotation first = rotation(series.squash ? squashed(z) : z, series);
    Rotation now = first;
    for (int q = 0; q < group * kTerms; ++q) now.turn(first);
#pragma unroll
    for (int q = 0; q < kTerms; ++q) {
      sum[2 * q] += g * now.sine;
      sum[2 * q + 1] += g * now.cosine;
      now.turn(first);
    }
    sum[2 * kTerms] += g;
  }
  SeriesSums& parts = shared_memory<SeriesSums>();
#pragma unroll
  for (int i = 0; i <= 2 * kTerms; ++i) parts.value[threadIdx.y][i][threadIdx.x] = sum[i];
  __syncthreads();
  if (channel >= series.channels) return;
  for (int i = threadIdx.y; i <= 2 * kTerms; i += kWarps) {
    if (i == 2 * kTerms && group > 0) continue;
    float all = 0;
    for (int warp = 0; warp < kWarps; ++warp) all += parts.value[warp][i][threadIdx.x];
    const int64_t lines = 2 * groups * kTerms + 1;
    const int64_t line = i == 2 * kTerms ? lines - 1 : 2 * group * kTerms + i;
    sums[(share * lines + line) * series.channels + channel] = all;
  }
}

// From the sums, (2 groups kTerms + 1, C), to (C, Q) and (C).
template <typename T>
__global__ void latent_series_bwd_kernel(const float* sums, T* sine, T* cosine, T* offset,
                                         int channels, int basis, int lines) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int c = static_cast<int>(index % channels);
  const int64_t q = index / channels;
  if (q > basis) return;
  if (q == basis) {
    if (offset != nullptr)
      offset[c] = narrow<T>(sums[static_cast<int64_t>(lines - 1) * channels + c]);
    return;
  }
  const int64_t to = static_cast<int64_t>(c) * basis + q;
  if (sine != nullptr) sine[to] = narrow<T>(sums[2 * q * channels + c]);
  if (cosine != nullptr) cosine[to] = narrow<T>(sums[(2 * q + 1) * channels + c]);
}

// -- launches ------------------------------------------------------------------------------------

struct Needs {  // of a tile: floats for each pixel and for each patch
  int64_t of_pixel, of_patch;
};

// An image, its patches, and the weights of the encoding, of the decoding, or of both.
struct Model {
  Tensor x;
  int64_t patch_rows, patch_columns;
  Sizes size;
  MaybeTensor prompts, key, value, value_bias, query, query_bias;

  int rows() const { return (prompts ? encoding_rows(size) : 0) + (query ? size.wide() : 0); }
  int head_stride() const { return rows() * size.lines(); }
  int decoding_first() const { return prompts ? encoding_rows(size) * size.lines() : 0; }

  template <typename T>
  Weights<T> weights() const {
    const auto at = [](const MaybeTensor& x) { return x ? data<const T>(*x) : nullptr; };
    return {at(prompts), at(key), at(value), at(value_bias), at(query), at(query_bias)};
  }
  Tensor packed(const Stream& stream) const {
    const Tensor to = floats(x, {size.heads, rows(), size.lines()});
    with_type(x, [&](auto type) {
      using T = decltype(type);
      launch(stream, divided(to.numel(), kThreads), dim3(kThreads), latent_pack_kernel<T>,
             weights<T>(), data<float>(to), size, rows());
    });
    return to;
  }

  // The largest tiles that fit into a room, by what they hold: floats for each pixel and for each
  // patch. Where no whole patch fits, parts of one; if they must be whole, or not even 4 pixels
  // fit, no tiles.
  Cut cut(const Needs& needs, int64_t room, bool whole = false) const {
    Cut cut{};
    cut.rows = x.size(2), cut.columns = x.size(3);
    cut.patch_rows = patch_rows, cut.patch_columns = patch_columns;
    cut.across = divided(cut.columns, patch_columns), cut.down = divided(cut.rows, patch_rows);
    cut.patches = x.size(0) * cut.across * cut.down;
    cut.pixels = patch_rows * patch_columns;
    const auto fits = [&](int64_t slots, int64_t together) {
      return needs.of_pixel * (slots * together + 4) + needs.of_patch * together <= room;
    };
    if (cut.pixels <= kPixels) {
      cut.slots = padded(cut.pixels);
      cut.together = static_cast<int>(std::min<int64_t>(kPixels / cut.slots, cut.patches));
      while (cut.together > 0 && !fits(cut.slots, cut.together)) --cut.together;
    }
    cut.chunk = cut.pixels;
    if (cut.together == 0 && !whole) {
      cut.slots = kPixels, cut.chunk = kChunk;
      while (cut.slots > 4 && !fits(cut.slots, 1)) cut.slots /= 2;
      cut.together = fits(cut.slots, 1) ? 1 : 0;
    }
    cut.chunks = divided(cut.pixels, cut.chunk);
    if (cut.together > 0) cut.units = divided(cut.patches, cut.together) * cut.chunks;
    return cut;
  }

  Cut cut(const Needs& needs) const {
    const Cut found = cut(needs, kLargeRoom);
    STD_TORCH_CHECK(found.together > 0, "the latent operator's matrices do not fit on the chip");
    return found;
  }

  // Call f(cut, room): the small room, which lets more blocks run, where the tiles are as large.
  template <typename F>
  void with_room(const Needs& needs, const F& f) const {
    const Cut small = cut(needs, kSmallRoom), large = cut(needs);
    if (small.places() == large.places())
      f(small, std::integral_constant<int, kSmallRoom>());
    else
      f(large, std::integral_constant<int, kLargeRoom>());
  }
};

Sizes sizes_of(const Tensor& x, int64_t heads, int64_t tokens) {
  const int64_t channels = x.size(1);
  return {static_cast<int>(channels), static_cast<int>(heads), static_cast<int>(channels / heads),
          static_cast<int>(tokens), layout_of(x) == MemoryFormat::ChannelsLast};
}

struct Encoded {
  Tensor latents, peaks;  // (patches, T, C) in float; (patches, heads, T, 2)
};

Encoded encode(const Stream& stream, const Model& model, const Tensor& packed) {
  const Sizes& size = model.size;
  const auto scratch = [&](int64_t units) {
    return Encoded{floats(model.x, {units, size.tokens, size.channels}),
                   floats(model.x, {units, size.heads, size.tokens, 2})};
  };
  const auto peaks = [](const Encoded& of) {
    return reinterpret_cast<Peak*>(data<float>(of.peaks));
  };
  std::optional<Encoded> whole;
  const Needs needs = {size.lines() + encoding_rows(size), 2 * size.tokens};
  with_type(model.x, [&](auto type) {
    using T = decltype(type);
    const T* prompts = model.weights<T>().prompts;
    model.with_room(needs, [&](const Cut& cut, auto room) {
      const Encoded parts = scratch(cut.patches * cut.chunks);
      launch(stream, cut.units, dim3(kThreads), latent_encode_fwd_kernel<T, decltype(room)::value>,
             view<const T>(model.x), data<const float>(packed), model.head_stride(), prompts,
             data<float>(parts.latents), peaks(parts), cut, size);
      whole = cut.chunks == 1 ? parts : scratch(cut.patches);
      if (cut.chunks == 1) return;
      launch(stream, cut.patches * divided(size.tokens * size.channels, kWarp),
             dim3(kWarp, kShares), latent_merge_kernel<T>, data<const float>(parts.latents),
             peaks(parts), prompts, data<float>(whole->latents), peaks(*whole), cut, size);
    });
  });
  return *whole;
}

struct SeriesTensor {
  Tensor packed;
  Series series;

  SeriesTensor(const Stream& stream, const Tensor& sine, const Tensor& cosine,
               const MaybeTensor& offset, double fundamental, bool squash) {
    const int64_t channels = sine.size(0), basis = sine.size(1);
    packed = floats(sine, {(2 * basis + 1) * channels});
    const Tensor a = torch::stable::contiguous(sine), b = torch::stable::contiguous(cosine);
    const MaybeTensor shift = dense(offset);
    with_type(sine, [&](auto type) {
      using T = decltype(type);
      launch(stream, divided((basis + 1) * channels, kThreads), dim3(kThreads),
             latent_series_kernel<T>, data<const T>(a), data<const T>(b),
             shift ? data<const T>(*shift) : nullptr, data<float>(packed),
             static_cast<int>(channels), static_cast<int>(basis));
    });
    const double turns = fundamental / (2 * M_PI);
    const float high = static_cast<float>(turns);
    series = {data<const float>(packed),
              data<const float>(packed) + 2 * basis * channels,
              static_cast<int>(channels),
              static_cast<int>(basis),
              high,
              static_cast<float>(turns - static_cast<double>(high)),
              static_cast<float>(fundamental),
              squash};
  }
};

Tensor solve(const Stream& stream, const Tensor& latents, const Series& series) {
  const Tensor to = torch::stable::empty_like(latents);
  launch(stream, divided(latents.numel(), kThreads), dim3(kThreads), trigonometric_solve_fwd_kernel,
         data<const float>(latents), series, data<float>(to), latents.numel());
  return to;
}

Tensor decode(const Stream& stream, const Model& model, const Tensor& packed,
              const Tensor& latents) {
  const Sizes& size = model.size;
  const Tensor y = empty_image_like(model.x);
  const Needs needs = {size.lines() + size.many() + size.wide(), size.many() * size.wide()};
  with_type(model.x, [&](auto type) {
    using T = decltype(type);
    model.with_room(needs, [&](const Cut& cut, auto room) {
      launch(stream, cut.units, dim3(kThreads), latent_decode_fwd_kernel<T, decltype(room)::value>,
             view<const T>(model.x), data<const float>(latents),
             data<const float>(packed) + model.decoding_first(), model.head_stride(), view<T>(y),
             cut, size);
    });
  });
  return y;
}

// Blocks that sum gradients of so many floats each.
int64_t programs(const Cut& cut, int64_t sums) {
  const int64_t fit = kMostSums / (4 * sums);
  return std::min({cut.units, int64_t{kMostPrograms}, std::max<int64_t>(fit, 1)});
}

struct DecodeGradients {
  Tensor x, latents, packed;  // in float; (patches, T, C); (heads, rows, lines)
};

DecodeGradients decode_backward(const Stream& stream, const Model& model, const Tensor& packed,
                                const Tensor& grad, const Tensor& latents) {
  const Sizes& size = model.size;
  const Cut cut =
      model.cut({2 * (size.lines() + size.many() + size.wide()), size.many() * size.wide()});
  const int64_t sums = int64_t{size.heads} * size.wide() * size.lines();
  const int64_t blocks = programs(cut, sums);
  const Tensor grad_x = torch::stable::empty(shape_of(model.x), ScalarType::Float, std::nullopt,
                                             model.x.device(), std::nullopt, layout_of(model.x));
  const Tensor flow = floats(model.x, {cut.patches, cut.chunks, size.tokens, size.channels});
  const Tensor parts = floats(model.x, {blocks, sums});
  with_type(model.x, [&](auto type) {
    using T = decltype(type);
    launch(stream, blocks, dim3(kThreads), latent_decode_bwd_kernel<T>, view<const T>(grad),
           view<const T>(model.x), data<const float>(latents),
           data<const float>(packed) + model.decoding_first(), model.head_stride(),
           view<float>(grad_x), data<float>(flow), data<float>(parts), cut, size);
  });
  return {grad_x, cut.chunks > 1 ? total(flow, {1}) : flow, total(parts, {0})};
}

struct EncodeGradients {
  Tensor x, tokens, packed;  // like x; (T, C); (heads, rows, lines)
};

EncodeGradients encode_backward(const Stream& stream, const Model& model, const Tensor& packed,
                                const Tensor& grad, const Encoded& encoded,
                                const MaybeTensor& more) {
  const Sizes& size = model.size;
  const Cut cut = model.cut(
      {2 * (size.lines() + size.many()) + size.wide(), size.many() * size.wide() + 3 * size.tokens},
      kLargeRoom);
  const int64_t sums = int64_t{size.heads} * encoding_rows(size) * size.lines();
  const int64_t blocks = programs(cut, sums);
  const Tensor grad_x = empty_image_like(model.x), parts = floats(model.x, {blocks, sums});
  const Tensor tokens = floats(model.x, {blocks, size.tokens * size.channels});
  with_type(model.x, [&](auto type) {
    using T = decltype(type);
    launch(stream, blocks, dim3(kThreads), latent_encode_bwd_kernel<T>, data<const float>(grad),
           view<const T>(model.x), data<const float>(encoded.latents),
           reinterpret_cast<const Peak*>(data<const float>(encoded.peaks)),
           model.weights<T>().prompts, data<const float>(packed), model.head_stride(),
           more ? view<const float>(*more) : View<const float>{}, view<T>(grad_x),
           data<float>(parts), data<float>(tokens), cut, size);
  });
  return {grad_x, total(tokens, {0}), total(parts, {0})};
}

struct SolveGradients {
  Tensor latents, sums;  // in float; of the series, summed
  int lines;

  // As the results' own, where they are wanted.
  void put(const Stream& stream, const MaybeTensor& sine, const MaybeTensor& cosine,
           const MaybeTensor& offset, int64_t channels, int64_t basis, const Tensor& like) const {
    with_type(like, [&](auto type) {
      using T = decltype(type);
      const auto at = [](const MaybeTensor& x) { return x ? data<T>(*x) : nullptr; };
      launch(stream, divided((basis + 1) * channels, kThreads), dim3(kThreads),
             latent_series_bwd_kernel<T>, data<const float>(sums), at(sine), at(cosine), at(offset),
             static_cast<int>(channels), static_cast<int>(basis), lines);
    });
  }
};

SolveGradients solve_backward(const Stream& stream, const Tensor& grad, const Tensor& latents,
                              const Series& series) {
  constexpr int64_t kShareRows = 256, kMostSharesOfRows = 512;
  const Tensor to = torch::stable::empty_like(latents);
  launch(stream, divided(latents.numel(), kThreads), dim3(kThreads), trigonometric_solve_bwd_kernel,
         data<const float>(grad), data<const float>(latents), series, data<float>(to),
         latents.numel());
  const int64_t rows = latents.numel() / series.channels;
  const int64_t per_share = divided(rows, std::min(divided(rows, kShareRows), kMostSharesOfRows));
  const int64_t shares = divided(rows, per_share);
  const int groups = std::max(1, (series.basis + kTerms - 1) / kTerms);
  const int lines = 2 * groups * kTerms + 1;
  const Tensor parts = floats(latents, {shares, lines, series.channels});
  launch(stream, shares * groups * divided(series.channels, kWarp), dim3(kWarp, kWarps),
         trigonometric_sums_kernel, data<const float>(grad), data<const float>(latents), series,
         data<float>(parts), rows, per_share, groups);
  return {to, total(parts, {0}), lines};
}

// The gradients that are wanted, as the arguments have them.
class Wanted {
 public:
  std::vector<Tensor> made;

  Wanted(const Tensor& x, const std::vector<bool>& mask) : x_(x), mask_(mask) {}

  bool next() const { return mask_[made.size()]; }
  void image(const Tensor& found) { made.push_back(next() ? found : no_gradient(x_)); }
  MaybeTensor parameter(const MaybeTensor& like) {
    const bool wanted = next() && like.has_value();
    made.push_back(wanted ? empty_tensor(x_, shape_of(*like)) : no_gradient(x_));
    return wanted ? MaybeTensor(made.back()) : std::nullopt;
  }

 private:
  const Tensor& x_;
  const std::vector<bool>& mask_;
};

// Where the gradients of a model's weights go: made in the order of the schema.
struct WeightGradients {
  MaybeTensor prompts, key, key_bias, value, value_bias, query, query_bias;

  void put(const Stream& stream, const Model& model, const EncodeGradients* encoding,
           const DecodeGradients* decoding) const {
    const Sizes& size = model.size;
    with_type(model.x, [&](auto type) {
      using T = decltype(type);
      const auto at = [](const MaybeTensor& x) { return x ? data<T>(*x) : nullptr; };
      const int64_t threads =
          int64_t{size.channels} * (size.channels + 1) + int64_t{size.tokens} * size.channels;
      launch(stream, divided(threads, kThreads), dim3(kThreads), latent_unpack_kernel<T>,
             encoding != nullptr ? data<const float>(encoding->packed) : nullptr,
             encoding != nullptr ? data<const float>(encoding->tokens) : nullptr,
             decoding != nullptr ? data<const float>(decoding->packed) : nullptr,
             model.weights<T>(),
             Gradients<T>{at(prompts), at(key), at(key_bias), at(value), at(value_bias), at(query),
                          at(query_bias)},
             size);
    });
  }
};

// -- the operators -------------------------------------------------------------------------------

Model encoding_model(const Tensor& x, const Tensor& prompts, const Tensor& key, const Tensor& value,
                     const Tensor& value_bias, int64_t patch_rows, int64_t patch_columns) {
  return {x,
          patch_rows,
          patch_columns,
          sizes_of(x, prompts.size(0), prompts.size(1)),
          dense(prompts),
          dense(key),
          dense(value),
          dense(value_bias),
          std::nullopt,
          std::nullopt};
}

Tensor latent_encode(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,
                     Tensor value_weight, Tensor value_bias, int64_t patch_rows,
                     int64_t patch_columns) {
  const Stream stream(x);
  const Model model =
      encoding_model(x, prompts, key_weight, value_weight, value_bias, patch_rows, patch_columns);
  const Tensor latents = encode(stream, model, model.packed(stream)).latents;
  const int64_t batch = x.size(0), patches = latents.size(0) / batch;
  return fastfusion::narrow(shaped(latents, {batch, patches, prompts.size(1), x.size(1)}), x);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> latent_encode_backward(
    Tensor grad, Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias, Tensor value_weight,
    Tensor value_bias, int64_t patch_rows, int64_t patch_columns, std::vector<bool> mask) {
  const Stream stream(x);
  const Model model =
      encoding_model(x, prompts, key_weight, value_weight, value_bias, patch_rows, patch_columns);
  const Tensor packed = model.packed(stream);
  const Encoded encoded = encode(stream, model, packed);
  const EncodeGradients found =
      encode_backward(stream, model, packed, fastfusion::wide(grad), encoded, std::nullopt);
  Wanted wanted(x, mask);
  wanted.image(found.x);
  WeightGradients to;
  to.prompts = wanted.parameter(prompts);
  to.key = wanted.parameter(key_weight);
  to.key_bias = wanted.parameter(key_bias);
  to.value = wanted.parameter(value_weight);
  to.value_bias = wanted.parameter(value_bias);
  to.put(stream, model, &found, nullptr);
  const auto& g = wanted.made;
  return {g[0], g[1], g[2], g[3], g[4], g[5]};
}

Tensor trigonometric_solve(Tensor latents, Tensor sine, Tensor cosine, MaybeTensor offset,
                           double fundamental, bool squash) {
  const Stream stream(latents);
  const SeriesTensor series(stream, sine, cosine, offset, fundamental, squash);
  return fastfusion::narrow(solve(stream, fastfusion::wide(latents), series.series), latents);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> trigonometric_solve_backward(
    Tensor grad, Tensor latents, Tensor sine, Tensor cosine, MaybeTensor offset, double fundamental,
    bool squash, std::vector<bool> mask) {
  const Stream stream(latents);
  const SeriesTensor series(stream, sine, cosine, offset, fundamental, squash);
  const SolveGradients found =
      solve_backward(stream, fastfusion::wide(grad), fastfusion::wide(latents), series.series);
  Wanted wanted(latents, mask);
  wanted.image(fastfusion::narrow(found.latents, latents, layout_of(latents)));
  const MaybeTensor of_sine = wanted.parameter(sine), of_cosine = wanted.parameter(cosine);
  const MaybeTensor of_offset = wanted.parameter(offset);
  found.put(stream, of_sine, of_cosine, of_offset, sine.size(0), sine.size(1), latents);
  const auto& g = wanted.made;
  return {g[0], g[1], g[2], g[3]};
}

Model decoding_model(const Tensor& x, int64_t heads, int64_t tokens, const Tensor& query,
                     const Tensor& query_bias, int64_t patch_rows, int64_t patch_columns) {
  Model model{};
  model.x = x;
  model.patch_rows = patch_rows;
  model.patch_columns = patch_columns;
  model.size = sizes_of(x, heads, tokens);
  model.query = dense(query);
  model.query_bias = dense(query_bias);
  return model;
}

Tensor latent_decode(Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias,
                     int64_t heads, int64_t patch_rows, int64_t patch_columns) {
  const Stream stream(x);
  const Model model = decoding_model(x, heads, latents.size(2), query_weight, query_bias,
                                     patch_rows, patch_columns);
  return decode(stream, model, model.packed(stream), fastfusion::wide(latents));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_decode_backward(
    Tensor grad, Tensor x, Tensor latents, Tensor query_weight, Tensor query_bias, int64_t heads,
    int64_t patch_rows, int64_t patch_columns, std::vector<bool> mask) {
  const Stream stream(x);
  const Model model = decoding_model(x, heads, latents.size(2), query_weight, query_bias,
                                     patch_rows, patch_columns);
  const DecodeGradients found =
      decode_backward(stream, model, model.packed(stream), grad, fastfusion::wide(latents));
  Wanted wanted(x, mask);
  wanted.image(fastfusion::narrow(found.x, x, layout_of(x)));
  wanted.image(
      fastfusion::narrow(shaped(found.latents, shape_of(latents)), latents, layout_of(latents)));
  WeightGradients to;
  to.query = wanted.parameter(query_weight);
  to.query_bias = wanted.parameter(query_bias);
  to.put(stream, model, nullptr, &found);
  const auto& g = wanted.made;
  return {g[0], g[1], g[2], g[3]};
}

Tensor latent_operator(Tensor x, Tensor prompts, Tensor key_weight, Tensor key_bias,
                       Tensor value_weight, Tensor value_bias, Tensor query_weight,
                       Tensor query_bias, Tensor sine, Tensor cosine, MaybeTensor offset,
                       int64_t patch_rows, int64_t patch_columns, double fundamental, bool squash) {
  const Stream stream(x);
  Model model =
      encoding_model(x, prompts, key_weight, value_weight, value_bias, patch_rows, patch_columns);
  model.query = dense(query_weight);
  model.query_bias = dense(query_bias);
  const Tensor packed = model.packed(stream);
  const SeriesTensor series(stream, sine, cosine, offset, fundamental, squash);
  const Sizes& size = model.size;
  const Needs needs = {size.lines() + model.rows(), size.many() * size.wide() + 2 * size.tokens};
  if (model.cut(needs, kLargeRoom, true).together == 0) {
    const Tensor latents = encode(stream, model, packed).latents;
    return decode(stream, model, packed, solve(stream, latents, series.series));
  }
  const Tensor y = empty_image_like(x);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    model.with_room(needs, [&](const Cut& cut, auto room) {
      launch(stream, cut.units, dim3(kThreads),
             latent_operator_fwd_kernel<T, decltype(room)::value>, view<const T>(x),
             data<const float>(packed), model.weights<T>().prompts, series.series, view<T>(y), cut,
             size);
    });
  });
  return y;
}

using ElevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;

ElevenTensors latent_operator_backward(Tensor grad, Tensor x, Tensor prompts, Tensor key_weight,
                                       Tensor key_bias, Tensor value_weight, Tensor value_bias,
                                       Tensor query_weight, Tensor query_bias, Tensor sine,
                                       Tensor cosine, MaybeTensor offset, int64_t patch_rows,
                                       int64_t patch_columns, double fundamental, bool squash,
                                       std::vector<bool> mask) {
  const Stream stream(x);
  Model model =
      encoding_model(x, prompts, key_weight, value_weight, value_bias, patch_rows, patch_columns);
  model.query = dense(query_weight);
  model.query_bias = dense(query_bias);
  const Tensor packed = model.packed(stream);
  const SeriesTensor series(stream, sine, cosine, offset, fundamental, squash);
  const Encoded encoded = encode(stream, model, packed);
  const Tensor tokens = solve(stream, encoded.latents, series.series);
  const DecodeGradients decoding = decode_backward(stream, model, packed, grad, tokens);
  const SolveGradients solving =
      solve_backward(stream, decoding.latents, encoded.latents, series.series);
  const EncodeGradients encoding =
      encode_backward(stream, model, packed, solving.latents, encoded, decoding.x);
  Wanted wanted(x, mask);
  wanted.image(encoding.x);
  WeightGradients to;
  to.prompts = wanted.parameter(prompts);
  to.key = wanted.parameter(key_weight);
  to.key_bias = wanted.parameter(key_bias);
  to.value = wanted.parameter(value_weight);
  to.value_bias = wanted.parameter(value_bias);
  to.query = wanted.parameter(query_weight);
  to.query_bias = wanted.parameter(query_bias);
  to.put(stream, model, &encoding, &decoding);
  const MaybeTensor of_sine = wanted.parameter(sine), of_cosine = wanted.parameter(cosine);
  const MaybeTensor of_offset = wanted.parameter(offset);
  solving.put(stream, of_sine, of_cosine, of_offset, sine.size(0), sine.size(1), x);
  const auto& g = wanted.made;
  return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9], g[10]};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_latent_operator(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("latent_encode", TORCH_BOX(&latent_encode));
  m.impl("latent_encode_backward", TORCH_BOX(&latent_encode_backward));
  m.impl("trigonometric_solve", TORCH_BOX(&trigonometric_solve));
  m.impl("trigonometric_solve_backward", TORCH_BOX(&trigonometric_solve_backward));
  m.impl("latent_decode", TORCH_BOX(&latent_decode));
  m.impl("latent_decode_backward", TORCH_BOX(&latent_decode_backward));
  m.impl("latent_operator", TORCH_BOX(&latent_operator));
  m.impl("latent_operator_backward", TORCH_BOX(&latent_operator_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
