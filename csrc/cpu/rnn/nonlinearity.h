// tanh, ReLU and their slopes.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/rnn/steps.h"
#include "math/elementary.h"

namespace moduli::MODULI_NAMESPACE {

// tanh with a relative error of 2e-7: an odd polynomial near 0, and (1 - e^-2|x|) / (1 + e^-2|x|) elsewhere.
template <typename V>
inline V hyperbolic_tangent(V x) {
  const V a = absolute(x);
  const V e = exp2_of_nonpositive(a * -2.8853900817779268f);
  const V far = (1.0f - e) / (1.0f + e);
  const V u = x * x;
  V p = u * -5.70498872745e-3f + 2.06390887954e-2f;  // coefficients of the Cephes library
  p = p * u - 5.37397155531e-2f;
  p = p * u + 1.33314422036e-1f;
  p = p * u - 3.33332819422e-1f;
  const V near = p * u * a + a;
  const V positive = a < 0.625f ? near : far;
  return x - x == 0 ? signed_by(positive, x) : (x > 0 ? splat<V>(1.0f) : (x < 0 ? splat<V>(-1.0f) : x));
}
inline double hyperbolic_tangent(double x) { return std::tanh(x); }

// max(x, 0), where NaN stays NaN
template <typename V>
inline V rectified(V x) {
  return x < 0 ? V{} : x;
}

// The function replaces `count` numbers a by s(a).
template <typename T>
inline void activate(T* a, int64_t count, Nonlinearity nonlinearity) {
  using V = typename Pack<T>::V;
  constexpr int LANES = Pack<T>::LANES;
  const auto apply = [&](auto x) { return nonlinearity == Nonlinearity::TANH ? hyperbolic_tangent(x) : rectified(x); };
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_pack(a + i, apply(load_pack<V>(a + i)));
  if (i == count) return;
  T last[LANES] = {};
  __builtin_memcpy(last, a + i, (count - i) * sizeof(T));
  store_pack(last, apply(load_pack<V>(last)));
  __builtin_memcpy(a + i, last, (count - i) * sizeof(T));
}

// The slope of the nonlinearity at the point where its value is s
template <typename V>
inline V slope_at(V s, Nonlinearity nonlinearity) {
  if (nonlinearity == Nonlinearity::TANH) return 1 - s * s;
  const V one = V{} + 1, zero{};
  return s > 0 ? one : zero;
}

}  // namespace moduli::MODULI_NAMESPACE
