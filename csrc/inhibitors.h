// Inhibitors f as functions of the squared distance s, with their slope df/ds, written once for scalars and packs, host
// and device. The formulas in terms of distances stand in moduli_kernels/geometry/inhibitors.py.
//
// Each functor declares
//   CODE                     the number by which Python's class of this inhibitor names it in an op's arguments
//   NAME, PARAMETERS, DOC    its name, its parameters in their order, and its formula in moduli_kernels._functors
//   a constructor            from InhibitorArguments
//   eval(s, f, slope)        f and df/ds; NaN in s gives NaN in both, and a slope that diverges at s = 0 is 0
// and may override what InhibitorDefaults says. The list of all functors stands at the end of this file; loops and
// NumPy functions are made from that list, so that nothing else has to be edited for a new one.
#pragma once

#include <cmath>
#include <cstdint>

#include "math/elementary.h"
#include "math/type_list.h"

namespace moduli {

// What an inhibitor is made from.
template <typename T>
struct InhibitorArguments {
  const double* parameters;
  const T* table;   // (samples, 4), or null if the inhibitor has no table
  int64_t samples;
};

}  // namespace moduli

namespace moduli::MODULI_NAMESPACE {

constexpr double LOG2_E = 1.4426950408889634;
constexpr double PI = 3.14159265358979324;

// What holds for most inhibitors.
struct InhibitorDefaults {
  static constexpr bool CONSTANT = false;   // f is the same at any distance, and its slope is 0
  static constexpr bool TABULATED = false;  // the inhibitor reads InhibitorArguments::table

  // Several functors may share a code. The first one in the list that accepts the parameters is taken.
  static constexpr bool accepts(const double*) { return true; }
};

template <typename T>
struct DifferenceOfGaussians : InhibitorDefaults {
  static constexpr int64_t CODE = 0;
  static constexpr const char *NAME = "difference_of_gaussians", *PARAMETERS[] = {"c", "sigma1", "sigma2", "offset"};
  static constexpr const char* DOC = "offset - c (exp(-s/sigma2) - exp(-s/sigma1)).";

  T c, offset, narrow, wide, narrow_slope, wide_slope;  // narrow and wide are -log2(e)/sigma

  explicit DifferenceOfGaussians(const InhibitorArguments<T>& a) : DifferenceOfGaussians(a.parameters) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V e1 = exp2_of_nonpositive(s * narrow), e2 = exp2_of_nonpositive(s * wide);
    f = offset - c * (e2 - e1);
    slope = wide_slope * e2 - narrow_slope * e1;
  }

 private:
  explicit DifferenceOfGaussians(const double* p)
      : c(T(p[0])), offset(T(p[3])), narrow(T(-LOG2_E / p[1])), wide(T(-LOG2_E / p[2])), narrow_slope(T(p[0] / p[1])),
        wide_slope(T(p[0] / p[2])) {}
};

// The exponents 2 and 1 give c s and c sqrt(s), which need no power function. EXPONENT 0 stands for any exponent.
template <typename T, int EXPONENT>
struct Diffusion : InhibitorDefaults {
  static constexpr int64_t CODE = 1;
  static constexpr const char *NAME = "diffusion", *PARAMETERS[] = {"c", "exponent"};
  static constexpr const char* DOC = "c s^(exponent/2); the slope is 0 where it diverges at 0.";
  static constexpr bool accepts(const double* parameters) { return EXPONENT == 0 || parameters[1] == EXPONENT; }

  T c, half, scaled;  // half the exponent; c times half the exponent

  explicit Diffusion(const InhibitorArguments<T>& a)
      : c(T(a.parameters[0])), half(T(a.parameters[1] / 2)), scaled(T(a.parameters[0] * a.parameters[1] / 2)) {}

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

template <typename T>
struct Sinusoid : InhibitorDefaults {
  static constexpr int64_t CODE = 2;
  static constexpr const char *NAME = "sinusoid", *PARAMETERS[] = {"c", "mu"};
  static constexpr const char* DOC = "c + c cos(mu sqrt(s)).";

  T c, mu, scaled;  // scaled is the slope at 0

  explicit Sinusoid(const InhibitorArguments<T>& a) : Sinusoid(a.parameters[0], a.parameters[1]) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    V cosine, sinc;
    cos_sinc(mu * square_root(s), cosine, sinc);
    f = c + c * cosine;
    slope = scaled * sinc;
  }

 private:
  Sinusoid(double height, double frequency)
      : c(T(height)), mu(T(frequency)), scaled(T(-height * frequency * frequency / 2)) {}
};

template <typename T>
struct RickerWavelet : InhibitorDefaults {
  static constexpr int64_t CODE = 3;
  static constexpr const char *NAME = "ricker_wavelet", *PARAMETERS[] = {"sigma", "c"};
  static constexpr const char* DOC = "c (psi(0) - psi(sqrt(s))), where psi is the Ricker wavelet of width sigma.";

  T peak, per_s, half_slope;

  explicit RickerWavelet(const InhibitorArguments<T>& a) {
    const double sigma = a.parameters[0], height = a.parameters[1] * 2 / std::sqrt(3 * sigma * std::sqrt(PI));
    peak = T(height);
    per_s = T(1 / (sigma * sigma));
    half_slope = T(height / (2 * sigma * sigma));
  }

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V u = s * per_s;
    const V e = exp2_of_nonpositive(u * T(-LOG2_E / 2));
    f = peak * (1 - (1 - u) * e);
    slope = half_slope * (3 - u) * e;
  }
};

template <typename T>
struct Constant : InhibitorDefaults {
  static constexpr int64_t CODE = 4;
  static constexpr const char *NAME = "constant", *PARAMETERS[] = {"c"};
  static constexpr const char* DOC = "(c, 0), and NaN where s is NaN.";
  static constexpr bool CONSTANT = true;

  T c;

  explicit Constant(const InhibitorArguments<T>& a) : c(T(a.parameters[0])) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    f = s == s ? splat<V>(c) : s;
    slope = s == s ? splat<V>(T(0)) : s;
  }
};

// The table (samples, 4) holds a cubic v + t (m + t (c2 + t c3)) for each of the equidistant nodes of [0,
// max_distance], where t counts steps from the node. Beyond the last node f is constant.
template <typename T>
struct TabulatedInhibitor : InhibitorDefaults {
  static constexpr int64_t CODE = 5;
  static constexpr const char *NAME = "tabulated", *PARAMETERS[] = {"max_distance"};
  static constexpr const char* DOC =
      "The cubics of TabulatedInhibitor.table(), shape (samples, 4), on equal parts of "
      "[0, max_distance]; f is constant beyond.";
  static constexpr bool TABULATED = true;

  const T* table;
  T steps_per_distance, last;

  explicit TabulatedInhibitor(const InhibitorArguments<T>& a)
      : table(a.table), steps_per_distance(T((a.samples - 1) / a.parameters[0])), last(T(a.samples - 1)) {}

  template <typename V>
  MODULI_HD void eval(V s, V& f, V& slope) const {
    const V d = square_root(s);
    const V x = d * steps_per_distance;
    const V at = x < last ? x : splat<V>(last);  // the last node also where x is NaN, which must not index the table
    const V node = truncated(at);
    const V t = x == x ? at - node : x;
    V v, m, c2, c3;
    load_cubics(table, node, v, m, c2, c3);
    f = v + t * (m + t * (c2 + t * c3));
    const V change = (m + t * (2 * c2 + t * (3 * c3))) * steps_per_distance;
    slope = d == 0 ? splat<V>(T(0)) : change / (2 * d);
  }
};

// The list of all inhibitors that the kernels know.
template <typename T>
using Inhibitors = TypeList<DifferenceOfGaussians<T>, Diffusion<T, 2>, Diffusion<T, 1>, Diffusion<T, 0>, Sinusoid<T>,
                            RickerWavelet<T>, Constant<T>, TabulatedInhibitor<T>>;

// The function calls run(Type<I>()) for the inhibitor I of this code and these parameters, and returns false if there
// is none.
template <typename T, typename Run>
__attribute__((always_inline)) inline bool with_inhibitor(int64_t code, const double* parameters, const Run& run) {
  const auto fits = [&](auto type) {
    using Inhibitor = typename decltype(type)::Member;
    return Inhibitor::CODE == code && Inhibitor::accepts(parameters);
  };
  return with_first(Inhibitors<T>(), fits, run);
}

}  // namespace moduli::MODULI_NAMESPACE
