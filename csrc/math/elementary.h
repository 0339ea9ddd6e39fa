// Elementary functions for scalars and packs.
//
// The float versions have no branches, no tables and no calls of libm. They are minimax polynomials on a reduced range,
// and the comment of each states the error of its polynomial. NaN gives NaN. The double versions call libm, since
// float64 must be correct first and has no speed goal.
#pragma once

#include "math/simd.h"

namespace moduli::MODULI_NAMESPACE {

// 2^y for y <= 0, with a relative error of 9.1e-8. Below y = -126 it is 2^-126, since subnormal numbers are slow.
template <typename V>
MODULI_HD V exp2_of_nonpositive(V y) {
  y = larger(splat<V>(-126.0f), y);
  const V n = round_(y);
  const V r = y - n;
  V p = r * 1.3264724e-3f + 9.6715129e-3f;
  p = p * r + 5.5507338e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
  return scale_exponent(p, n);
}
MODULI_HD double exp2_of_nonpositive(double y) { return std::exp2(y); }

// cos(x) and sin(x)/x for |x| < 2.5e4, with an absolute error of 4.9e-9 beside rounding.
template <typename V>
MODULI_HD void cos_sinc(V x, V& cosine, V& sinc) {
  using U = typename Traits<V>::Bits;
  const V shifted = x * 0.318309886f + ROUND;
  const V n = shifted - ROUND;
  // pi comes in three parts, of which n times the first two is exact for |n| < 2^13
  V r = x - n * 3.140625f;
  r = r - n * 9.67502593994140625e-4f;
  r = r - n * 1.509957990978376432e-7f;
  const U sign = bits_as<U>(shifted) << 31;
  const V u = r * r;
  V c = u * -2.6075660e-7f + 2.4761808e-5f;
  c = c * u - 1.3888402e-3f;
  c = c * u + 4.1666641e-2f;
  c = c * u - 0.5f;
  c = c * u + 1.0f;
  V s = u * 2.6087893e-6f - 1.9811053e-4f;
  s = s * u + 8.3330874e-3f;
  s = s * u - 1.6666660e-1f;
  s = s * u * r + r;
  cosine = bits_as<V>(bits_as<U>(c) ^ sign);
  s = bits_as<V>(bits_as<U>(s) ^ sign);
  sinc = x == 0 ? splat<V>(1.0f) : s / x;
}
MODULI_HD void cos_sinc(double x, double& cosine, double& sinc) {
  cosine = std::cos(x);
  sinc = x == 0.0 ? 1.0 : std::sin(x) / x;
}

// atan2(a, b) for a, b >= 0, not both 0, with an absolute error of 2.3e-9 beside rounding.
template <typename V>
MODULI_HD V atan2_positive(V a, V b) {
  const V q = (a > b ? b : a) / (a > b ? a : b);
  const V u = q * q;
  V p = u * -1.8271847e-3f + 1.1064315e-2f;
  p = p * u - 3.1455469e-2f;
  p = p * u + 5.8234320e-2f;
  p = p * u - 8.4194460e-2f;
  p = p * u + 1.0957572e-1f;
  p = p * u - 1.4265245e-1f;
  p = p * u + 1.9998639e-1f;
  p = p * u - 3.3333302e-1f;
  const V angle = p * u * q + q;
  // pi/2 comes in two parts, since its rounding alone is 4.4e-8
  return a > b ? 1.57079637f - (angle + 4.37113883e-8f) : angle;
}
MODULI_HD double atan2_positive(double a, double b) { return std::atan2(a, b); }

// x^e = 2^(e log2 x) in double, for normal x > 0. The relative error of 3e-10 is enough for float arguments and
// results.
template <typename D>
MODULI_HD D power_in_double(D x, double e) {
  using U = typename Traits<D>::Bits;
  constexpr uint64_t ONE = UINT64_C(0x3ff0000000000000), SQRT_HALF = UINT64_C(0x3fe6a09e667f3bcd);
  // x = 2^n m with m in [sqrt(1/2), sqrt 2), and log2 m = (2/ln 2) atanh(v) with v = (m-1)/(m+1)
  const U biased = bits_as<U>(x) + (ONE - SQRT_HALF);
  const D n = bits_as<D>((biased >> 52) | UINT64_C(0x4330000000000000)) - (4503599627370496.0 + 1023.0);
  const D m = bits_as<D>((biased & UINT64_C(0x000fffffffffffff)) + SQRT_HALF);
  const D v = (m - 1.0) / (m + 1.0);
  const D u = v * v;
  D log2 = u * (1.0 / 13) + 1.0 / 11;
  log2 = log2 * u + 1.0 / 9;
  log2 = log2 * u + 1.0 / 7;
  log2 = log2 * u + 1.0 / 5;
  log2 = log2 * u + 1.0 / 3;
  log2 = (log2 * u + 1.0) * v * 2.8853900817779268 + n;
  D y = log2 * e;
  y = larger(splat<D>(-1000.0), y);
  y = smaller(splat<D>(1000.0), y);
  constexpr double ROUND_DOUBLE = 6755399441055744.0;  // 1.5 * 2^52
  const D shifted = y + ROUND_DOUBLE;
  const D r = y - (shifted - ROUND_DOUBLE);
  D p = r * 1.014843619540928e-07 + 1.325833903860766e-06;
  p = p * r + 1.5252989541681921e-05;
  p = p * r + 1.5403440867854364e-04;
  p = p * r + 1.3333557626235887e-03;
  p = p * r + 9.618129181186872e-03;
  p = p * r + 5.550410866841137e-02;
  p = p * r + 2.4022650695722744e-01;
  p = p * r + 6.931471805598852e-01;
  p = p * r + 1.0;
  return bits_as<D>(bits_as<U>(p) + (bits_as<U>(shifted) << 52));
}

// a^e of floats, computed in double
MODULI_HD float power_of_floats(float a, float e) { return static_cast<float>(power_in_double(static_cast<double>(a), e)); }
#if defined(__AVX2__)
inline F32 power_of_floats(F32 a, float e) {
  typedef float Half __attribute__((vector_size(sizeof(F32) / 2)));
  Half halves[2];
  std::memcpy(halves, &a, sizeof(a));
  for (Half& half : halves)
    half = __builtin_convertvector(power_in_double(__builtin_convertvector(half, F64), double(e)), Half);
  std::memcpy(&a, halves, sizeof(a));
  return a;
}
#endif

// a^e for a >= 0 and e > 0. It is a itself if a is 0, infinity or NaN.
template <typename V>
MODULI_HD V power_positive(V a, float e) {
  const V power = power_of_floats(a, e);
  return (a - a == 0 && a > 0) ? power : a;
}
MODULI_HD float power_positive(float a, float e) { return (a - a == 0 && a > 0) ? power_of_floats(a, e) : a; }
MODULI_HD double power_positive(double a, double e) { return std::pow(a, e); }

}  // namespace moduli::MODULI_NAMESPACE
