// Transposition of squares of SQUARE x SQUARE elements on their way between memory and a buffer.
#pragma once

#include <cstdint>

#include "math/simd.h"

namespace moduli {

// The side of a square: one cache line of float32, and a whole number of packs on every instruction set.
constexpr int64_t SQUARE = 16;

}  // namespace moduli

namespace moduli::MODULI_NAMESPACE {

#if defined(__AVX2__)

// The function transposes LANES packs in registers. It interleaves elements of two rows, then pairs of elements, then
// quarters of a pack.
__attribute__((always_inline)) inline void transpose_packs(F32 (&row)[Pack<float>::LANES]) {
  constexpr int LANES = Pack<float>::LANES;
  F32 b[LANES];  // b[4 m + i] holds column i of each quarter, for rows 4 m .. 4 m + 3
  for (int m = 0; m < LANES; m += 4) {
    const F32 low01 = low_pairs(row[m], row[m + 1]), low23 = low_pairs(row[m + 2], row[m + 3]);
    const F32 high01 = high_pairs(row[m], row[m + 1]), high23 = high_pairs(row[m + 2], row[m + 3]);
    b[m] = low_halves(low01, low23);
    b[m + 1] = high_halves(low01, low23);
    b[m + 2] = low_halves(high01, high23);
    b[m + 3] = high_halves(high01, high23);
  }
  for (int i = 0; i < 4; ++i) {
#if defined(__AVX512F__)
    const __m512 even_low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0x88),
                 odd_low = _mm512_shuffle_f32x4(b[i], b[i + 4], 0xDD);
    const __m512 even_high = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xDD);
    row[i] = _mm512_shuffle_f32x4(even_low, even_high, 0x88);
    row[i + 4] = _mm512_shuffle_f32x4(odd_low, odd_high, 0x88);
    row[i + 8] = _mm512_shuffle_f32x4(even_low, even_high, 0xDD);
    row[i + 12] = _mm512_shuffle_f32x4(odd_low, odd_high, 0xDD);
#else
    row[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    row[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
#endif
  }
}

#endif

__attribute__((always_inline)) inline void transpose_packs(float (&)[1]) {}
__attribute__((always_inline)) inline void transpose_packs(double (&)[1]) {}

// to[j][i] = from[i][j] for a square, with strides in elements. STREAM writes past the caches; `to` must then be
// aligned to packs.
template <bool STREAM, typename T>
__attribute__((always_inline)) inline void transpose_square(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using V = typename Pack<T>::V;
  constexpr int LANES = Pack<T>::LANES;
  for (int64_t i = 0; i < SQUARE; i += LANES)
    for (int64_t j = 0; j < SQUARE; j += LANES) {
      V row[LANES];
      for (int l = 0; l < LANES; ++l) row[l] = load_pack<V>(from + (i + l) * from_stride + j);
      transpose_packs(row);
      for (int l = 0; l < LANES; ++l) {
        T* at = to + (j + l) * to_stride + i;
        STREAM ? stream_pack(at, row[l]) : store_pack(at, row[l]);
      }
    }
}

}  // namespace moduli::MODULI_NAMESPACE
