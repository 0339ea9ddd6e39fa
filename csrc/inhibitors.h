// Inhibitors as functions of the squared distance s: f and its slope df/ds, the maths once for host and device.
// Formulas: moduli_kernels/inhibitors.py; codes: moduli_kernels/_encoding.py. Parameters come in the order of
// _encoding.py.
#pragma once

#include "elementary.h"

namespace moduli {

enum InhibitorKind { DIFFERENCE_OF_GAUSSIANS = 0, DIFFUSION = 1, SINUSOID = 2, RICKER = 3, CONSTANT = 4, TABULATED = 5 };

namespace MODULI_NAMESPACE {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double PI = 3.14159265358979324;

// c, sigma1, sigma2, offset
template <typename T>
struct DifferenceOfGaussians {
  T c, offset, narrow, wide, narrow_slope, wide_slope;  // narrow, wide: -log2(e)/sigma

  explicit DifferenceOfGaussians(const double* p)
      : c(T(p[0])), offset(T(p[3])), narrow(T(-LOG2_E / p[1])), wide(T(-LOG2_E / p[2])), narrow_slope(T(p[0] / p[1])),
        wide_slope(T(p[0] / p[2])) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V e1 = exp2_of_nonpositive(s * narrow), e2 = exp2_of_nonpositive(s * wide);
    f = offset - c * (e2 - e1);
    slope = wide_slope * e2 - narrow_slope * e1;
  }
};

// c, exponent. EXPONENT 2 and 1 are c s and c sqrt(s) without pow; 0 takes any.
template <typename T, int EXPONENT>
struct Diffusion {
  T c, half, scaled;

  explicit Diffusion(const double* p) : c(T(p[0])), half(T(p[1] / 2)), scaled(T(p[0] * p[1] / 2)) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    if (EXPONENT == 2) {
      f = c * s;
      slope = s == s ? splat<V>(c) : s;
    } else if (EXPONENT == 1) {
      const V d = square_root(s);
      f = c * d;
      slope = s == 0 ? splat<V>(T(0)) : scaled / d;
    } else {
      const V power = power_positive(s, half);
      f = c * power;
      slope = s == 0 ? splat<V>(T(0)) : scaled * power / s;
    }
  }
};

// c, mu
template <typename T>
struct Sinusoid {
  T c, mu, scaled;

  explicit Sinusoid(const double* p) : c(T(p[0])), mu(T(p[1])), scaled(T(-p[0] * p[1] * p[1] / 2)) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    V cosine, sinc;
    cos_sinc(mu * square_root(s), cosine, sinc);
    f = c + c * cosine;
    slope = scaled * sinc;
  }
};

// sigma, c
template <typename T>
struct RickerWavelet {
  T peak, per_s, half_slope;

  explicit RickerWavelet(const double* p) {
    const double height = p[1] * 2 / std::sqrt(3 * p[0] * std::sqrt(PI));
    peak = T(height);
    per_s = T(1 / (p[0] * p[0]));
    half_slope = T(height / (2 * p[0] * p[0]));
  }
  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V u = s * per_s;
    const V e = exp2_of_nonpositive(u * T(-LOG2_E / 2));
    f = peak * (1 - (1 - u) * e);
    slope = half_slope * (3 - u) * e;
  }
};

// c
template <typename T>
struct Constant {
  T c;

  explicit Constant(const double* p) : c(T(p[0])) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    f = s == s ? splat<V>(c) : s;
    slope = s == s ? splat<V>(T(0)) : s;
  }
};

// max_distance; table (samples, 4): the cubic v + t (m + t (c2 + t c3)) from each equidistant node on, t in steps.
template <typename T>
struct Tabulated {
  const T* table;
  T steps_per_distance, last;

  Tabulated(const double* p, const T* cubics, int64_t samples)
      : table(cubics), steps_per_distance(T((samples - 1) / p[0])), last(T(samples - 1)) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V d = square_root(s);
    const V x = d * steps_per_distance;
    const V at = x < last ? x : splat<V>(last);  // also where x is NaN
    const V node = truncated(at);
    const V t = x == x ? at - node : x;
    V v, m, c2, c3;
    load_cubics(table, node, v, m, c2, c3);
    f = v + t * (m + t * (c2 + t * c3));
    const V change = (m + t * (2 * c2 + t * (3 * c3))) * steps_per_distance;
    slope = d == 0 ? splat<V>(T(0)) : change / (2 * d);
  }
};

}  // namespace MODULI_NAMESPACE
}  // namespace moduli
