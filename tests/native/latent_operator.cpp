// The inner functions of the latent operator's kernels, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "block.h"
#include "patches.h"
#include "softmax.h"
#include "solver.h"

namespace py = pybind11;
using namespace fastfusion;
using namespace fastfusion::FF_CAPABILITY;

namespace {

template <typename A>
using Array = py::array_t<A, py::array::c_style | py::array::forcecast>;

// (rows, columns, lanes) as a block.
template <typename A>
Block<A> block_of(const Array<A>& x) {
  if (x.ndim() != 3 || x.shape(2) != kLanes<A>) throw py::value_error("(rows, columns, lanes)");
  return dense_block(const_cast<A*>(x.data()), x.shape(1));
}

template <typename A>
Array<A> project_py(Array<A> matrix, Array<A> bias, Array<A> in, Array<A> out, bool add) {
  const int rows = static_cast<int>(matrix.shape(0)), depth = static_cast<int>(matrix.shape(1));
  std::vector<A> memory(Panels<A>::size(rows, depth));
  const Panels<A> panels = pack(
      memory.data(), rows, depth, [&](int r, int k) { return *matrix.data(r, k); },
      [&](int r) { return *bias.data(r); });
  const int columns = static_cast<int>(in.shape(1));
  if (add)
    project<true>(panels, block_of(in), columns, block_of(out));
  else
    project(panels, block_of(in), columns, block_of(out));
  return out;
}

template <typename A>
Array<A> multiply_py(Array<A> a, Array<A> b) {
  Array<A> out({a.shape(0), b.shape(0), a.shape(2)});
  multiply(block_of(a), block_of(b), static_cast<int>(a.shape(0)), static_cast<int>(b.shape(0)),
           static_cast<int>(a.shape(1)), block_of(out));
  return out;
}

template <typename A>
Array<A> multiply_lanes_py(Array<A> a, Array<A> b, Array<A> out) {
  multiply_lanes(block_of(a), block_of(b), static_cast<int>(a.shape(0)),
                 static_cast<int>(b.shape(0)), static_cast<int>(a.shape(1)), out.mutable_data(),
                 out.shape(1));
  return out;
}

template <typename A, typename F>
Array<A> each_vector(const Array<A>& x, const F& f) {
  if (x.size() % kLanes<A>) throw py::value_error("a whole number of vectors");
  Array<A> y(x.size());
  for (py::ssize_t n = 0; n < x.size(); n += kLanes<A>)
    store(y.mutable_data() + n, f(load(x.data() + n)));
  return y;
}

template <typename A>
py::tuple sincos_py(Array<A> x, double factor) {
  return py::make_tuple(each_vector(x,
                                    [&](Vector<A> v) {
                                      Vector<A> s, c;
                                      sincos_of(v, factor, s, c);
                                      return s;
                                    }),
                        each_vector(x, [&](Vector<A> v) {
                          Vector<A> s, c;
                          sincos_of(v, factor, s, c);
                          return c;
                        }));
}

// The series of one channel, its derivative, and sum(grad * derivative by each coefficient).
template <typename A>
py::tuple series_py(Array<A> z, Array<A> sine, Array<A> cosine, double fundamental) {
  const int64_t basis = sine.size(), groups = series_groups(basis);
  std::vector<A> values(groups * kPackedGroup + 1), slopes(groups * kPackedGroup + 1);
  pack_series(sine.data(), cosine.data(), basis, fundamental, false, values.data(), 1);
  pack_series(sine.data(), cosine.data(), basis, fundamental, true, slopes.data(), 1);
  const auto evaluate = [&](const std::vector<A>& packed) {
    return each_vector(z, [&](Vector<A> v) {
      Vector<A> s, c;
      sincos_of(v, fundamental, s, c);
      return evaluate_series(Powers<Vector<A>>(s, c), static_cast<int>(groups),
                             [&](int i) { return broadcast(packed[i]); });
    });
  };
  std::vector<A> sums(groups * kPackedGroup + 1);
  for (py::ssize_t n = 0; n < z.size(); n += kLanes<A>) {
    Vector<A> s, c;
    sincos_of(load(z.data() + n), fundamental, s, c);
    coefficient_gradients(Powers<Vector<A>>(s, c), static_cast<int>(groups), broadcast(A(1)),
                          [&](int i, Vector<A> v) { sums[i] += sum(v); });
  }
  Array<A> grad_sine(basis), grad_cosine(basis);
  unpack_gradients([&](int64_t i) { return sums[i]; }, basis, grad_sine.mutable_data(),
                   grad_cosine.mutable_data());
  return py::make_tuple(evaluate(values), evaluate(slopes), grad_sine, grad_cosine);
}

Image image_of(Array<float>& x) {
  const int64_t c = x.shape(1), h = x.shape(2), w = x.shape(3);
  return {x.mutable_data(), x.shape(0), c, h, w, c * h * w, h * w, w, 1};
}

// Every pixel through a block and back, by strips of patches or by runs of `run` pixels.
Array<float> round_trip(Array<float> x, int64_t patch_rows, int64_t patch_columns, int64_t run) {
  Array<float> y({x.shape(0), x.shape(1), x.shape(2), x.shape(3)});
  std::fill(y.mutable_data(), y.mutable_data() + y.size(), -1.0f);
  const Image from = image_of(x), to = image_of(y);
  const Cutting cut(from, patch_rows, patch_columns);
  constexpr int lanes = kLanes<float>;
  Scratch<float> memory((from.channels * (cut.pixels() + lanes) + cut.patch_columns + run + 64) *
                        lanes);
  const int64_t vectors = run ? (run + lanes - 1) / lanes : cut.pixels();
  float* line = memory.take((cut.patch_columns + run + lanes) * lanes);
  const Block<float> block = dense_block(memory.take(from.channels * vectors * lanes), vectors);
  if (run == 0) {
    for (int64_t first = 0; first < cut.count(); first += lanes) {
      const Strip<float> strip(cut, first);
      strip.read(Type::kFloat, from, 0, from.channels, block, line);
      strip.write(Type::kFloat, block, 0, from.channels, to, line);
    }
  } else {
    for (int64_t patch = 0; patch < cut.count(); ++patch)
      for (int64_t first = 0; first < cut.pixels(); first += run) {
        const Run<float> piece(cut, patch, first, std::min(run, cut.pixels() - first));
        piece.read(Type::kFloat, from, 0, from.channels, block, line);
        piece.write(Type::kFloat, block, 0, from.channels, to, line);
      }
  }
  return y;
}

template <typename A>
void bind(py::module_& m, const char* suffix) {
  const auto name = [&](const char* function) { return std::string(function) + suffix; };
  m.attr(name("lanes").c_str()) = kLanes<A>;
  m.def(name("project").c_str(), &project_py<A>);
  m.def(name("multiply").c_str(), &multiply_py<A>);
  m.def(name("multiply_lanes").c_str(), &multiply_lanes_py<A>);
  m.def(name("sincos").c_str(), &sincos_py<A>);
  m.def(name("series").c_str(), &series_py<A>);
  m.def(name("transpose").c_str(), [](Array<A> x) {
    Array<A> y({kLanes<A>, kLanes<A>});
    Vector<A> v[kLanes<A>];
    for (int i = 0; i < kLanes<A>; ++i) v[i] = load(x.data(i, 0));
    transpose<A>(v);
    for (int i = 0; i < kLanes<A>; ++i) store(y.mutable_data(i, 0), v[i]);
    return y;
  });
}

}  // namespace

PYBIND11_MODULE(latent_operator_native, m) {
  bind<float>(m, "");
  bind<double>(m, "_double");
  m.def("exp2", [](Array<float> x) { return each_vector(x, [](VectorF v) { return exp2(v); }); });
  m.def("round_trip", &round_trip);
}
