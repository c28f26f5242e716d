// Inner functions of the smaller kernels, for tests: element types, elementary functions, softmax,
// shuffles, selection, Fourier transforms, pairs of spectrum rows, the axes of the local map.
#include "coordinate_mixing.cpp"
#include "frequency_filter.cpp"
#include "local_map.cpp"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "fourier.h"
#include "haar_blocks.h"
#include "softmax.h"
#include "stream.h"

namespace py = pybind11;

namespace fastfusion {

void run_ranges(int64_t begin, int64_t end, int64_t, RangeFunction function, void* context) {
  if (begin < end) function(begin, end, context);
}

}  // namespace fastfusion

using namespace fastfusion;
using namespace fastfusion::FF_CAPABILITY;

namespace {

template <typename A>
using Array = py::array_t<A, py::array::c_style | py::array::forcecast>;

// A function of vectors, for arrays of any length.
template <typename F>
Array<float> each_vector(const Array<float>& x, const F& f) {
  Array<float> y(x.size());
  for (int64_t i = 0; i < x.size(); i += kLanes<float>) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes<float>, x.size() - i));
    store(y.mutable_data() + i, f(load(x.data() + i, count)), count);
  }
  return y;
}

// Widen or narrow by vectors of `count` lanes each, 0 for one by one.
template <typename T>
Array<float> widen_py(Array<uint16_t> bits, int count) {
  Array<float> y(bits.size());
  const T* from = reinterpret_cast<const T*>(bits.data());
  for (int64_t i = 0; i < bits.size(); i += std::max(count, 1)) {
    if (count == 0)
      y.mutable_data()[i] = widen(from[i]);
    else
      store(y.mutable_data() + i, load(from + i, count), count);
  }
  return y;
}

template <typename T>
Array<uint16_t> narrow_py(Array<float> x, int count, bool instructions) {
  Array<uint16_t> bits(x.size());
  T* to = reinterpret_cast<T*>(bits.mutable_data());
  bfloat16_instructions = instructions;
  for (int64_t i = 0; i < x.size(); i += std::max(count, 1)) {
    const float* from = x.data() + i;
    if (count == 0)
      to[i] = narrow<T>(*from);
    else if (count == kLanes<float>)
      store(to + i, load(from));
    else
      store(to + i, load(from, count), count);
  }
  bfloat16_instructions = false;
  return bits;
}

// A row written into the middle of a larger one: nothing else may change.
Array<float> write_row_py(Array<float> x, int64_t before, int64_t after, bool streaming) {
  Array<float> y(before + x.size() + after);
  std::fill_n(y.mutable_data(), y.size(), -1.0f);
  write_row(y.mutable_data() + before, x.data(), x.size(), streaming);
  stream_fence();
  return y;
}

// The weights of a softmax whose scores come in parts: each new maximum rescales what was summed.
Array<float> online_softmax(Array<float> scores, int64_t part) {
  VectorF largest = broadcast(-INFINITY), sum = {};
  for (int64_t first = 0; first < scores.size(); first += part) {
    VectorF next = largest;
    for (int64_t i = first; i < std::min(scores.size(), first + part); ++i)
      next = max(next, broadcast(scores.data()[i]));
    const VectorF shift = softmax_shift(next);
    sum *= first ? softmax_weight(largest, shift) : VectorF{};
    for (int64_t i = first; i < std::min(scores.size(), first + part); ++i)
      sum += softmax_weight(broadcast(scores.data()[i]), shift);
    largest = next;
  }
  Array<float> weights(scores.size());
  for (int64_t i = 0; i < scores.size(); ++i)
    weights.mutable_data()[i] =
        (softmax_weight(broadcast(scores.data()[i]), softmax_shift(largest)) / sum)[0];
  return weights;
}

template <typename A>
py::tuple shuffled(Array<A> x) {
  Array<A> even(kLanes<A>), odd(kLanes<A>), back(2 * kLanes<A>), turned(kLanes<A>);
  const auto first = load(x.data()), second = load(x.data() + kLanes<A>);
  const auto parts = deinterleave<A>(first, second);
  store(even.mutable_data(), parts.left);
  store(odd.mutable_data(), parts.right);
  const auto joined = interleave<A>(parts.left, parts.right);
  store(back.mutable_data(), joined.left);
  store(back.mutable_data() + kLanes<A>, joined.right);
  store(turned.mutable_data(), reverse<A>(first));
  return py::make_tuple(even, odd, back, turned);
}

std::vector<int64_t> most_salient(const std::vector<double>& saliency, int64_t k) {
  const int64_t count = static_cast<int64_t>(saliency.size());
  std::vector<uint64_t> ranks(count);
  std::vector<int64_t> kept;
  select_most_salient(saliency.data(), count, k, ranks, kept);
  return kept;
}

// As many transforms of (length) as a vector has lanes: (length, 2, lanes), real parts first.
template <typename A>
Array<A> transformed(Array<A> x) {
  const Fourier<A> fourier(x.shape(0));
  Array<A> z({x.shape(0), int64_t{2}, int64_t{kLanes<A>}}),
      y({x.shape(0), int64_t{2}, int64_t{kLanes<A>}});
  std::copy_n(x.data(), x.size(), z.mutable_data());
  fourier.transform(z.mutable_data());
  for (int64_t k = 0; k < fourier.length(); ++k)
    std::copy_n(z.data() + fourier.place(k) * fourier.kStep, fourier.kStep,
                y.mutable_data() + k * fourier.kStep);
  return y;
}

// Spectra (rows, bins, 2) to whole rows, and transforms of those to the rows of an image.
template <typename A>
Array<A> pairs_py(Array<A> spectrum, int64_t columns) {
  const SpectrumShape shape{spectrum.shape(0), columns};
  Array<A> pairs({shape.pairs(), columns, int64_t{2}});
  pairs_of(shape, spectrum.data(), pairs.mutable_data());
  return pairs;
}
template <typename A>
Array<A> rows_py(Array<A> pairs, int64_t rows) {
  const SpectrumShape shape{rows, pairs.shape(1)};
  Array<A> image({rows, shape.columns});
  rows_of(shape, pairs.data(), image.mutable_data());
  return image;
}

// How often `cover` reaches each element.
std::vector<int> covered(int64_t count) {
  std::vector<int> times(count);
  cover<float>(count, [&](auto wide, int64_t first) {
    for (int64_t i = 0; i < (wide ? kLanes<float> : 1); ++i) ++times.at(first + i);
  });
  return times;
}

template <typename A>
void bind(py::module_& m, const std::string& suffix) {
  const auto name = [&](const char* function) { return function + suffix; };
  m.attr(name("lanes").c_str()) = kLanes<A>;
  m.def(name("shuffled").c_str(), &shuffled<A>);
  m.def(name("transformed").c_str(), &transformed<A>);
  m.def(name("pairs").c_str(), &pairs_py<A>);
  m.def(name("rows").c_str(), &rows_py<A>);
  m.def(name("axis").c_str(), [](int64_t size, int64_t samples, int64_t scale, double first) {
    const Axis<A> axis(size, samples, scale, first);
    return py::make_tuple(axis.before, axis.near, axis.far);
  });
}

}  // namespace

PYBIND11_MODULE(elements_native, m) {
  bind<float>(m, "");
  bind<double>(m, "_double");
  m.def("widen_half", &widen_py<Half>);
  m.def("widen_bfloat16", &widen_py<BFloat16>);
  m.def("narrow_half", &narrow_py<Half>);
  m.def("narrow_bfloat16", &narrow_py<BFloat16>);
  m.def("exp", [](Array<float> x) { return each_vector(x, [](VectorF v) { return exp(v); }); });
  m.def("erf", [](Array<float> x) { return each_vector(x, [](VectorF v) { return erf(v); }); });
  m.def("write_row", &write_row_py);
  m.def("online_softmax", &online_softmax);
  m.def("most_salient", &most_salient);
  m.def("covered", &covered);
  m.def("takes", &Fourier<float>::takes);
}
