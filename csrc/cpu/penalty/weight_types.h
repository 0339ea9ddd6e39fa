// Conversion of weights of every type to and from the compute type T, `count` elements from `offset` on.
#pragma once

#include "cpu/penalty/problem.h"
#include "math/simd.h"

#ifndef __F16C__
#include <torch/headeronly/util/Half.h>
#endif

namespace moduli::MODULI_NAMESPACE {

constexpr WeightType weight_type(float) { return WeightType::FLOAT32; }
constexpr WeightType weight_type(double) { return WeightType::FLOAT64; }

inline float from_bfloat16(uint16_t w) { return bits_as<float>(static_cast<uint32_t>(w) << 16); }

// The function rounds to nearest even, and NaN stays NaN.
inline uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

inline float from_float16(uint16_t w) {
#ifdef __F16C__
  return _cvtsh_ss(w);
#else
  return torch::headeronly::detail::fp16_ieee_to_fp32_value(w);
#endif
}

inline uint16_t to_float16(float x) {
#ifdef __F16C__
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  return torch::headeronly::detail::fp16_ieee_from_fp32_value(x);
#endif
}

template <typename T>
inline void load(const void* data, WeightType type, int64_t offset, int64_t count, T* to) {
  switch (type) {
    case WeightType::FLOAT32:
      for (int64_t j = 0; j < count; ++j) to[j] = T(static_cast<const float*>(data)[offset + j]);
      break;
    case WeightType::FLOAT64:
      for (int64_t j = 0; j < count; ++j) to[j] = T(static_cast<const double*>(data)[offset + j]);
      break;
    case WeightType::BFLOAT16:
      for (int64_t j = 0; j < count; ++j) to[j] = T(from_bfloat16(static_cast<const uint16_t*>(data)[offset + j]));
      break;
    case WeightType::FLOAT16:
      for (int64_t j = 0; j < count; ++j) to[j] = T(from_float16(static_cast<const uint16_t*>(data)[offset + j]));
      break;
  }
}

template <typename T>
inline void store(void* data, WeightType type, int64_t offset, int64_t count, const T* from) {
  switch (type) {
    case WeightType::FLOAT32:
      for (int64_t j = 0; j < count; ++j) static_cast<float*>(data)[offset + j] = float(from[j]);
      break;
    case WeightType::FLOAT64:
      for (int64_t j = 0; j < count; ++j) static_cast<double*>(data)[offset + j] = double(from[j]);
      break;
    case WeightType::BFLOAT16:
      for (int64_t j = 0; j < count; ++j) static_cast<uint16_t*>(data)[offset + j] = to_bfloat16(float(from[j]));
      break;
    case WeightType::FLOAT16:
      for (int64_t j = 0; j < count; ++j) static_cast<uint16_t*>(data)[offset + j] = to_float16(float(from[j]));
      break;
  }
}

// data += from
template <typename T>
inline void add(void* data, WeightType type, int64_t offset, int64_t count, const T* from) {
  T piece[64];
  for (int64_t at = 0; at < count; at += 64) {
    const int64_t n = count - at < 64 ? count - at : 64;
    load(data, type, offset + at, n, piece);
    for (int64_t j = 0; j < n; ++j) piece[j] += from[at + j];
    store(data, type, offset + at, n, piece);
  }
}

}  // namespace moduli::MODULI_NAMESPACE
