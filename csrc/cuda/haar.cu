// The Haar transforms and the split.
//
// A thread computes V blocks of 2x2 pixels: neighbours along a row, or in channels_last of V
// neighbouring channels, by vector loads and stores of up to 16 bytes. Where sizes, strides or
// addresses do not allow these, V is 1 and any strides will do. Each image is read once and written
// once; nothing is shared between threads.
#include <algorithm>

#include "../bindings/schemas.h"
#include "launch.h"
#include "tile.h"

namespace fastfusion::cuda {
namespace {

struct Quad {  // the pixels of a block: a b over c d
  float a, b, c, d;
};

template <typename T>
struct Bands {
  View<T> ll, lh, hl, hh;
};

// Place and layout of a thread's V blocks.
template <int V, bool LAST>
struct Blocks {
  Place first;
  bool right, below;  // whether the blocks have a second column, a second row

  __device__ explicit Blocks(const Shape& image) {
    Shape units = {image.batch, image.channels, (image.rows + 1) / 2, (image.columns + 1) / 2};
    (LAST ? units.channels : units.columns) /= V;
    first = place<LAST>(units);
    (LAST ? first.channel : first.column) *= V;
    right = 2 * first.column + 1 < image.columns;
    below = 2 * first.row + 1 < image.rows;
  }
};

template <int V, bool LAST, typename T>
__device__ void read(const View<T>& x, const Blocks<V, LAST>& blocks, Quad (&quads)[V]) {
  const Place& at = blocks.first;
  const T* upper = x.at(at.image, at.channel, 2 * at.row, 2 * at.column);
  const T* lower = upper + x.row;
  if constexpr (LAST || V == 1) {
    float a[V], b[V] = {}, c[V] = {}, d[V] = {};
    load(upper, a);
    if (blocks.right) load(upper + x.column, b);
    if (blocks.below) load(lower, c);
    if (blocks.right && blocks.below) load(lower + x.column, d);
#pragma unroll
    for (int i = 0; i < V; ++i) quads[i] = {a[i], b[i], c[i], d[i]};
  } else {
    float above[2 * V], beneath[2 * V] = {};
    load(upper, above);
    if (blocks.below) load(lower, beneath);
#pragma unroll
    for (int i = 0; i < V; ++i)
      quads[i] = {above[2 * i], above[2 * i + 1], beneath[2 * i], beneath[2 * i + 1]};
  }
}

template <int V, bool LAST, typename T>
__device__ void write(const View<T>& x, const Blocks<V, LAST>& blocks, const Quad (&quads)[V]) {
  const Place& at = blocks.first;
  T* upper = x.at(at.image, at.channel, 2 * at.row, 2 * at.column);
  T* lower = upper + x.row;
  if constexpr (LAST || V == 1) {
    float a[V], b[V], c[V], d[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      a[i] = quads[i].a, b[i] = quads[i].b, c[i] = quads[i].c, d[i] = quads[i].d;
    }
    store(upper, a);
    if (blocks.right) store(upper + x.column, b);
    if (blocks.below) store(lower, c);
    if (blocks.right && blocks.below) store(lower + x.column, d);
  } else {
    float above[2 * V], beneath[2 * V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      above[2 * i] = quads[i].a, above[2 * i + 1] = quads[i].b;
      beneath[2 * i] = quads[i].c, beneath[2 * i + 1] = quads[i].d;
    }
    store(upper, above);
    if (blocks.below) store(lower, beneath);
  }
}

// A missing last row or column repeats the one before.
template <int V, bool LAST>
__device__ void repeat(const Blocks<V, LAST>& blocks, Quad (&quads)[V]) {
#pragma unroll
  for (Quad& q : quads) {
    if (!blocks.below) q.c = q.a, q.d = q.b;
    if (!blocks.right) q.b = q.a, q.d = q.c;
  }
}

// The transpose of that: what belongs to the repeated row or column is added to the one repeated.
template <int V, bool LAST>
__device__ void fold(const Blocks<V, LAST>& blocks, Quad (&quads)[V]) {
#pragma unroll
  for (Quad& q : quads) {
    if (!blocks.below) q.a += q.c, q.b += q.d;
    if (!blocks.right) q.a += q.b, q.c += q.d;
  }
}

__device__ float mean(const Quad& q) {
  // Halved twice, as the transform and its inverse do: the quarter of a sum can overflow.
  return ((q.a + q.b) + (q.c + q.d)) * 0.5f * 0.5f;
}

// The transform (REPEAT), and the gradient of its inverse (zeros outside the image).
template <typename T, int V, bool LAST, bool REPEAT>
__global__ void haar_analysis_kernel(View<const T> x, Bands<T> bands, Shape image) {
  const Blocks<V, LAST> blocks(image);
  const Place& at = blocks.first;
  if (!at.inside) return;
  Quad quads[V];
  read(x, blocks, quads);
  if (REPEAT) repeat(blocks, quads);
  float ll[V], lh[V], hl[V], hh[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const auto [a, b, c, d] = quads[i];
    // In this order the details of a repeated row or column are exactly 0.
    ll[i] = ((a + b) + (c + d)) * 0.5f;
    lh[i] = ((a - c) + (b - d)) * 0.5f;
    hl[i] = ((a - b) + (c - d)) * 0.5f;
    hh[i] = ((a - b) - (c - d)) * 0.5f;
  }
  store(bands.ll.at(at.image, at.channel, at.row, at.column), ll);
  store(bands.lh.at(at.image, at.channel, at.row, at.column), lh);
  store(bands.hl.at(at.image, at.channel, at.row, at.column), hl);
  store(bands.hh.at(at.image, at.channel, at.row, at.column), hh);
}

// The inverse transform, and the gradient of the transform (FOLD).
template <typename T, int V, bool LAST, bool FOLD>
__global__ void haar_synthesis_kernel(Bands<const T> bands, View<T> x, Shape image) {
  const Blocks<V, LAST> blocks(image);
  const Place& at = blocks.first;
  if (!at.inside) return;
  float ll[V], lh[V], hl[V], hh[V];
  load(bands.ll.at(at.image, at.channel, at.row, at.column), ll);
  load(bands.lh.at(at.image, at.channel, at.row, at.column), lh);
  load(bands.hl.at(at.image, at.channel, at.row, at.column), hl);
  load(bands.hh.at(at.image, at.channel, at.row, at.column), hh);
  Quad quads[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    quads[i] = {(ll[i] + lh[i] + hl[i] + hh[i]) * 0.5f, (ll[i] + lh[i] - hl[i] - hh[i]) * 0.5f,
                (ll[i] - lh[i] + hl[i] - hh[i]) * 0.5f, (ll[i] - lh[i] - hl[i] + hh[i]) * 0.5f};
  }
  if (FOLD) fold(blocks, quads);
  write(x, blocks, quads);
}

// low is the mean of each block, high the rest.
template <typename T, int V, bool LAST>
__global__ void haar_split_fwd_kernel(View<const T> x, View<T> low, View<T> high, Shape image) {
  const Blocks<V, LAST> blocks(image);
  if (!blocks.first.inside) return;
  Quad quads[V], means[V];
  read(x, blocks, quads);
  repeat(blocks, quads);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const float m = mean(quads[i]);
    means[i] = {m, m, m, m};
    quads[i] = {quads[i].a - m, quads[i].b - m, quads[i].c - m, quads[i].d - m};
  }
  write(low, blocks, means);
  write(high, blocks, quads);
}

// grad_high plus the transpose of the mean, applied to grad_low - grad_high.
template <typename T, int V, bool LAST>
__global__ void haar_split_bwd_kernel(View<const T> grad_low, View<const T> grad_high,
                                      View<T> grad_x, Shape image) {
  const Blocks<V, LAST> blocks(image);
  if (!blocks.first.inside) return;
  Quad low[V], high[V], shares[V];
  read(grad_low, blocks, low);
  read(grad_high, blocks, high);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Quad &l = low[i], &h = high[i];
    shares[i].a = (((l.a - h.a) + (l.b - h.b)) + ((l.c - h.c) + (l.d - h.d))) * 0.25f;
    shares[i].b = shares[i].c = shares[i].d = shares[i].a;
  }
  fold(blocks, shares);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const Quad &s = shares[i], &h = high[i];
    high[i] = {s.a + h.a, s.b + h.b, s.c + h.c, s.d + h.d};
  }
  write(grad_x, blocks, high);
}

// -- launches ------------------------------------------------------------------------------------

// Whether `pack` elements side by side can be moved at once wherever a thread starts.
bool packs(const Tensor& x, int64_t pack, bool last) {
  const auto stride = x.strides(), size = x.sizes();
  const int fast = last ? 1 : 3;
  if (size[fast] % pack != 0 || (stride[fast] != 1 && size[fast] != 1)) return false;
  for (int dim = 0; dim < 4; ++dim)
    if (dim != fast && size[dim] > 1 && stride[dim] % pack != 0) return false;
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % (pack * x.element_size()) == 0;
}

// Call f(type, V, LAST) for images of 2x2 blocks and, where there are any, images of bands.
template <typename F>
void with_pattern(const Tensor& like, const std::vector<Tensor>& images,
                  const std::vector<Tensor>& bands, const F& f) {
  const bool last = layout_of(like) == MemoryFormat::ChannelsLast;
  const int64_t full = 16 / like.element_size();  // elements of a vector load
  const int64_t blocks = last ? full : full / 2;
  const auto image = [&](const Tensor& x) { return packs(x, full, last); };
  const auto band = [&](const Tensor& x) { return packs(x, blocks, last); };
  const bool vector = std::all_of(images.begin(), images.end(), image) &&
                      std::all_of(bands.begin(), bands.end(), band);
  with_type(like, [&](auto type) {
    using T = decltype(type);
    constexpr int kFull = 16 / sizeof(T);
    if (!vector)
      with_bool(last, [&](auto pixels) { f(type, std::integral_constant<int, 1>(), pixels); });
    else if (last)
      f(type, std::integral_constant<int, kFull>(), std::true_type());
    else
      f(type, std::integral_constant<int, kFull / 2>(), std::false_type());
  });
}

Grid grid_of(const Tensor& image, int blocks, bool last) {
  Shape units = {image.size(0), image.size(1), divided(image.size(2), 2),
                 divided(image.size(3), 2)};
  (last ? units.channels : units.columns) /= blocks;
  return grid_over(units, last);
}

template <typename T>
Bands<T> views(const std::vector<Tensor>& bands) {
  return {view<T>(bands[0]), view<T>(bands[1]), view<T>(bands[2]), view<T>(bands[3])};
}

void analyse(const Tensor& x, const std::vector<Tensor>& bands, bool repeated) {
  const Stream stream(x);
  with_pattern(bands[0], {x}, bands, [&](auto type, auto blocks, auto last) {
    using T = decltype(type);
    const Grid grid = grid_of(x, blocks, last);
    with_bool(repeated, [&](auto repeat) {
      launch(stream, grid.blocks, grid.threads,
             haar_analysis_kernel<T, decltype(blocks)::value, last.value, repeat.value>,
             view<const T>(x), views<T>(bands), shape(x));
    });
  });
}

void synthesise(const std::vector<Tensor>& bands, const Tensor& x, bool folded) {
  const Stream stream(x);
  with_pattern(x, {x}, bands, [&](auto type, auto blocks, auto last) {
    using T = decltype(type);
    const Grid grid = grid_of(x, blocks, last);
    with_bool(folded, [&](auto fold) {
      launch(stream, grid.blocks, grid.threads,
             haar_synthesis_kernel<T, decltype(blocks)::value, last.value, fold.value>,
             views<const T>(bands), view<T>(x), shape(x));
    });
  });
}

std::vector<Tensor> empty_bands(const Tensor& like, const std::vector<int64_t>& shape) {
  return {empty_image(like, shape), empty_image(like, shape), empty_image(like, shape),
          empty_image(like, shape)};
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors haar_dwt2d(Tensor x) {
  const auto bands =
      empty_bands(x, {x.size(0), x.size(1), divided(x.size(2), 2), divided(x.size(3), 2)});
  analyse(x, bands, true);
  return {bands[0], bands[1], bands[2], bands[3]};
}

Tensor haar_dwt2d_backward(Tensor grad_ll, Tensor grad_lh, Tensor grad_hl, Tensor grad_hh, Tensor x,
                           std::vector<bool> mask) {
  if (!mask[0]) return no_gradient(x);
  const Tensor grad_x = empty_image_like(x);
  synthesise({grad_ll, grad_lh, grad_hl, grad_hh}, grad_x, true);
  return grad_x;
}

Tensor haar_idwt2d(Tensor ll, Tensor lh, Tensor hl, Tensor hh, int64_t rows, int64_t columns) {
  const Tensor x = empty_image(ll, {ll.size(0), ll.size(1), rows, columns});
  synthesise({ll, lh, hl, hh}, x, false);
  return x;
}

FourTensors haar_idwt2d_backward(Tensor grad, Tensor ll, Tensor lh, Tensor hl, Tensor hh,
                                 int64_t rows, int64_t columns, std::vector<bool> mask) {
  std::vector<Tensor> bands = {empty_image_like(ll), empty_image_like(lh), empty_image_like(hl),
                               empty_image_like(hh)};
  analyse(grad, bands, false);
  for (int i = 0; i < 4; ++i)
    if (!mask[i]) bands[i] = no_gradient(ll);
  return {bands[0], bands[1], bands[2], bands[3]};
}

std::tuple<Tensor, Tensor> haar_split2d(Tensor x) {
  const Stream stream(x);
  const Tensor low = empty_image_like(x), high = empty_image_like(x);
  with_pattern(x, {x, low, high}, {}, [&](auto type, auto blocks, auto last) {
    using T = decltype(type);
    const Grid grid = grid_of(x, blocks, last);
    launch(stream, grid.blocks, grid.threads,
           haar_split_fwd_kernel<T, decltype(blocks)::value, last.value>, view<const T>(x),
           view<T>(low), view<T>(high), shape(x));
  });
  return {low, high};
}

Tensor haar_split2d_backward(Tensor grad_low, Tensor grad_high, Tensor x, std::vector<bool> mask) {
  if (!mask[0]) return no_gradient(x);
  const Stream stream(x);
  const Tensor grad_x = empty_image_like(x);
  with_pattern(x, {grad_low, grad_high, grad_x}, {}, [&](auto type, auto blocks, auto last) {
    using T = decltype(type);
    const Grid grid = grid_of(x, blocks, last);
    launch(stream, grid.blocks, grid.threads,
           haar_split_bwd_kernel<T, decltype(blocks)::value, last.value>, view<const T>(grad_low),
           view<const T>(grad_high), view<T>(grad_x), shape(x));
  });
  return grad_x;
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_haar(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("haar_dwt2d", TORCH_BOX(&haar_dwt2d));
  m.impl("haar_dwt2d_backward", TORCH_BOX(&haar_dwt2d_backward));
  m.impl("haar_idwt2d", TORCH_BOX(&haar_idwt2d));
  m.impl("haar_idwt2d_backward", TORCH_BOX(&haar_idwt2d_backward));
  m.impl("haar_split2d", TORCH_BOX(&haar_split2d));
  m.impl("haar_split2d_backward", TORCH_BOX(&haar_split2d_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
