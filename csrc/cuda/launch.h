// How tensors come to kernels: dtypes, views, the current stream, and the one way to launch.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../bindings/torch_calls.h"
#include "device.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

namespace fastfusion::cuda {

// For its lifetime the tensor's device is the current one; launches go to the caller's stream.
class Stream {
 public:
  explicit Stream(const Tensor& x) {
    const int32_t device = x.get_device_index();
    if (device >= 0) guard_.emplace(device);  // the tests' host runtime has none
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t get() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cudaStream_t stream_;
};

// Run a kernel on `blocks` blocks, numbered along x. Nothing waits for it.
template <typename... Parameters, typename... Arguments>
void launch(const Stream& stream, int64_t blocks, dim3 threads, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "the image is too large for one launch: ", blocks,
                  " blocks");
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = threads;
  config.stream = stream.get();
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  STD_TORCH_CHECK(status == cudaSuccess,
                  "a CUDA kernel could not be launched: ", cudaGetErrorString(status));
}

constexpr int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline Shape shape(const Tensor& x) {
  const auto size = x.sizes();
  return {size[0], size[1], size[2], size[3]};
}

template <typename T>
View<T> view(const Tensor& x) {
  const auto stride = x.strides();
  return {static_cast<T*>(x.data_ptr()), stride[0], stride[1], stride[2], stride[3]};
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// A new tensor of float beside `x`, whatever is in it.
inline Tensor floats(const Tensor& x, const std::vector<int64_t>& shape) {
  return torch::stable::empty(shape, ScalarType::Float, std::nullopt, x.device());
}

inline MaybeTensor dense(const MaybeTensor& x) {
  return x ? MaybeTensor(torch::stable::contiguous(*x)) : x;
}

// Call `f` with a value of the C++ type of the tensor's dtype (the value itself means nothing).
template <typename F>
void with_type(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Half:
      return f(__half());
    case ScalarType::BFloat16:
      return f(__nv_bfloat16());
    default:
      STD_TORCH_CHECK(false, "fastfusion_cuda takes float32, float16 and bfloat16");
  }
}

// Call `f` with std::true_type or std::false_type.
template <typename F>
void with_bool(bool value, const F& f) {
  if (value) return f(std::true_type());
  f(std::false_type());
}

}  // namespace fastfusion::cuda
