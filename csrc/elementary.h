// Elementary functions written so that compilers vectorize them: no branches, no tables, no libm call in float.
//
// The float versions are polynomials (fitted by minimax on the reduced range; the error beside each is that of the
// polynomial); NaN comes out as NaN. The double versions call libm: correct first, float64 has no speed goal.
// MODULI_NAMESPACE keeps code compiled for different instruction sets apart: an inline function shared between
// translation units could otherwise be taken from the one with the newest instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef MODULI_NAMESPACE
#define MODULI_NAMESPACE portable
#endif
#ifdef __CUDACC__
#define MODULI_HD __host__ __device__ __forceinline__
#else
#define MODULI_HD inline
#endif

namespace moduli::MODULI_NAMESPACE {

template <typename To, typename From>
MODULI_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// x + ROUND - ROUND rounds |x| < 2^22 to the nearest integer and leaves it in the low bits of x + ROUND.
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23

// 2^y; below 2^-126 the smallest normal number. Relative error 9.1e-8.
MODULI_HD float exp2_(float y) {
  y = y < -126.0f ? -126.0f : y;
  y = y > 127.0f ? 127.0f : y;
  const float shifted = y + ROUND;
  const float r = y - (shifted - ROUND);
  float p = 1.3264724e-3f;
  p = p * r + 9.6715129e-3f;
  p = p * r + 5.5507338e-2f;
  p = p * r + 2.4022242e-1f;
  p = p * r + 6.9314698e-1f;
  p = p * r + 1.0f;
  return bits_as<float>(bits_as<int32_t>(p) + static_cast<int32_t>(bits_as<uint32_t>(shifted) << 23));
}
MODULI_HD double exp2_(double y) { return std::exp2(y); }

// cos(x) and sin(x)/x, |x| < 1e6. Absolute error 5.4e-8 beside the rounding of x.
MODULI_HD void cos_sinc(float x, float& cosine, float& sinc) {
  const float shifted = x * 0.318309886f + ROUND;
  const float n = shifted - ROUND;
  // pi in three parts: n * first part is exact for |n| < 2^14
  float r = x - n * 3.140625f;
  r = r - n * 9.67502593994140625e-4f;
  r = r - n * 1.509957990978376432e-7f;
  const uint32_t sign = bits_as<uint32_t>(shifted) << 31;
  const float u = r * r;
  float c = 2.4761808e-5f;
  c = c * u - 1.3888402e-3f;
  c = c * u + 4.1666641e-2f;
  c = c * u - 0.5f;
  c = c * u + 1.0f;
  float s = 2.6087893e-6f;
  s = s * u - 1.9811053e-4f;
  s = s * u + 8.3330874e-3f;
  s = s * u - 1.6666660e-1f;
  s = s * u * r + r;
  cosine = bits_as<float>(bits_as<uint32_t>(c) ^ sign);
  s = bits_as<float>(bits_as<uint32_t>(s) ^ sign);
  sinc = x == 0.0f ? 1.0f : s / x;
}
MODULI_HD void cos_sinc(double x, double& cosine, double& sinc) {
  cosine = std::cos(x);
  sinc = x == 0.0 ? 1.0 : std::sin(x) / x;
}

// atan2(a, b) for a, b >= 0, not both 0. Absolute error 2.3e-9 beside rounding.
MODULI_HD float atan2_positive(float a, float b) {
  const bool steep = a > b;
  const float q = (steep ? b : a) / (steep ? a : b);
  const float u = q * q;
  float p = -1.8271847e-3f;
  p = p * u + 1.1064315e-2f;
  p = p * u - 3.1455469e-2f;
  p = p * u + 5.8234320e-2f;
  p = p * u - 8.4194460e-2f;
  p = p * u + 1.0957572e-1f;
  p = p * u - 1.4265245e-1f;
  p = p * u + 1.9998639e-1f;
  p = p * u - 3.3333302e-1f;
  const float angle = p * u * q + q;
  return steep ? 1.57079633f - angle : angle;
}
MODULI_HD double atan2_positive(double a, double b) { return std::atan2(a, b); }

// a^e for a >= 0, e > 0. float through double, relative error 3e-10 before the last rounding.
MODULI_HD float power_positive(float a, float e) {
  const double x = static_cast<double>(a);
  // x = 2^n m with m in [sqrt(1/2), sqrt 2); log2 m = (2/ln 2) atanh(v), v = (m-1)/(m+1)
  const uint64_t bits = bits_as<uint64_t>(x);
  const uint64_t biased = bits + (UINT64_C(0x3ff0000000000000) - UINT64_C(0x3fe6a09e667f3bcd));
  const double n = bits_as<double>((biased >> 52) | UINT64_C(0x4330000000000000)) - (4503599627370496.0 + 1023.0);
  const double m = bits_as<double>((biased & UINT64_C(0x000fffffffffffff)) + UINT64_C(0x3fe6a09e667f3bcd));
  const double v = (m - 1.0) / (m + 1.0);
  const double u = v * v;
  double log2 = 1.0 / 13;
  log2 = log2 * u + 1.0 / 11;
  log2 = log2 * u + 1.0 / 9;
  log2 = log2 * u + 1.0 / 7;
  log2 = log2 * u + 1.0 / 5;
  log2 = log2 * u + 1.0 / 3;
  log2 = (log2 * u + 1.0) * v * 2.8853900817779268 + n;
  double y = log2 * static_cast<double>(e);
  y = y < -1000.0 ? -1000.0 : y;
  y = y > 1000.0 ? 1000.0 : y;
  const double shifted = y + 6755399441055744.0;  // 1.5 * 2^52
  const double r = y - (shifted - 6755399441055744.0);
  double p = 1.014843619540928e-07;
  p = p * r + 1.325833903860766e-06;
  p = p * r + 1.5252989541681921e-05;
  p = p * r + 1.5403440867854364e-04;
  p = p * r + 1.3333557626235887e-03;
  p = p * r + 9.618129181186872e-03;
  p = p * r + 5.550410866841137e-02;
  p = p * r + 2.4022650695722744e-01;
  p = p * r + 6.931471805598852e-01;
  p = p * r + 1.0;
  const double power = bits_as<double>(bits_as<uint64_t>(p) + (bits_as<uint64_t>(shifted) << 52));
  const float result = a == 0.0f ? 0.0f : static_cast<float>(power);
  return a - a == 0.0f ? result : a;  // infinity and NaN go through
}
MODULI_HD double power_positive(double a, double e) { return std::pow(a, e); }

}  // namespace moduli::MODULI_NAMESPACE
