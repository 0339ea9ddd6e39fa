// Squared geodesic distances s and HALF their derivatives, the maths once for host and device.
//
// The rest of the sums wants them in this form: with g = (1/2) ds/dx, dR/dx = sum 2 t g. Where nothing else is said
// ds/dy = -ds/dx. A manifold is a list of factors, s the sum over them; codes as in moduli_kernels/_encoding.py.
#pragma once

#include <limits>

#include "elementary.h"

namespace moduli {

enum ManifoldKind { FLAT = 0, SPHERE = 1, KLEIN = 2 };

namespace MODULI_NAMESPACE {

// One flat axis, periodic unless period is 0. s = delta^2, g = delta = wrap(x - y, period) in [-period/2, period/2].
template <typename T>
struct FlatAxis {
  T period;

  MODULI_HD explicit FlatAxis(T p) : period(p) {}

  // Into [0, period]; difference() and sum() want both coordinates so.
  MODULI_HD T reduce(T x) const { return period > 0 ? x - period * std::floor(x / period) : x; }

  // wrap(x - y, period)
  template <typename V>
  MODULI_HD V difference(T x, V y) const {
    return nearest_image<V>(x - y, period);
  }
  // wrap(x + y - period, period); only of periodic axes
  template <typename V>
  MODULI_HD V sum(T x, V y) const {
    return nearest_image<V>(x + y - period, period);
  }
};

// Klein bottle [0, width] x [0, height], (x, 0) ~ (x, height), (0, y) ~ (width, height - y).
// s1 = dx^2 + wrap(ya - yb)^2; s2 = (width - |dx|)^2 + wrap(ya + yb - height)^2; s1 at a tie.
template <typename T>
struct KleinBottle {
  T width;
  FlatAxis<T> across, along;  // periods 2 width and height

  MODULI_HD KleinBottle(T w, T h) : width(w), across(2 * w), along(h) {}

  // ga = g of xa (that of xb is -ga), gya and gyb = g of ya and yb
  template <typename V>
  MODULI_HD void eval(T xa, T ya, V xb, V yb, V& s, V& ga, V& gya, V& gyb) const {
    const V dx = across.difference(xa, xb);
    const V straight = along.difference(ya, yb);
    const V flipped = along.sum(ya, yb);
    const V other = width - absolute(dx);
    const V s1 = dx * dx + straight * straight;
    const V s2 = other * other + flipped * flipped;
    s = s2 < s1 ? s2 : s1;
    ga = s2 < s1 ? signed_by(-other, dx) : dx;
    gya = s2 < s1 ? flipped : straight;
    gyb = s2 < s1 ? flipped : -straight;
  }
};

// Sphere of points normalized to unit vectors x^, y^. From minus = |x^ - y^|^2 and plus = |x^ + y^|^2,
// theta = 2 atan2(sqrt minus, sqrt plus), s = (radius theta)^2, and g_c = factor (x^_c - y^_c) before projection
// on the tangent space and division by |x|; factor = radius^2 theta / sin theta, 0 at antipodes.
template <typename T>
struct Sphere {
  T radius;

  MODULI_HD explicit Sphere(T r) : radius(r) {}

  template <typename V>
  MODULI_HD void eval(V minus, V plus, V& s, V& factor) const {
    const V a = square_root(minus), b = square_root(plus);
    const V angle = atan2_positive(a, b);
    const V d = 2 * radius * angle;
    s = d * d;
    // theta = 2 angle and 2 sin theta = a b
    const V product = a * b;
    const V ratio = 4 * angle / (product == 0 ? splat<V>(T(1)) : product);
    factor = radius * radius * (minus == 0 ? splat<V>(T(1)) : (plus == 0 ? splat<V>(T(0)) : ratio));
  }
};

}  // namespace MODULI_NAMESPACE
}  // namespace moduli
