// The frequency filter: tensors in, tensors out.
//
// Our transforms (torch's for awkward sizes), torch's matrix products, the depthwise kernels, and
// what lies between them.
#include "../cpu/frequency_filter.h"

#include <algorithm>
#include <array>
#include <string>

#include "../cpu/depthwise.h"
#include "../cpu/parallel.h"
#include "../cpu/spectrum.h"
#include "frequency_filter.h"
#include "schemas.h"

namespace fastfusion {
namespace {

using namespace frequency;
using torch::stable::select;

// Dense, and without anything of autograd's.
Tensor dense(const Tensor& x) { return torch::stable::contiguous(call("aten::detach", "", x)); }

// An uninitialised tensor of what the kernels accumulate in for the dtype of x.
Tensor empty_wide(const Tensor& x, const Sizes& shape) {
  const ScalarType type =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  return torch::stable::empty(shape, type, std::nullopt, x.device(), std::nullopt,
                              MemoryFormat::Contiguous);
}

bool is_double(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }
const void* data_of(const MaybeTensor& x) { return x ? x->data_ptr() : nullptr; }

// mixing (2, D, C), or its transpose, times parts (B, 2, C, rows, columns), plus a bias (2, D).
// The parts may be overwritten where they are not needed any more.
Tensor mix(const Tensor& mixing, const Tensor& parts, const MaybeTensor& bias,
           bool overwrite = false) {
  const Tensor weights = torch::stable::contiguous(mixing);
  const MixingShape shape{parts.size(0), weights.size(1), parts.size(2),
                          parts.size(3) * parts.size(4)};
  const Tensor mixed =
      overwrite && shape.filters == shape.channels
          ? parts
          : empty_tensor(parts, {shape.batch, 2, shape.filters, parts.size(3), parts.size(4)});
  FF_CALL(mix_parts)
  (is_double(parts), shape, weights.data_ptr(), data_of(bias), parts.data_ptr(), mixed.data_ptr());
  return mixed;
}

// -- zeros: half spectra --------------------------------------------------------------------------

// Planes are transformed by the threads that go on with them, one by one, small ones in groups
// that depend on their size alone: what torch's transforms give for many at once depends, in the
// last bit, on the number of threads.
constexpr int64_t kGroupPixels = 1024;

// run(first plane, number of planes) for each group.
template <class Run>
void each_group(int64_t planes, const SpectrumShape& shape, const Run& run) {
  const int64_t size = std::max<int64_t>(1, kGroupPixels / (shape.rows * shape.columns));
  parallel_for(0, (planes + size - 1) / size, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * size; first < std::min(end * size, planes); first += size)
      run(first, std::min(size, planes - first));
  });
}

char* plane_of(const Tensor& planes, int64_t index) {
  const int64_t size = planes.numel() / planes.size(0) * (is_double(planes) ? 8 : 4);
  return static_cast<char*>(planes.data_ptr()) + index * size;
}

// Where the real (0) or imaginary part of a plane lies among the parts (B, 2, C, H, K).
void* part_of(const Tensor& parts, int64_t plane, int64_t part) {
  const int64_t channels = parts.size(2), size = parts.size(3) * parts.size(4);
  const int64_t index = (plane / channels * 2 + part) * channels + plane % channels;
  return static_cast<char*>(parts.data_ptr()) + index * size * (is_double(parts) ? 8 : 4);
}

// The parts (B, 2, C, H, W//2+1) of an image's spectrum, times `edge` or `inner`, by torch.
Tensor parts_by_torch(const Tensor& given, double edge, double inner) {
  const Tensor x = wide(given);
  const SpectrumShape shape{x.size(2), x.size(3)};
  const int64_t planes = x.size(0) * x.size(1);
  const Tensor flat = shaped(x, {planes, shape.rows, shape.columns});
  const Tensor parts = empty_tensor(x, {x.size(0), 2, x.size(1), shape.rows, shape.bins()});
  each_group(planes, shape, [&](int64_t first, int64_t count) {
    const Tensor some = call("aten::narrow", "", flat, int64_t{0}, first, count);
    const Tensor spectra = torch::stable::contiguous(
        as_real(call("aten::_fft_r2c", "", some, Sizes{1, 2}, kNotScaled, true)));
    for (int64_t i = 0; i < count; ++i) {
      FF_CALL(spectrum_parts)
      (is_double(x), shape, plane_of(spectra, i), edge, inner, part_of(parts, first + i, 0),
       part_of(parts, first + i, 1));
    }
  });
  return parts;
}

// The same; x is dense.
Tensor parts_of(const Tensor& x, double edge, double inner) {
  const SpectrumShape shape{x.size(2), x.size(3)};
  if (!FF_CALL(takes_spectrum)(shape)) return parts_by_torch(x, edge, inner);
  const Tensor parts = empty_wide(x, {x.size(0), 2, x.size(1), shape.rows, shape.bins()});
  const bool finite = FF_CALL(spectrum_of_image)(type_of(x), shape, x.size(0), x.size(1),
                                                 x.data_ptr(), edge, inner, parts.data_ptr());
  return finite ? parts : parts_by_torch(x, edge, inner);
}

// Complex numbers (planes, rows, columns, 2) transformed back along rows or columns.
Tensor inverted(const Tensor& x, int64_t dim, int64_t scaling) {
  const Tensor y = call("aten::_fft_c2c", "", as_complex(x), Sizes{dim}, scaling, false);
  // Torch gives columns back as rows. Turned as complex numbers it takes a third of the time that
  // it takes as pairs of real ones.
  return as_real(torch::stable::contiguous(y));
}

// The image (B, C, H, W) of a half spectrum, as `frequency_filter2d` defines it, by torch.
Tensor image_by_torch(const Tensor& parts, int64_t width, double edge, double inner,
                      int64_t scaling) {
  const SpectrumShape shape{parts.size(3), width};
  const int64_t planes = parts.size(0) * parts.size(2);
  const Tensor image = empty_tensor(parts, {parts.size(0), parts.size(2), shape.rows, width});
  const Tensor flat = shaped(image, {planes, shape.rows, width});
  each_group(planes, shape, [&](int64_t first, int64_t count) {
    const Tensor spectra = empty_tensor(parts, {count, shape.rows, shape.bins(), 2});
    const Tensor pairs = empty_tensor(parts, {count, shape.pairs(), width, 2});
    for (int64_t i = 0; i < count; ++i) {
      FF_CALL(spectrum_of_parts)
      (is_double(parts), shape, part_of(parts, first + i, 0), part_of(parts, first + i, 1), edge,
       inner, plane_of(spectra, i));
    }
    const Tensor rows = inverted(spectra, 1, scaling);
    for (int64_t i = 0; i < count; ++i)
      FF_CALL(spectrum_pairs)(is_double(parts), shape, plane_of(rows, i), plane_of(pairs, i));
    const Tensor y = inverted(pairs, 2, scaling);
    for (int64_t i = 0; i < count; ++i)
      FF_CALL(paired_rows)(is_double(parts), shape, plane_of(y, i), plane_of(flat, first + i));
  });
  return image;
}

// Parts (B, 2, C, H, K) as an image of 2C channels.
Image channels_of(const Tensor& parts) {
  const int64_t size = parts.size(3) * parts.size(4), channels = 2 * parts.size(2);
  return {parts.data_ptr(),
          parts.size(0),
          channels,
          parts.size(3),
          parts.size(4),
          channels * size,
          size,
          parts.size(4),
          1};
}

FilterView filter_of(const Tensor& kernel, const MaybeTensor& bias) {
  const int64_t size = kernel.size(kernel.dim() - 1);
  return {{size, size, 1, 1}, kernel.data_ptr(), data_of(bias)};
}

// The same, in the dtype of `like`, which has its width; each part filtered before where a filter
// is given.
Tensor image_of(const Tensor& parts, const Tensor& like, double edge, double inner, int64_t scaling,
                const FilterView* filter = nullptr) {
  const SpectrumShape shape{parts.size(3), like.size(3)};
  if (!FF_CALL(takes_spectrum)(shape)) {
    Tensor response = parts;
    if (filter != nullptr) {
      response = torch::stable::empty_like(parts);
      FF_CALL(depthwise_conv2d)
      (type_of(parts), channels_of(parts), *filter, Activation::kNone, false,
       channels_of(response));
    }
    return narrow(image_by_torch(response, shape.columns, edge, inner, scaling), like);
  }
  const double scale =
      scaling == kByLength ? 1.0 / static_cast<double>(shape.rows * shape.columns) : 1.0;
  const Tensor image =
      empty_tensor(like, {parts.size(0), parts.size(2), shape.rows, shape.columns});
  FF_CALL(image_of_spectrum)
  (type_of(image), shape, parts.size(0), parts.size(2), parts.data_ptr(), filter, edge * scale,
   inner * scale, image.data_ptr());
  return image;
}

// Filter each channel of (B, C, H, K), with or without a bias.
void filter(const Tensor& kernel, const MaybeTensor& bias, const Image& from, const Image& to) {
  FF_CALL(depthwise_conv2d)
  (type_of(kernel), from, filter_of(kernel, bias), Activation::kNone, false, to);
}

// The arguments of both operators: the image as it is, the others in the kernels' precision.
struct Arguments {
  Tensor x, mixing, kernel;
  MaybeTensor mixing_bias, gain, bias;
  Arguments(const Tensor& x, const Tensor& mixing, const Tensor& kernel,
            const MaybeTensor& mixing_bias, const MaybeTensor& gain, const MaybeTensor& bias)
      : x(dense(x)),
        mixing(wide(mixing)),
        kernel(wide(kernel)),
        mixing_bias(wide(mixing_bias)),
        gain(wide(gain)),
        bias(wide(bias)) {}
};

// Through filter and mixing to the arguments; `grad` is that of the response's parts.
Gradients response_backward(const Tensor& grad, const Arguments& of,
                            const std::vector<bool>& mask) {
  Gradients found;
  const bool of_filter = mask[kKernel] || mask[kGain];
  const bool below = mask[kX] || mask[kMixing] || mask[kMixingBias];
  const Tensor weight = torch::stable::contiguous(with_gain(of.kernel, of.gain));
  MaybeTensor parts, mixed, grad_weight, grad_mixed;
  if (of_filter || mask[kMixing]) parts = parts_of(of.x, 1, 1);
  mixed = of_filter ? mix(of.mixing, *parts, of.mixing_bias) : grad;
  if (of_filter) grad_weight = torch::stable::empty_like(weight);
  if (below) grad_mixed = torch::stable::empty_like(grad);
  FF_CALL(depthwise_conv2d_backward)
  (type_of(grad), channels_of(grad), channels_of(*mixed), filter_of(weight, std::nullopt),
   Activation::kNone, false,
   {below ? channels_of(*grad_mixed) : Image{}, of_filter ? grad_weight->data_ptr() : nullptr,
    nullptr});
  if (of_filter) put_kernel(*grad_weight, of.kernel, of.gain, found);
  if (mask[kMixing]) found[kMixing] = mixing_gradient(*grad_mixed, *parts);
  if (mask[kMixingBias]) found[kMixingBias] = total(*grad_mixed, {0, 3, 4});
  if (mask[kX]) {
    // The adjoint of the transform is the inverse's: columns that stand for two are counted once.
    const Tensor grad_parts =
        mix(torch::stable::transpose(of.mixing, 1, 2), *grad_mixed, std::nullopt);
    found[kX] = image_of(grad_parts, of.x, 1, 0.5, kNotScaled);
  }
  return found;
}

Tensor zeros_forward(const Arguments& of) {
  const Tensor mixed = mix(of.mixing, parts_of(of.x, 1, 1), of.mixing_bias, true);
  const Tensor kernel = torch::stable::contiguous(with_gain(of.kernel, of.gain));
  const FilterView filter = filter_of(kernel, of.bias);
  return image_of(mixed, of.x, 1, 1, kByLength, &filter);
}

Gradients zeros_backward(const Tensor& given, const Arguments& of, const std::vector<bool>& mask) {
  // The adjoint of the inverse is the transform, its inner columns counted twice.
  const double scale = 1.0 / static_cast<double>(of.x.size(2) * of.x.size(3));
  Gradients found = response_backward(parts_of(dense(given), scale, 2 * scale), of, mask);
  if (mask[kBias]) {
    const Tensor grad = wide(given);
    found[kBias] = empty_tensor(grad, {2, grad.size(1)});
    FF_CALL(constant_gradients)
    (is_double(grad), {grad.size(2), grad.size(3)}, grad.size(0), grad.size(1), grad.data_ptr(),
     found[kBias]->data_ptr());
  }
  return found;
}

// -- circular: no transform -----------------------------------------------------------------------

CircularShape circular_shape(const Tensor& x, int64_t channels, int64_t filter) {
  return {x.size(0), channels, x.size(2), x.size(3), filter};
}

// The even and the odd part of an image in its upper half.
Tensor fold(const Tensor& given, double weight) {
  const Tensor x = wide(given);
  const CircularShape shape = circular_shape(x, x.size(1), 1);
  const Tensor parts =
      empty_tensor(x, {shape.batch, 2, shape.channels, shape.half(), shape.columns});
  FF_CALL(circular_fold)(is_double(x), shape, x.data_ptr(), weight, parts.data_ptr());
  return parts;
}

Tensor circular_forward(const Arguments& of) {
  const Tensor filters = torch::stable::contiguous(with_gain(of.kernel, of.gain));
  const CircularShape shape = circular_shape(of.x, filters.size(1), filters.size(2));
  const Tensor y = empty_tensor(of.x, {shape.batch, shape.channels, shape.rows, shape.columns});
  FF_CALL(circular_filter)
  (type_of(of.x), shape, of.x.size(1), of.x.data_ptr(), of.mixing.data_ptr(), filters.data_ptr(),
   {data_of(of.mixing_bias), data_of(of.bias)}, y.data_ptr());
  return y;
}

Gradients circular_backward(const Tensor& grad, const Arguments& of,
                            const std::vector<bool>& mask) {
  Gradients found;
  const Tensor filters = torch::stable::contiguous(with_gain(of.kernel, of.gain));
  const CircularShape shape = circular_shape(grad, filters.size(1), filters.size(2));
  const Tensor mixed = mix(of.mixing, fold(of.x, 1), std::nullopt);
  const Tensor grad_mixed = torch::stable::empty_like(mixed);
  const Tensor grad_filters = torch::stable::empty_like(filters);
  FF_CALL(circular_windows_backward)
  (is_double(grad), shape, grad.data_ptr(), mixed.data_ptr(), filters.data_ptr(),
   data_of(of.mixing_bias), grad_mixed.data_ptr(), grad_filters.data_ptr());
  put_kernel(grad_filters, of.kernel, of.gain, found);
  if (mask[kMixingBias]) found[kMixingBias] = of_real_part(origin(select(grad_mixed, 1, 0)));
  if (mask[kBias]) found[kBias] = of_real_part(origin(grad));
  if (mask[kMixing]) found[kMixing] = mixing_gradient(grad_mixed, fold(of.x, 2));
  if (mask[kX]) {
    const Tensor parts = mix(torch::stable::transpose(of.mixing, 1, 2), grad_mixed, std::nullopt);
    const Tensor grad_x = empty_wide(of.x, shape_of(of.x));
    FF_CALL(circular_unfold)
    (is_double(grad), circular_shape(grad, of.x.size(1), 1), parts.data_ptr(), grad_x.data_ptr());
    found[kX] = grad_x;
  }
  return found;
}

// -- the operators --------------------------------------------------------------------------------

Tensor frequency_filter2d(Tensor x, Tensor mixing, Tensor kernel, MaybeTensor mixing_bias,
                          MaybeTensor gain, MaybeTensor bias, Word padding_mode) {
  const Arguments of(x, mixing, kernel, mixing_bias, gain, bias);
  const Tensor y = padding_mode.text == "zeros" ? zeros_forward(of) : circular_forward(of);
  return result(y, x, true);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> frequency_filter2d_backward(
    Tensor grad, Tensor x, Tensor mixing, Tensor kernel, MaybeTensor mixing_bias, MaybeTensor gain,
    MaybeTensor bias, Word padding_mode, std::vector<bool> mask) {
  const Arguments of(x, mixing, kernel, mixing_bias, gain, bias);
  const Gradients found = padding_mode.text == "zeros" ? zeros_backward(grad, of, mask)
                                                       : circular_backward(wide(grad), of, mask);
  const auto of_mask = [&](int index) { return wanted(found, mask, x, index); };
  return {of_mask(kX),          of_mask(kMixing), of_mask(kKernel),
          of_mask(kMixingBias), of_mask(kGain),   of_mask(kBias)};
}

std::tuple<Tensor, Tensor> frequency_response2d(Tensor x, Tensor mixing, Tensor kernel,
                                                MaybeTensor mixing_bias) {
  const Arguments of(x, mixing, kernel, mixing_bias, std::nullopt, std::nullopt);
  const Tensor mixed = mix(of.mixing, parts_of(of.x, 1, 1), of.mixing_bias);
  const auto part = [&](int64_t index) {
    const Tensor from = select(mixed, 1, index);
    const Tensor y = empty_tensor(mixed, shape_of(from));
    filter(select(of.kernel, 0, index), std::nullopt, image(from), image(y));
    return result(y, x, true);
  };
  return {part(0), part(1)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> frequency_response2d_backward(
    Tensor grad_real, Tensor grad_imag, Tensor x, Tensor mixing, Tensor kernel,
    MaybeTensor mixing_bias, std::vector<bool> mask) {
  const Arguments of(x, mixing, kernel, mixing_bias, std::nullopt, std::nullopt);
  const Tensor grad = joined(grad_real, grad_imag, of.mixing);
  const std::vector<bool> all = {mask[0], mask[1], mask[2], mask[3], false, false};
  const Gradients found = response_backward(grad, of, all);
  const auto of_mask = [&](int index) { return wanted(found, mask, x, index); };
  return {of_mask(kX), of_mask(kMixing), of_mask(kKernel), of_mask(kMixingBias)};
}

STABLE_TORCH_LIBRARY_FRAGMENT(fastfusion_cpu, m) { define_frequency_filter(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfusion_cpu, CPU, m) {
  m.impl("frequency_filter2d", TORCH_BOX(&frequency_filter2d));
  m.impl("frequency_filter2d_backward", TORCH_BOX(&frequency_filter2d_backward));
  m.impl("frequency_response2d", TORCH_BOX(&frequency_response2d));
  m.impl("frequency_response2d_backward", TORCH_BOX(&frequency_response2d_backward));
}

}  // namespace
}  // namespace fastfusion
