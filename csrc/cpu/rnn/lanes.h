// WIDTH numbers of a strip as a few of the processor's vectors, which stay in registers.
#pragma once

#include <cstdint>

#include "math/simd.h"

namespace moduli::MODULI_NAMESPACE {

// A vector of LANES numbers, which is the number itself if there is one lane.
template <typename T, int LANES>
struct VectorOf {
  typedef T V __attribute__((vector_size(LANES * sizeof(T))));
};
template <typename T>
struct VectorOf<T, 1> {
  using V = T;
};

// WIDTH lanes as N vectors V of LANES each, the widest that the processor has and that leave nothing over.
template <typename T, int WIDTH_>
struct Lanes {
#if defined(__AVX512F__)
  static constexpr int BYTES = 64;
#elif defined(__AVX2__)
  static constexpr int BYTES = 32;
#else
  static constexpr int BYTES = 16;
#endif
  static constexpr int WIDTH = WIDTH_;
  static constexpr int widest(int lanes) { return WIDTH % lanes == 0 ? lanes : widest(lanes / 2); }
  static constexpr int LANES = widest(BYTES / sizeof(T));
  static constexpr int N = WIDTH / LANES;
  using V = typename VectorOf<T, LANES>::V;
};

template <typename V, typename T>
inline V load_lanes(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V, typename T>
inline void store_lanes(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T, typename V>
inline T sum_of_lanes(V v) {
  T lane[sizeof(V) / sizeof(T)], sum = 0;
  __builtin_memcpy(lane, &v, sizeof(v));
  for (const T each : lane) sum += each;
  return sum;
}

// The function adds the sum over the lanes of each of eight vectors to sums[0 .. 8].
template <typename T, typename V>
inline void add_sums_of_eight(const V (&v)[8], T* sums) {
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 4 && sizeof(V) >= 32) {
    __m256 half[8];
    for (int i = 0; i < 8; ++i) {
#if defined(__AVX512F__)
      if constexpr (sizeof(V) == 64)
        half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
      else
#endif
        half[i] = (__m256)v[i];
    }
    for (int i = 0; i < 8; i += 2) half[i / 2] = _mm256_hadd_ps(half[i], half[i + 1]);
    const __m256 low = _mm256_hadd_ps(half[0], half[1]), high = _mm256_hadd_ps(half[2], half[3]);
    const __m256 sum = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
    _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), sum));
    return;
  }
#endif
  for (int i = 0; i < 8; ++i) sums[i] += sum_of_lanes<T>(v[i]);
}

}  // namespace moduli::MODULI_NAMESPACE
