// SpeCAM's spectral coordinate mixing, without a sort.
//
// Three kernels: the saliency of each column (32 columns a block, neighbours by neighbouring lanes,
// sums in double as the contract says), the selection (a column is kept when fewer than k go before
// it), and the sweep (a warp a channel, from the right, 32 columns at a time, ended by the first
// find). No program waits for another, and the sums have one order.
#include "../bindings/schemas.h"
#include "launch.h"

namespace fastfusion::cuda {
namespace {

constexpr int kRows = 8;    // of threads that share a column's sum
constexpr int kTile = 256;  // columns that a block compares at a time

template <typename T>
struct Matrix {  // (B, C, N)
  T* data;
  int64_t batch, channel, coordinate;

  __device__ T* at(int64_t b, int64_t c, int64_t n) const {
    return data + b * batch + c * channel + n * coordinate;
  }
};

template <typename T>
struct States {  // (B, C)
  T* data;
  int64_t batch, channel;

  __device__ T* at(int64_t b, int64_t c) const { return data + b * batch + c * channel; }
};

struct Sizes3 {
  int64_t batch, channels, coordinates;
};

struct PartialSums {
  double value[kRows][kWarp];
};

template <typename T>
__global__ void mixing_saliency_kernel(Matrix<const T> x, double* saliency, Sizes3 size) {
  const int64_t tiles = (size.coordinates + kWarp - 1) / kWarp;
  const int64_t image = blockIdx.x / tiles;
  const int64_t n = blockIdx.x % tiles * kWarp + threadIdx.x;
  double sum = 0;
  if (n < size.coordinates)
    for (int64_t c = threadIdx.y; c < size.channels; c += kRows)
      sum += fabs(static_cast<double>(widen(*x.at(image, c, n))));
  PartialSums& parts = shared_memory<PartialSums>();
  parts.value[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || n >= size.coordinates) return;
  for (int row = 1; row < kRows; ++row) sum += parts.value[row][threadIdx.x];
  saliency[image * size.coordinates + n] = sum;
}

struct Rivals {
  double value[kTile];
};

// NaN goes before every number, as in torch.sort, descending.
__device__ bool greater(double a, double b) { return a > b || (a != a && b == b); }

__global__ void mixing_select_kernel(const double* saliency, unsigned char* kept, Sizes3 size,
                                     int64_t k) {
  const int64_t tiles = (size.coordinates + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / tiles;
  const int64_t n = blockIdx.x % tiles * kTile + threadIdx.x;
  const double* row = saliency + image * size.coordinates;
  const double own = n < size.coordinates ? row[n] : 0;
  Rivals& rivals = shared_memory<Rivals>();
  int64_t before = 0;
  for (int64_t first = 0; first < size.coordinates; first += kTile) {
    if (first + threadIdx.x < size.coordinates)
      rivals.value[threadIdx.x] = row[first + threadIdx.x];
    __syncthreads();
    const int64_t left = size.coordinates - first;
    const int count = left < kTile ? static_cast<int>(left) : kTile;
    for (int i = 0; i < count; ++i) {
      const double other = rivals.value[i];
      before += greater(other, own) || (!greater(own, other) && first + i < n);
    }
    __syncthreads();
  }
  if (n < size.coordinates) kept[image * size.coordinates + n] = before < k;
}

// The last kept column whose entry is not 0, or -1; the same in every lane.
template <typename T>
__device__ int64_t last_kept(const Matrix<const T>& x, const unsigned char* kept, int64_t image,
                             int64_t channel, int64_t coordinates) {
  const int lane = threadIdx.x;
  for (int64_t first = (coordinates - 1) / kWarp * kWarp; first >= 0; first -= kWarp) {
    const int64_t n = first + lane;
    const bool holds = n < coordinates && kept[image * coordinates + n] != 0 &&
                       widen(*x.at(image, channel, n)) != 0.0f;
    const unsigned found = __ballot_sync(kAllLanes, holds);
    if (found != 0) return first + (kWarp - 1 - __clz(static_cast<int>(found)));
  }
  return -1;
}

template <typename T>
__global__ void mixing_sweep_fwd_kernel(Matrix<const T> x, States<const T> state,
                                        const unsigned char* kept, States<T> mixed, Sizes3 size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= size.batch * size.channels) return;  // a whole warp
  const int64_t image = index / size.channels, channel = index % size.channels;
  const int64_t last = last_kept(x, kept, image, channel, size.coordinates);
  if (threadIdx.x == 0)
    *mixed.at(image, channel) = last < 0 ? *state.at(image, channel) : *x.at(image, channel, last);
}

template <typename T>
__global__ void mixing_sweep_bwd_kernel(States<const T> grad, Matrix<const T> x,
                                        const unsigned char* kept, Matrix<T> grad_x,
                                        States<T> grad_state, Sizes3 size) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (index >= size.batch * size.channels) return;  // a whole warp
  const int64_t image = index / size.channels, channel = index % size.channels;
  const int64_t last = last_kept(x, kept, image, channel, size.coordinates);
  const T flow = *grad.at(image, channel);
  const T zero = narrow<T>(0.0f);
  if (grad_x.data != nullptr)
    for (int64_t n = threadIdx.x; n < size.coordinates; n += kWarp)
      *grad_x.at(image, channel, n) = n == last ? flow : zero;
  if (grad_state.data != nullptr && threadIdx.x == 0)
    *grad_state.at(image, channel) = last < 0 ? flow : zero;
}

// -- launches ------------------------------------------------------------------------------------

template <typename T>
Matrix<T> matrix(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename T>
States<T> states(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

Sizes3 sizes(const Tensor& x) { return {x.size(0), x.size(1), x.size(2)}; }

Tensor empty_of(const Tensor& x, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::empty(shape, dtype, std::nullopt, x.device());
}

// Which columns of each image are kept, (B, N) bytes.
Tensor select(const Stream& stream, const Tensor& x, int64_t k) {
  const Sizes3 size = sizes(x);
  const Tensor saliency = empty_of(x, {size.batch, size.coordinates}, ScalarType::Double);
  const Tensor kept = empty_of(x, {size.batch, size.coordinates}, ScalarType::Byte);
  with_type(x, [&](auto type) {
    using T = decltype(type);
    launch(stream, size.batch * divided(size.coordinates, kWarp), dim3(kWarp, kRows),
           mixing_saliency_kernel<T>, matrix<const T>(x), data<double>(saliency), size);
  });
  launch(stream, size.batch * divided(size.coordinates, kTile), dim3(kTile), mixing_select_kernel,
         data<const double>(saliency), data<unsigned char>(kept), size, k);
  return kept;
}

Tensor coordinate_mixing(Tensor candidates, Tensor state, int64_t k) {
  const Stream stream(candidates);
  const Sizes3 size = sizes(candidates);
  const Tensor mixed = empty_tensor(state, {size.batch, size.channels});
  const Tensor kept = select(stream, candidates, k);
  with_type(candidates, [&](auto type) {
    using T = decltype(type);
    launch(stream, divided(size.batch * size.channels, kRows), dim3(kWarp, kRows),
           mixing_sweep_fwd_kernel<T>, matrix<const T>(candidates), states<const T>(state),
           data<const unsigned char>(kept), states<T>(mixed), size);
  });
  return mixed;
}

std::tuple<Tensor, Tensor> coordinate_mixing_backward(Tensor grad, Tensor candidates, Tensor state,
                                                      int64_t k, std::vector<bool> mask) {
  const Stream stream(candidates);
  const Sizes3 size = sizes(candidates);
  const Tensor grad_candidates =
      mask[0] ? empty_tensor(candidates, {size.batch, size.channels, size.coordinates})
              : no_gradient(candidates);
  const Tensor grad_state =
      mask[1] ? empty_tensor(state, {size.batch, size.channels}) : no_gradient(state);
  const Tensor kept = select(stream, candidates, k);
  with_type(candidates, [&](auto type) {
    using T = decltype(type);
    launch(stream, divided(size.batch * size.channels, kRows), dim3(kWarp, kRows),
           mixing_sweep_bwd_kernel<T>, states<const T>(grad), matrix<const T>(candidates),
           data<const unsigned char>(kept), mask[0] ? matrix<T>(grad_candidates) : Matrix<T>{},
           mask[1] ? states<T>(grad_state) : States<T>{}, size);
  });
  return {grad_candidates, grad_state};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cuda, m) { define_coordinate_mixing(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cuda, CompositeExplicitAutograd, m) {
  m.impl("coordinate_mixing", TORCH_BOX(&coordinate_mixing));
  m.impl("coordinate_mixing_backward", TORCH_BOX(&coordinate_mixing_backward));
}

}  // namespace
}  // namespace fastfusion::cuda
