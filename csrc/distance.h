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

// One flat axis, periodic unless period is 0. s = delta^2, g = delta = wrap(x - y, period) in [-period/2, period/2).
template <typename T>
struct FlatAxis {
  T period, half;
  bool periodic;

  MODULI_HD explicit FlatAxis(T p)
      : period(p), half(p > 0 ? p / 2 : std::numeric_limits<T>::infinity()), periodic(p > 0) {}

  // Into [0, period]; difference() wants both coordinates so.
  MODULI_HD T reduce(T x) const { return periodic ? x - period * std::floor(x / period) : x; }

  MODULI_HD T difference(T x, T y) const {
    T d = x - y;
    d = d >= half ? d - period : d;
    return d < -half ? d + period : d;
  }

  // wrap(x + y, period)
  MODULI_HD T sum(T x, T y) const {
    T d = x + y;
    d = d >= half ? d - period : d;
    return d >= half ? d - period : d;
  }
};

// Klein bottle [0, width] x [0, height], (x, 0) ~ (x, height), (0, y) ~ (width, height - y).
// s1 = dx^2 + wrap(ya - yb)^2; s2 = (width - |dx|)^2 + wrap(ya + yb)^2; s1 at a tie.
template <typename T>
struct KleinBottle {
  T width;
  FlatAxis<T> across, along;  // periods 2 width and height

  MODULI_HD KleinBottle(T w, T h) : width(w), across(2 * w), along(h) {}

  // ga = g of xa (that of xb is -ga), gya and gyb = g of ya and yb
  MODULI_HD void eval(T xa, T ya, T xb, T yb, T& s, T& ga, T& gya, T& gyb) const {
    const T dx = across.difference(xa, xb);
    const T straight = along.difference(ya, yb);
    const T flipped = along.sum(ya, yb);
    const T other = width - std::fabs(dx);
    const T s1 = dx * dx + straight * straight;
    const T s2 = other * other + flipped * flipped;
    const bool second = s2 < s1;
    const T toward = dx > 0 ? -other : (dx < 0 ? other : T(0));
    s = second ? s2 : s1;
    ga = second ? toward : dx;
    gya = second ? flipped : straight;
    gyb = second ? flipped : -straight;
  }
};

// Sphere of points normalized to unit vectors x^, y^. From minus = |x^ - y^|^2 and plus = |x^ + y^|^2,
// theta = 2 atan2(sqrt minus, sqrt plus), s = (radius theta)^2, and g_c = factor (x^_c - y^_c) before projection
// on the tangent space and division by |x|; factor = radius^2 theta / sin theta, 0 at antipodes.
template <typename T>
struct Sphere {
  T radius;

  MODULI_HD explicit Sphere(T r) : radius(r) {}

  MODULI_HD void eval(T minus, T plus, T& s, T& factor) const {
    const T a = std::sqrt(minus), b = std::sqrt(plus);
    const T angle = atan2_positive(a, b);
    const T d = 2 * radius * angle;
    s = d * d;
    // theta / sin theta = 4 angle / (2 sin theta), 2 sin theta = a b
    const T product = a * b;
    const T ratio = 4 * angle / (product == 0 ? T(1) : product);
    factor = radius * radius * (minus == 0 ? T(1) : (plus == 0 ? T(0) : ratio));
  }
};

}  // namespace MODULI_NAMESPACE
}  // namespace moduli
