// moduli_kernels._functors: the scalar functors of distance.h, inhibitor.h and elementary.h over NumPy arrays, so
// that tests can hold the compiled maths against SciPy. Every function is there for float and double: all arrays
// float32 gives float32, anything else float64. The float versions are the polynomials of the packs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <type_traits>
#include <utility>

#include "distance.h"
#include "inhibitor.h"

namespace py = pybind11;
namespace kernels = moduli::portable;

namespace {

// An array argument. The float overload comes first and converts nothing, the double one takes what is left.
template <typename T>
py::arg array(const char* name) {
  return py::arg(name).noconvert(std::is_same_v<T, float>);
}

// Documentation stands at the first of the two overloads.
template <typename T>
const char* doc(const char* text) {
  return std::is_same_v<T, float> ? text : "";
}

// One array for each of the functor's N results, which it gives as std::array<T, N>.
template <typename T, typename Functor, size_t... Is, typename... Arrays>
py::tuple each_result(const Functor& functor, std::index_sequence<Is...>, const Arrays&... arrays) {
  const auto one = [&](auto which) {
    return py::vectorize([&functor](std::conditional_t<true, T, Arrays>... x) {
      return functor(x...)[decltype(which)::value];
    })(arrays...);
  };
  return py::make_tuple(one(std::integral_constant<size_t, Is>{})...);
}

// f(s) and df/ds of one inhibitor
template <typename T, typename Inhibitor>
py::tuple value_and_slope(const Inhibitor& inhibitor, const py::array_t<T>& s) {
  const auto eval = [&inhibitor](T x) {
    T f, slope;
    inhibitor.eval(x, f, slope);
    return std::array<T, 2>{f, slope};
  };
  return each_result<T>(eval, std::make_index_sequence<2>{}, s);
}

template <typename T>
void define_elementary(py::module_& m) {
  m.def("exp2_of_nonpositive", py::vectorize([](T y) { return kernels::exp2_of_nonpositive(y); }), array<T>("y"),
        doc<T>("2^y for y <= 0, elementwise."));
  m.def(
      "cos_sinc",
      [](const py::array_t<T>& x) {
        const auto eval = [](T angle) {
          T cosine, sinc;
          kernels::cos_sinc(angle, cosine, sinc);
          return std::array<T, 2>{cosine, sinc};
        };
        return each_result<T>(eval, std::make_index_sequence<2>{}, x);
      },
      array<T>("x"), doc<T>("(cos(x), sin(x)/x) for |x| < 2.5e4 in radians, elementwise."));
  m.def("atan2_positive", py::vectorize([](T a, T b) { return kernels::atan2_positive(a, b); }), array<T>("a"),
        array<T>("b"), doc<T>("atan2(a, b) in radians for a, b >= 0, not both 0, elementwise."));
  m.def(
      "power_positive",
      [](const py::array_t<T>& a, double e) {
        return py::vectorize([e](T x) { return kernels::power_positive(x, T(e)); })(a);
      },
      array<T>("a"), py::arg("e"), doc<T>("a^e for a >= 0 and e > 0, elementwise."));
}

template <typename T>
void define_distances(py::module_& m) {
  m.def(
      "flat_axis_difference",
      [](const py::array_t<T>& x, const py::array_t<T>& y, double period) {
        const kernels::FlatAxis<T> axis{T(period)};
        return py::vectorize([axis](T a, T b) { return axis.difference(axis.reduce(a), axis.reduce(b)); })(x, y);
      },
      array<T>("x"), array<T>("y"), py::arg("period"),
      doc<T>("wrap(x - y, period), in [-period/2, period/2]; x - y for period 0. It is half of ds/dx, and of -ds/dy, "
             "for s its square. Any real coordinates, reduced into [0, period] first; broadcast."));

  const auto klein = [](double width, double height) {
    // s and the halves of its derivatives in xa, ya and yb
    return [bottle = kernels::KleinBottle<T>(T(width), T(height))](T xa, T ya, T xb, T yb) {
      T s, g_xa, g_ya, g_yb;
      bottle.eval(bottle.across.reduce(xa), bottle.along.reduce(ya), bottle.across.reduce(xb), bottle.along.reduce(yb),
                  s, g_xa, g_ya, g_yb);
      return std::array<T, 4>{s, g_xa, g_ya, g_yb};
    };
  };
  m.def(
      "klein_bottle",
      [klein](const py::array_t<T>& xa, const py::array_t<T>& ya, const py::array_t<T>& xb, const py::array_t<T>& yb,
              double width, double height) {
        return each_result<T>(klein(width, height), std::make_index_sequence<4>{}, xa, ya, xb, yb);
      },
      array<T>("xa"), array<T>("ya"), array<T>("xb"), array<T>("yb"), py::arg("width"), py::arg("height"),
      doc<T>("(s, g_xa, g_ya, g_yb) on the Klein bottle [0, width] x [0, height], (x, 0) ~ (x, height), "
             "(0, y) ~ (width, height - y): the squared distance of (xa, ya) and (xb, yb) and half its derivatives; "
             "that in xb is -g_xa. Any real coordinates; broadcast."));
  m.def(
      "sphere",
      [](const py::array_t<T>& minus, const py::array_t<T>& plus, double radius) {
        const auto eval = [ball = kernels::Sphere<T>(T(radius))](T a, T b) {
          T s, factor;
          ball.eval(a, b, s, factor);
          return std::array<T, 2>{s, factor};
        };
        return each_result<T>(eval, std::make_index_sequence<2>{}, minus, plus);
      },
      array<T>("minus"), array<T>("plus"), py::arg("radius"),
      doc<T>("(s, factor) of unit vectors u, v from minus = |u - v|^2 and plus = |u + v|^2: with theta the angle "
             "between them, s = (radius theta)^2, and factor = radius^2 theta / sin(theta), 0 at antipodes: half of "
             "ds/du is factor (u - v), projected on the tangent space at u. Elementwise, broadcast."));
}

template <typename T>
void define_inhibitors(py::module_& m) {
  using Array = py::array_t<T>;
  m.def(
      "difference_of_gaussians",
      [](const Array& s, double c, double sigma1, double sigma2, double offset) {
        const double p[] = {c, sigma1, sigma2, offset};
        return value_and_slope<T>(kernels::DifferenceOfGaussians<T>(p), s);
      },
      array<T>("s"), py::arg("c"), py::arg("sigma1"), py::arg("sigma2"), py::arg("offset"),
      doc<T>("(f, df/ds) at squared distances s, elementwise: offset - c (exp(-s/sigma2) - exp(-s/sigma1))."));
  m.def(
      "diffusion",
      [](const Array& s, double c, double exponent) {
        const double p[] = {c, exponent};
        if (exponent == 2) return value_and_slope<T>(kernels::Diffusion<T, 2>(p), s);
        if (exponent == 1) return value_and_slope<T>(kernels::Diffusion<T, 1>(p), s);
        return value_and_slope<T>(kernels::Diffusion<T, 0>(p), s);
      },
      array<T>("s"), py::arg("c"), py::arg("exponent"),
      doc<T>("(f, df/ds) at squared distances s, elementwise: c s^(exponent/2); slope 0 where it diverges at 0."));
  m.def(
      "sinusoid",
      [](const Array& s, double c, double mu) {
        const double p[] = {c, mu};
        return value_and_slope<T>(kernels::Sinusoid<T>(p), s);
      },
      array<T>("s"), py::arg("c"), py::arg("mu"),
      doc<T>("(f, df/ds) at squared distances s, elementwise: c + c cos(mu sqrt(s))."));
  m.def(
      "ricker_wavelet",
      [](const Array& s, double sigma, double c) {
        const double p[] = {sigma, c};
        return value_and_slope<T>(kernels::RickerWavelet<T>(p), s);
      },
      array<T>("s"), py::arg("sigma"), py::arg("c"),
      doc<T>("(f, df/ds) at squared distances s, elementwise: c (psi(0) - psi(sqrt(s))), psi the Ricker wavelet."));
  m.def(
      "constant",
      [](const Array& s, double c) { return value_and_slope<T>(kernels::Constant<T>(&c), s); }, array<T>("s"),
      py::arg("c"), doc<T>("(f, df/ds) at squared distances s, elementwise: (c, 0), NaN where s is."));
  m.def(
      "tabulated",
      [](const Array& s, const py::array_t<T, py::array::c_style | py::array::forcecast>& table, double max_distance) {
        if (table.ndim() != 2 || table.shape(0) < 2 || table.shape(1) != 4)
          throw py::value_error("table must have shape (samples, 4) with samples >= 2; pass TabulatedInhibitor.table()");
        return value_and_slope<T>(kernels::Tabulated<T>(&max_distance, table.data(), table.shape(0)), s);
      },
      array<T>("s"), py::arg("table"), py::arg("max_distance"),
      doc<T>("(f, df/ds) at squared distances s, elementwise: the cubics of TabulatedInhibitor.table(), (samples, 4), "
             "on equal parts of [0, max_distance], constant beyond."));
}

template <typename T>
void define(py::module_& m) {
  define_elementary<T>(m);
  define_distances<T>(m);
  define_inhibitors<T>(m);
}

}  // namespace

PYBIND11_MODULE(_functors, m) {
  m.doc() =
      "The compiled maths of the penalty over NumPy arrays: float32 where every array is float32, else float64. "
      "Lengths in the manifold's units, s is a squared length; parameters are not checked.";
  define<float>(m);
  define<double>(m);
}
