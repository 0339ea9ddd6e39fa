// Inhibitors as functions of the squared distance s: f and its slope df/ds, the maths once for host and device.
// Formulas: moduli_kernels/inhibitors.py; codes: moduli_kernels/_encoding.py. Parameters come in the order of their
// Python fields. Constants are worked out once, in double.
#pragma once

#include "elementary.h"

namespace moduli {

enum InhibitorKind { DIFFERENCE_OF_GAUSSIANS = 0, DIFFUSION = 1, SINUSOID = 2, RICKER = 3, CONSTANT = 4, TABULATED = 5 };

namespace MODULI_NAMESPACE {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double PI = 3.14159265358979324;

// c, sigma1, sigma2, zero_min
template <typename T>
struct DifferenceOfGaussians {
  T c, offset, narrow, wide, narrow_slope, wide_slope;  // narrow, wide: -log2(e)/sigma

  explicit DifferenceOfGaussians(const double* p) {
    const double sigma1 = p[1], sigma2 = p[2];
    const double cheapest = std::log(sigma2 / sigma1) / (1 / sigma1 - 1 / sigma2);
    const double peak = p[0] * (std::exp(-cheapest / sigma2) - std::exp(-cheapest / sigma1));
    c = T(p[0]);
    offset = T(p[3] != 0 ? peak : p[0]);
    narrow = T(-LOG2_E / sigma1);
    wide = T(-LOG2_E / sigma2);
    narrow_slope = T(p[0] / sigma1);
    wide_slope = T(p[0] / sigma2);
  }
  MODULI_HD void eval(T s, T& f, T& slope) const {
    const T e1 = exp2_(s * narrow), e2 = exp2_(s * wide);
    f = offset - c * (e2 - e1);
    slope = wide_slope * e2 - narrow_slope * e1;
  }
};

// c, exponent. EXPONENT 2 and 1 are c s and c sqrt(s) without pow; 0 takes any.
template <typename T, int EXPONENT>
struct Diffusion {
  T c, half, scaled;

  explicit Diffusion(const double* p) : c(T(p[0])), half(T(p[1] / 2)), scaled(T(p[0] * p[1] / 2)) {}

  MODULI_HD void eval(T s, T& f, T& slope) const {
    if (EXPONENT == 2) {
      f = c * s;
      slope = s == s ? c : s;
    } else if (EXPONENT == 1) {
      const T d = std::sqrt(s);
      f = c * d;
      slope = s == 0 ? T(0) : scaled / d;
    } else {
      const T power = power_positive(s, half);
      f = c * power;
      slope = s == 0 ? T(0) : scaled * power / s;
    }
  }
};

// c, mu
template <typename T>
struct Sinusoid {
  T c, mu, scaled;

  explicit Sinusoid(const double* p) : c(T(p[0])), mu(T(p[1])), scaled(T(-p[0] * p[1] * p[1] / 2)) {}

  MODULI_HD void eval(T s, T& f, T& slope) const {
    T cosine, sinc;
    cos_sinc(mu * std::sqrt(s), cosine, sinc);
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
  MODULI_HD void eval(T s, T& f, T& slope) const {
    const T u = s * per_s;
    const T e = exp2_(u * T(-LOG2_E / 2));
    f = peak * (1 - (1 - u) * e);
    slope = half_slope * (3 - u) * e;
  }
};

// c
template <typename T>
struct Constant {
  T c;

  explicit Constant(const double* p) : c(T(p[0])) {}

  MODULI_HD void eval(T s, T& f, T& slope) const {
    f = s == s ? c : s;
    slope = s == s ? T(0) : s;
  }
};

// max_distance; table (samples, 2): value and slope per step at equidistant distances. Cubic Hermite.
template <typename T>
struct Tabulated {
  const T* table;
  T steps_per_distance, last;

  Tabulated(const double* p, const T* nodes, int64_t samples)
      : table(nodes), steps_per_distance(T((samples - 1) / p[0])), last(T(samples - 1)) {}

  MODULI_HD void eval(T s, T& f, T& slope) const {
    const T d = std::sqrt(s);
    const T x = d * steps_per_distance;
    const bool inside = x < last;  // false for NaN
    const int32_t i = inside ? static_cast<int32_t>(x) : 0;
    const T t = inside ? x - T(i) : T(0);
    const T v0 = table[2 * i], m0 = table[2 * i + 1], v1 = table[2 * i + 2], m1 = table[2 * i + 3];
    const T rise = v1 - v0, c2 = 3 * rise - 2 * m0 - m1, c3 = m0 + m1 - 2 * rise;
    const T value = v0 + t * (m0 + t * (c2 + t * c3));
    const T change = (m0 + t * (2 * c2 + t * (3 * c3))) * steps_per_distance;
    const T end = table[2 * static_cast<int32_t>(last)];
    f = s == s ? (inside ? value : end) : s;
    slope = s == s ? (inside && d > 0 ? change / (2 * d) : T(0)) : s;
  }
};

}  // namespace MODULI_NAMESPACE
}  // namespace moduli
