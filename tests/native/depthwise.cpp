// The inner functions of the depthwise kernels, for tests.
#include "depthwise_gradient.cpp"
#include "depthwise_tile.cpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>

#include "depthwise_slab.h"

namespace py = pybind11;

namespace fastfusion {

// The ranges one after another, as many as were asked for: who gets which must not matter.
static int64_t ranges = 1;
void run_ranges(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  for (int64_t i = 0; i < ranges; ++i) {
    const int64_t first = begin + (end - begin) * i / ranges;
    const int64_t last = begin + (end - begin) * (i + 1) / ranges;
    if (first < last) function(first, last, context);
  }
}

}  // namespace fastfusion

using namespace fastfusion;
using namespace fastfusion::FF_CAPABILITY;

namespace {

template <typename A>
using Array = py::array_t<A, py::array::c_style | py::array::forcecast>;

// An array (B, C, H, W) of any strides.
template <typename A>
Image image_of(const py::array_t<A>& x) {
  const auto stride = [&](int i) { return x.strides(i) / static_cast<int64_t>(sizeof(A)); };
  return {const_cast<A*>(x.data()),
          x.shape(0),
          x.shape(1),
          x.shape(2),
          x.shape(3),
          stride(0),
          stride(1),
          stride(2),
          stride(3)};
}

template <typename A>
Array<A> copy_columns_py(py::array_t<A> x, int64_t channel, int64_t row, int64_t first,
                         int64_t count) {
  Array<A> to(count);
  copy_columns<A>(image_of(x), 0, channel, row, first, count, to.mutable_data());
  return to;
}

template <typename A>
Array<A> copy_pixels_py(py::array_t<A> x, int64_t channel, int64_t channels, int64_t row,
                        int64_t first, int64_t count) {
  Array<A> to({count, round_up(channels, kLanes<A>)});
  copy_pixels<A>(image_of(x), 0, channel, channels, row, first, count, to.mutable_data(),
                 to.shape(1));
  return to;
}

// A filter (C, kh, kw) and its bias as the tiles want them.
template <typename A>
Filter<A> pack_py(const Array<A>& weight, const Array<A>& bias, int64_t row_dilation,
                  int64_t column_dilation, bool across, bool flip) {
  const FilterShape shape{weight.shape(1), weight.shape(2), row_dilation, column_dilation};
  const FilterView view{shape, weight.data(), bias.size() ? bias.data() : nullptr};
  return Filter<A>::template pack<A>(view, weight.shape(0), across, flip);
}

template <typename A>
py::tuple packed(Array<A> weight, Array<A> bias, bool across, bool flip) {
  const Filter<A> filter = pack_py(weight, bias, 1, 1, across, flip);
  const int64_t channels = across ? round_up(weight.shape(0), kLanes<A>) : weight.shape(0);
  return py::make_tuple(Array<A>(channels * weight.shape(1) * weight.shape(2), &filter.weight[0]),
                        Array<A>(channels, &filter.bias[0]));
}

// Some lattice rows of a piece. `x` (rows, columns, channels) holds the input rows from the first
// tap on; those not `present` lie outside the image. All memory around the input is NaN. Returns
// the output with `guard` elements of -1 after each row (and, across, after each pixel).
template <typename A>
Array<A> convolve_py(Array<A> x, std::vector<bool> present, Array<A> weight, Array<A> bias,
                     int64_t column_dilation, bool across, bool stream) {
  const int64_t rows = x.shape(0), columns = x.shape(1), channels = x.shape(2);
  const Filter<A> filter = pack_py(weight, bias, 1, column_dilation, across, false);
  const int64_t count = rows - filter.shape.rows + 1;
  const int64_t wide = columns - 2 * filter.shape.column_padding();
  constexpr int64_t kLane = kLanes<A>, kGuard = kLane;
  const int64_t step = across ? round_up(channels, kLane) : 1;
  const int64_t row_step = columns * step + 2 * kLane;
  Buffer<A> input(rows * row_step);
  std::fill_n(input.get(), rows * row_step, std::numeric_limits<A>::quiet_NaN());
  std::vector<const A*> pointers;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column)
      for (int64_t c = 0; c < channels; ++c)
        input[row * row_step + column * step + c] = *x.data(row, column, c);
    pointers.push_back(present[row] ? &input[row * row_step] : nullptr);
  }
  const int64_t output_step = across ? step + kGuard : 1;
  const int64_t output_row = round_up(wide * output_step, kLane) + kGuard;
  Buffer<A> output(count * output_row);
  std::fill_n(output.get(), count * output_row, A(-1));
  Piece<A> piece{pointers.data(), count,        wide,       step,
                 output_step,     output.get(), output_row, channels};
  piece.stream = stream;
  convolve(filter, 0, piece);
  stream_fence();
  Array<A> result({count, output_row});
  std::copy_n(output.get(), count * output_row, result.mutable_data());
  return result;
}

// Rows first .. last - 1 of a convolution through slabs that hold only what the filter spans.
template <typename A>
py::array_t<A> convolve_slab_py(py::array_t<A> x, Array<A> weight, Array<A> bias,
                                int64_t row_dilation, int64_t column_dilation, bool across,
                                int64_t at_a_time) {
  const Image image = image_of(x);
  const Filter<A> filter = pack_py(weight, bias, row_dilation, column_dilation, across, false);
  const int64_t edge = filter.shape.column_padding(), padding = filter.shape.row_padding();
  Slab<A> from(across, image.channels, at_a_time + 2 * padding, image.columns + 2 * edge);
  Slab<A> to(across, image.channels, at_a_time, image.columns);
  from.first_column = -edge;
  std::vector<const A*> pointers;
  py::array_t<A> y({image.channels, image.rows, image.columns});
  int64_t loaded = 0;
  for (int64_t first = 0; first < image.rows; first += at_a_time) {
    const int64_t last = std::min(image.rows, first + at_a_time);
    copy_into<A>(from, across, image, 0, 0, image.channels, loaded, last + padding, -edge,
                 image.columns + edge);
    loaded = last + padding;
    convolve_slab(filter, 0, image.channels, from, image.rows, to, first, last, 0, image.columns,
                  pointers);
    for (int64_t c = 0; c < image.channels; ++c)
      for (int64_t row = first; row < last; ++row)
        for (int64_t column = 0; column < image.columns; ++column)
          *y.mutable_data(c, row, column) =
              across ? to.at(0, row, column)[c] : *to.at(c, row, column);
  }
  return y;
}

template <typename A>
py::tuple weight_gradient_py(py::array_t<A> x, py::array_t<A> grad, int64_t rows, int64_t columns,
                             int64_t row_dilation, int64_t column_dilation, bool across,
                             int64_t threads) {
  ranges = threads;
  const Image image = image_of(x);
  Array<A> weight({image.channels, rows, columns}), bias(image.channels);
  weight_gradient<A, A, A>(image, image_of(grad), {rows, columns, row_dilation, column_dilation},
                           across, weight.mutable_data(), bias.mutable_data());
  return py::make_tuple(weight, bias);
}

// How `size` taps are cut into tiles.
std::vector<std::pair<int64_t, int>> tiles_of(int64_t size) {
  std::vector<std::pair<int64_t, int>> tiles;
  for_tiles(size, [&](int64_t first, int count) { tiles.emplace_back(first, count); });
  return tiles;
}

template <typename A>
void bind(py::module_& m, const char* suffix) {
  const auto name = [&](const char* function) { return std::string(function) + suffix; };
  m.attr(name("lanes").c_str()) = kLanes<A>;
  m.def(name("copy_columns").c_str(), &copy_columns_py<A>);
  m.def(name("copy_pixels").c_str(), &copy_pixels_py<A>);
  m.def(name("pack").c_str(), &packed<A>);
  m.def(name("convolve").c_str(), &convolve_py<A>);
  m.def(name("convolve_slab").c_str(), &convolve_slab_py<A>);
  m.def(name("weight_gradient").c_str(), &weight_gradient_py<A>);
}

}  // namespace

PYBIND11_MODULE(depthwise_native, m) {
  bind<float>(m, "");
  bind<double>(m, "_double");
  m.attr("most_taps") = kMost;
  m.def("tiles", &tiles_of);
}
