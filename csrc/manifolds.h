// Squared geodesic distances s and half of their derivatives, written once for scalars and packs, host and device.
//
// The penalty needs g = (1/2) ds/dx, since with it dR/dx = sum 2 t g. A manifold is a list of factors, and s is the sum
// over the factors. Each functor below is one kind of factor. It declares
//   CODE                     the number by which Python's class of this factor names it in an op's arguments
//   NAME, PARAMETERS, DOC    its name, its parameters and its formula in moduli_kernels._functors
//   FORM                     how s is put together from the columns of a point, see Form
//   COLUMNS                  the number of columns of a point, or 0 if any number is allowed
//   CURVED                   true if points are on a curved surface in a larger space; finish() then projects gradients
//   parameter_count(columns) the number of parameters
//   opposite(c)              true if g of the column point is minus g of the row point in column c, for all points
//   a constructor            from a pointer to the parameters
//   prepared(x, columns, c)  coordinate c of point x as the distance wants it; it is computed once a point
// and what its form asks for. The list of all functors stands at the end of this file; loops and NumPy functions are
// made from that list, so that nothing else has to be edited for a new one.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/elementary.h"
#include "math/type_list.h"

namespace moduli {

// How s is put together from the columns x_c of a row point and y_c of a column point.
enum class Form {
  // s = sum of d_c^2 and g_c = d_c, where d_c = axis(c).difference(x_c, y_c).
  COLUMN_BY_COLUMN,
  // eval(x, y, s, g, g_column) computes s from COLUMNS columns at once. It gives g, and for the column point g_column,
  // of which only the columns that aren't opposite are read.
  ALL_COLUMNS,
  // eval(minus, plus, s, factor) computes s from minus = |x - y|^2 and plus = |x + y|^2, and g_c = factor (x_c - y_c).
  // square(minus, plus) returns s alone.
  CHORDS,
};

namespace MODULI_NAMESPACE {

// One axis of a flat space. It is periodic unless the period is 0.
template <typename T>
struct FlatAxis {
  T period;

  MODULI_HD explicit FlatAxis(T p) : period(p) {}

  // The coordinate in [0, period]. The methods below expect both coordinates in this range.
  MODULI_HD T reduce(T x) const { return period > 0 ? x - period * std::floor(x / period) : x; }

  // wrap(x - y, period), in [-period/2, period/2]
  template <typename V>
  MODULI_HD V difference(T x, V y) const {
    return nearest_image<V>(x - y, period);
  }
  // wrap(x + y - period, period), which makes sense for a periodic axis only
  template <typename V>
  MODULI_HD V sum(T x, V y) const {
    return nearest_image<V>(x + y - period, period);
  }
};

// A flat space: a line, a circle, a torus, or a product of them. Each column has a period, 0 if it isn't periodic.
template <typename T>
struct Flat {
  static constexpr int64_t CODE = 0, COLUMNS = 0;
  static constexpr const char *NAME = "flat", *PARAMETERS[] = {"period"};
  static constexpr const char* DOC = "wrap(x - y, period), in [-period/2, period/2]; x - y for period 0.";
  static constexpr Form FORM = Form::COLUMN_BY_COLUMN;
  static constexpr bool CURVED = false;
  static constexpr int64_t parameter_count(int64_t columns) { return columns; }
  static constexpr bool opposite(int64_t) { return true; }

  const double* periods;

  MODULI_HD explicit Flat(const double* parameters) : periods(parameters) {}

  MODULI_HD FlatAxis<T> axis(int64_t c) const { return FlatAxis<T>(T(periods[c])); }
  MODULI_HD T prepared(const T* x, int64_t, int64_t c) const { return axis(c).reduce(x[c]); }
};

// A sphere of any dimension. Points are normalized to unit vectors x^ and y^. From minus = |x^ - y^|^2 and
// plus = |x^ + y^|^2 follow the angle theta = 2 atan2(sqrt minus, sqrt plus), s = (radius theta)^2, and
// factor = radius^2 theta / sin theta, which is taken as 0 at antipodes. An arc cosine would lose the small angles.
template <typename T>
struct Sphere {
  static constexpr int64_t CODE = 1, COLUMNS = 0;
  static constexpr const char *NAME = "sphere", *PARAMETERS[] = {"radius"};
  static constexpr const char* DOC =
      "s = (radius theta)^2 with the angle theta between unit vectors u and v; "
      "factor = radius^2 theta / sin(theta), 0 at antipodes.";
  static constexpr Form FORM = Form::CHORDS;
  static constexpr bool CURVED = true;
  static constexpr int64_t parameter_count(int64_t) { return 1; }
  static constexpr bool opposite(int64_t) { return true; }

  T radius;

  MODULI_HD explicit Sphere(const double* parameters) : radius(T(parameters[0])) {}

  MODULI_HD static T norm(const T* x, int64_t columns) {
    T squares = 0;
    for (int64_t c = 0; c < columns; ++c) squares += x[c] * x[c];
    return std::sqrt(squares);
  }
  MODULI_HD T prepared(const T* x, int64_t columns, int64_t c) const { return x[c] / norm(x, columns); }

  // On AVX2 this must not be inlined. The compiler would inline it into some loops only, and fuse its last product with the
  // loop's sum there, so that roundings would depend on what else the file contains.
  template <typename V>
#if defined(__AVX2__) && !defined(__AVX512F__)
  __attribute__((noinline))
#endif
  MODULI_HD void eval(V minus, V plus, V& s, V& factor) const {
    const V a = square_root(minus), b = square_root(plus);
    const V angle = atan2_positive(a, b);
    const V d = 2 * radius * angle;
    s = d * d;
    // theta = 2 angle, and 2 sin theta = a b
    const V product = a * b;
    const V ratio = 4 * angle / (product == 0 ? splat<V>(T(1)) : product);
    factor = radius * radius * (minus == 0 ? splat<V>(T(1)) : (plus == 0 ? splat<V>(T(0)) : ratio));
  }

  template <typename V>
  __attribute__((always_inline)) MODULI_HD V square(V minus, V plus) const {
    const V d = 2 * radius * atan2_positive(square_root(minus), square_root(plus));
    return d * d;
  }

  // The method turns a gradient g (columns), taken at the unit vector, into that of the point x as it was given: it
  // projects g on the tangent space and divides it by |x|. Coordinate c of the unit vector is ready[c * stride].
  MODULI_HD void finish(const T* x, const T* ready, int64_t stride, int64_t columns, double* g) const {
    double radial = 0;
    for (int64_t c = 0; c < columns; ++c) radial += g[c] * ready[c * stride];
    const double length = norm(x, columns);
    for (int64_t c = 0; c < columns; ++c) g[c] = (g[c] - radial * ready[c * stride]) / length;
  }
};

// The Klein bottle [0, width] x [0, height] with (x, 0) ~ (x, height) and (0, y) ~ (width, height - y). With
// dx = wrap(xa - xb, 2 width), the straight way has s1 = dx^2 + wrap(ya - yb)^2 and the way through the flip has
// s2 = (width - |dx|)^2 + wrap(ya + yb - height)^2. The shorter one counts, and s1 at a tie.
template <typename T>
struct KleinBottle {
  static constexpr int64_t CODE = 2, COLUMNS = 2;
  static constexpr const char *NAME = "klein_bottle", *PARAMETERS[] = {"width", "height"};
  static constexpr const char* DOC =
      "The Klein bottle [0, width] x [0, height] with (x, 0) ~ (x, height) and (0, y) ~ (width, height - y).";
  static constexpr Form FORM = Form::ALL_COLUMNS;
  static constexpr bool CURVED = false;
  static constexpr int64_t parameter_count(int64_t) { return 2; }
  static constexpr bool opposite(int64_t c) { return c == 0; }  // the flip reverses the second coordinate

  T width;
  FlatAxis<T> across, along;

  MODULI_HD explicit KleinBottle(const double* parameters)
      : width(T(parameters[0])), across(2 * width), along(T(parameters[1])) {}

  MODULI_HD T prepared(const T* x, int64_t, int64_t c) const { return (c == 0 ? across : along).reduce(x[c]); }

  template <typename V>
  MODULI_HD void eval(const T (&x)[2], const V (&y)[2], V& s, V (&g)[2], V (&g_column)[2]) const {
    const V dx = across.difference(x[0], y[0]);
    const V straight = along.difference(x[1], y[1]);
    const V flipped = along.sum(x[1], y[1]);
    const V other = width - absolute(dx);
    const V s1 = dx * dx + straight * straight;
    const V s2 = other * other + flipped * flipped;
    s = s2 < s1 ? s2 : s1;
    g[0] = s2 < s1 ? signed_by(-other, dx) : dx;
    g[1] = s2 < s1 ? flipped : straight;
    g_column[0] = -g[0];
    g_column[1] = s2 < s1 ? flipped : -straight;
  }
};

// The list of all manifolds that the kernels know.
template <typename T>
using Manifolds = TypeList<Flat<T>, Sphere<T>, KleinBottle<T>>;

// The function calls run(Type<M>()) for the manifold M of this code, and returns false if there is none.
template <typename T, typename Run>
__attribute__((always_inline)) inline bool with_manifold(int64_t code, const Run& run) {
  return with_first(Manifolds<T>(), [&](auto type) { return decltype(type)::Member::CODE == code; }, run);
}

}  // namespace MODULI_NAMESPACE
}  // namespace moduli
