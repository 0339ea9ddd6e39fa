// moduli_kernels._functors offers the scalar functors of manifolds.h, inhibitors.h and math/elementary.h over NumPy
// arrays, so that tests can compare the compiled maths with SciPy. Every function exists for float and double: it
// computes in float32 if all arrays are float32, otherwise in float64. The float versions are the polynomials of the
// packs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <array>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>

#include "inhibitors.h"
#include "manifolds.h"
#include "math/elementary.h"

namespace py = pybind11;
namespace kernels = moduli::portable;

namespace {

// A number, an array and a parameter for each index of a pack
template <typename T, size_t>
using Number = T;
template <typename T, size_t>
using Array = py::array_t<T>;
template <size_t>
using Double = double;

// The name of an array argument. The float overload comes first and converts nothing, the double one takes what is
// left.
template <typename T>
py::arg array(const char* name) {
  return py::arg(name).noconvert(std::is_same_v<T, float>);
}

// The documentation of a function, which stands at the first of its two overloads
template <typename T>
std::string doc(const std::string& text) {
  return std::is_same_v<T, float> ? text : "";
}

// The functor returns N results as std::array<T, N>. This function returns a tuple of N arrays.
template <typename T, typename Functor, size_t... Is, typename... Arrays>
py::tuple each_result(const Functor& functor, std::index_sequence<Is...>, const Arrays&... arrays) {
  const auto one = [&](auto which) {
    return py::vectorize([&functor](std::conditional_t<true, T, Arrays>... x) {
      return functor(x...)[decltype(which)::value];
    })(arrays...);
  };
  return py::make_tuple(one(std::integral_constant<size_t, Is>{})...);
}

template <typename T>
void define_elementary(py::module_& m) {
  m.def("exp2_of_nonpositive", py::vectorize([](T y) { return kernels::exp2_of_nonpositive(y); }), array<T>("y"),
        doc<T>("2^y for y <= 0, elementwise.").c_str());
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
      array<T>("x"), doc<T>("(cos(x), sin(x)/x) for |x| < 2.5e4 in radians, elementwise.").c_str());
  m.def("atan2_positive", py::vectorize([](T a, T b) { return kernels::atan2_positive(a, b); }), array<T>("a"),
        array<T>("b"), doc<T>("atan2(a, b) in radians for a, b >= 0, not both 0, elementwise.").c_str());
  m.def(
      "power_positive",
      [](const py::array_t<T>& a, double e) {
        return py::vectorize([e](T x) { return kernels::power_positive(x, T(e)); })(a);
      },
      array<T>("a"), py::arg("e"), doc<T>("a^e for a >= 0 and e > 0, elementwise.").c_str());
}

// The functions below are made for each member of the lists in manifolds.h and inhibitors.h. Their arguments are
// arrays, then the parameters of the functor under their own names.

// Form::COLUMN_BY_COLUMN: the difference of two coordinates, on one axis
template <typename Manifold, typename T, size_t... P>
void define_axis(py::module_& m, std::index_sequence<P...>) {
  m.def((std::string(Manifold::NAME) + "_axis_difference").c_str(),
        [](const py::array_t<T>& x, const py::array_t<T>& y, Double<P>... parameters) {
          const double values[] = {parameters...};
          return py::vectorize([manifold = Manifold(values)](T a, T b) {
            return manifold.axis(0).difference(manifold.prepared(&a, 1, 0), manifold.prepared(&b, 1, 0));
          })(x, y);
        },
        array<T>("x"), array<T>("y"), py::arg(Manifold::PARAMETERS[P])...,
        doc<T>(std::string(Manifold::DOC) +
               " It is half of ds/dx and of -ds/dy, where s is its square. Any real coordinates; elementwise, broadcast.")
            .c_str());
}

// Form::CHORDS: s and the factor of g from the squared chords
template <typename Manifold, typename T, size_t... P>
void define_chords(py::module_& m, std::index_sequence<P...>) {
  m.def(
      Manifold::NAME,
      [](const py::array_t<T>& minus, const py::array_t<T>& plus, Double<P>... parameters) {
        const double values[] = {parameters...};
        const auto eval = [manifold = Manifold(values)](T a, T b) {
          T s, factor;
          manifold.eval(a, b, s, factor);
          return std::array<T, 2>{s, factor};
        };
        return each_result<T>(eval, std::make_index_sequence<2>{}, minus, plus);
      },
      array<T>("minus"), array<T>("plus"), py::arg(Manifold::PARAMETERS[P])...,
      doc<T>(std::string("(s, factor) from minus = |u - v|^2 and plus = |u + v|^2 of prepared points u and v. ") +
             Manifold::DOC +
             " Half of ds/du is factor (u - v), projected on the tangent space at u. Elementwise, broadcast.")
          .c_str());
}

// Form::ALL_COLUMNS: s and half of its derivatives in all coordinates of both points
template <typename Manifold, typename T, size_t... C, size_t... P>
void define_joint(py::module_& m, std::index_sequence<C...>, std::index_sequence<P...>) {
  constexpr int64_t COLUMNS = Manifold::COLUMNS;
  static_assert(COLUMNS <= 3);
  constexpr const char *X[] = {"xa", "ya", "za"}, *Y[] = {"xb", "yb", "zb"};
  m.def(
      Manifold::NAME,
      [](const Array<T, C>&... x, const Array<T, C>&... y, Double<P>... parameters) {
        const double values[] = {parameters...};
        const auto eval = [manifold = Manifold(values)](Number<T, C>... a, Number<T, C>... b) {
          const T raw_x[] = {a...}, raw_y[] = {b...};
          const T ready_x[] = {manifold.prepared(raw_x, COLUMNS, C)...};
          const T ready_y[] = {manifold.prepared(raw_y, COLUMNS, C)...};
          T s, g[COLUMNS], g_column[COLUMNS];
          manifold.eval(ready_x, ready_y, s, g, g_column);
          return std::array<T, 1 + 2 * COLUMNS>{s, g[C]..., (Manifold::opposite(C) ? -g[C] : g_column[C])...};
        };
        return each_result<T>(eval, std::make_index_sequence<1 + 2 * COLUMNS>{}, x..., y...);
      },
      array<T>(X[C])..., array<T>(Y[C])..., py::arg(Manifold::PARAMETERS[P])...,
      doc<T>(std::string("(s, half of ds/da in each coordinate, half of ds/db in each coordinate) of points a and b. ") +
             Manifold::DOC + " Any real coordinates; elementwise, broadcast.")
          .c_str());
}

template <typename Manifold, typename T>
void define_manifold(py::module_& m) {
  constexpr auto parameters = std::make_index_sequence<std::size(Manifold::PARAMETERS)>{};
  if constexpr (Manifold::FORM == moduli::Form::COLUMN_BY_COLUMN)
    define_axis<Manifold, T>(m, parameters);
  else if constexpr (Manifold::FORM == moduli::Form::CHORDS)
    define_chords<Manifold, T>(m, parameters);
  else
    define_joint<Manifold, T>(m, std::make_index_sequence<Manifold::COLUMNS>{}, parameters);
}

// f and df/ds of an inhibitor
template <typename T>
py::tuple value_and_slope(int64_t code, const moduli::InhibitorArguments<T>& arguments, const py::array_t<T>& s) {
  py::tuple found;
  kernels::with_inhibitor<T>(code, arguments.parameters, [&](auto type) {
    const auto eval = [inhibitor = typename decltype(type)::Member(arguments)](T x) {
      T f, slope;
      inhibitor.eval(x, f, slope);
      return std::array<T, 2>{f, slope};
    };
    found = each_result<T>(eval, std::make_index_sequence<2>{}, s);
  });
  return found;
}

template <typename Inhibitor, typename T, size_t... P>
void define_inhibitor(py::module_& m, std::index_sequence<P...>) {
  const std::string text = doc<T>(std::string("(f, df/ds) at squared distances s, elementwise: ") + Inhibitor::DOC);
  if constexpr (Inhibitor::TABULATED)
    m.def(
        Inhibitor::NAME,
        [](const py::array_t<T>& s, const py::array_t<T, py::array::c_style | py::array::forcecast>& table,
           Double<P>... parameters) {
          if (table.ndim() != 2 || table.shape(0) < 2 || table.shape(1) != 4)
            throw py::value_error("table must have shape (samples, 4) with samples >= 2; pass the table() of the inhibitor");
          const double values[] = {parameters...};
          return value_and_slope<T>(Inhibitor::CODE,
                                    {.parameters = values, .table = table.data(), .samples = table.shape(0)}, s);
        },
        array<T>("s"), py::arg("table"), py::arg(Inhibitor::PARAMETERS[P])..., text.c_str());
  else
    m.def(
        Inhibitor::NAME,
        [](const py::array_t<T>& s, Double<P>... parameters) {
          const double values[] = {parameters...};
          return value_and_slope<T>(Inhibitor::CODE, {.parameters = values, .table = nullptr, .samples = 0}, s);
        },
        array<T>("s"), py::arg(Inhibitor::PARAMETERS[P])..., text.c_str());
}

template <typename T, typename... Members>
void define_manifolds(py::module_& m, kernels::TypeList<Members...>) {
  (define_manifold<Members, T>(m), ...);
}

// Functors that share a code have the same name and parameters, and one function serves them all.
template <typename T, typename... Members>
void define_inhibitors(py::module_& m, kernels::TypeList<Members...>) {
  int64_t last_code = -1;
  const auto define_once = [&](auto type) {
    using Inhibitor = typename decltype(type)::Member;
    if (Inhibitor::CODE != last_code)
      define_inhibitor<Inhibitor, T>(m, std::make_index_sequence<std::size(Inhibitor::PARAMETERS)>{});
    last_code = Inhibitor::CODE;
  };
  (define_once(kernels::Type<Members>()), ...);
}

template <typename T>
void define(py::module_& m) {
  define_elementary<T>(m);
  define_manifolds<T>(m, kernels::Manifolds<T>());
  define_inhibitors<T>(m, kernels::Inhibitors<T>());
}

}  // namespace

PYBIND11_MODULE(_functors, m) {
  m.doc() =
      "The compiled maths of the penalty over NumPy arrays: float32 where every array is float32, else float64. "
      "Lengths in the manifold's units, s is a squared length; parameters are not checked.";
  define<float>(m);
  define<double>(m);
}
