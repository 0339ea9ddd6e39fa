// Packs. A pack is a few lanes of float as one value, so that the functors of manifolds.h and inhibitors.h are written
// once for scalars and vectors. It is a GCC/Clang vector type, on which + - * /, comparisons and ?: work lane by lane.
// This file holds the other operations, for a scalar, AVX2 and AVX-512. Without either instruction set, and for double,
// a pack is the scalar, and the compiler vectorizes the loops.
//
// MODULI_NAMESPACE keeps code compiled for different instruction sets apart. Otherwise the linker could keep, for all
// of them, the copy of an inline function that uses the newest instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef MODULI_NAMESPACE
#define MODULI_NAMESPACE portable
#endif
#ifdef __CUDACC__
#define MODULI_HD __host__ __device__ __forceinline__
#else
#define MODULI_HD inline
#endif

namespace moduli::MODULI_NAMESPACE {

template <typename T>
struct Pack {
  using V = T;
  static constexpr int LANES = 1;
};

// For a scalar or a pack V, the type of a lane, and the unsigned type with lanes of the same width.
template <typename V>
struct Traits;
template <>
struct Traits<float> {
  using Scalar = float;
  using Bits = uint32_t;
};
template <>
struct Traits<double> {
  using Scalar = double;
  using Bits = uint64_t;
};

template <typename To, typename From>
MODULI_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A value with x in every lane
template <typename V>
MODULI_HD V splat(typename Traits<V>::Scalar x) {
  return V{} + x;
}

// a > b ? a : b and a < b ? a : b, which are b if either is NaN
template <typename V>
MODULI_HD V larger(V a, V b) {
  return a > b ? a : b;
}
template <typename V>
MODULI_HD V smaller(V a, V b) {
  return a < b ? a : b;
}
MODULI_HD float absolute(float x) { return std::fabs(x); }
MODULI_HD double absolute(double x) { return std::fabs(x); }
MODULI_HD float square_root(float x) { return std::sqrt(x); }
MODULI_HD double square_root(double x) { return std::sqrt(x); }

// x + ROUND - ROUND is x rounded to the nearest integer, for |x| < 2^22. The low bits of x + ROUND hold that integer.
constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23
MODULI_HD float round_(float x) { return (x + ROUND) - ROUND; }

MODULI_HD float truncated(float x) { return std::trunc(x); }
MODULI_HD double truncated(double x) { return std::trunc(x); }

// The function reads the four numbers of row `node` of a table (samples, 4), lane by lane. node is a whole number.
template <typename T>
MODULI_HD void load_cubics(const T* table, T node, T& a, T& b, T& c, T& d) {
  const T* cubic = table + 4 * static_cast<int32_t>(node);
  a = cubic[0];
  b = cubic[1];
  c = cubic[2];
  d = cubic[3];
}

// p * 2^n for p in [0.5, 2) and an integer n >= -126
MODULI_HD float scale_exponent(float p, float n) {
  return bits_as<float>(bits_as<uint32_t>(p) + (bits_as<uint32_t>(n + ROUND) << 23));
}

// The one of d, d - period and d + period that is nearest to 0, for |d| <= period. It is d at a tie and for period 0,
// so that the function is odd. It compares instead of multiplying with 1/period, since a pair then falls on the same
// side as in the reference.
template <typename V>
MODULI_HD V nearest_image(V d, typename Traits<V>::Scalar period) {
  const auto half = period / 2;
  return d > half ? d - period : (d < -half ? d + period : d);
}

// y times the sign of x, which is 0 if x is 0
template <typename V>
MODULI_HD V signed_by(V y, V x) {
  return x > 0 ? y : (x < 0 ? -y : V{});
}

// The sum over lanes
template <typename V>
MODULI_HD typename Traits<V>::Scalar sum_lanes(V x) {
  return x;
}

// A pack from and to memory of any alignment
template <typename V>
MODULI_HD V load_pack(const typename Traits<V>::Scalar* p) {
  V x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
template <typename V>
MODULI_HD void store_pack(typename Traits<V>::Scalar* p, V x) {
  std::memcpy(p, &x, sizeof(x));
}

// A store past the caches, where p is aligned to the pack. stream_fence() must follow the last one of a thread.
template <typename V>
MODULI_HD void stream_pack(typename Traits<V>::Scalar* p, V x) {
  store_pack(p, x);
}
MODULI_HD void stream_fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

#if defined(__AVX2__)

#if defined(__AVX512F__)
constexpr int PACK_BYTES = 64;
#else
constexpr int PACK_BYTES = 32;
#endif
typedef float F32 __attribute__((vector_size(PACK_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(PACK_BYTES)));
typedef double F64 __attribute__((vector_size(PACK_BYTES)));
typedef uint64_t U64 __attribute__((vector_size(PACK_BYTES)));

template <>
struct Traits<F32> {
  using Scalar = float;
  using Bits = U32;
};
template <>
struct Traits<F64> {
  using Scalar = double;
  using Bits = U64;
};
template <>
struct Pack<float> {
  using V = F32;
  static constexpr int LANES = PACK_BYTES / sizeof(float);
};

#endif
#if defined(__AVX512F__)

inline F32 larger(F32 a, F32 b) { return _mm512_max_ps(a, b); }
inline F32 absolute(F32 x) { return _mm512_abs_ps(x); }
inline F32 square_root(F32 x) { return _mm512_sqrt_ps(x); }
inline F32 round_(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 truncated(F32 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline F32 scale_exponent(F32 p, F32 n) { return _mm512_scalef_ps(p, n); }
template <>
inline F32 nearest_image<F32>(F32 d, float period) {
  const __mmask16 far = _mm512_cmp_ps_mask(absolute(d), _mm512_set1_ps(period / 2), _CMP_GT_OQ);
  // period with the sign of d, by one operation of three inputs
  const __m512i sign = _mm512_set1_epi32(INT32_MIN);
  const F32 towards = (F32)_mm512_ternarylogic_epi32(sign, (__m512i)d, (__m512i)(F32)_mm512_set1_ps(period), 0xEA);
  return _mm512_mask_sub_ps(d, far, d, towards);
}
inline F32 signed_by(F32 y, F32 x) {
  const __mmask16 nonzero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  // y ^ (x & sign), by one operation of three inputs
  return (F32)_mm512_maskz_ternarylogic_epi32(nonzero, (__m512i)y, (__m512i)x, _mm512_set1_epi32(INT32_MIN), 0x78);
}
inline float sum_lanes(F32 x) { return _mm512_reduce_add_ps(x); }
inline void stream_pack(float* p, F32 x) { _mm512_stream_ps(p, x); }

// Four numbers of each of rows l, l + 4, l + 8 and l + 12
inline F32 load_fours(const float* const (&row)[16], int l) {
  const __m512 low = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(row[l])), _mm_loadu_ps(row[l + 4]), 1);
  return _mm512_insertf32x4(_mm512_insertf32x4(low, _mm_loadu_ps(row[l + 8]), 2), _mm_loadu_ps(row[l + 12]), 3);
}

// The lower or upper two lanes, or pairs of lanes, of each quarter of a and b, interleaved
inline F32 low_pairs(F32 a, F32 b) { return _mm512_unpacklo_ps(a, b); }
inline F32 high_pairs(F32 a, F32 b) { return _mm512_unpackhi_ps(a, b); }
inline F32 low_halves(F32 a, F32 b) { return (F32)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
inline F32 high_halves(F32 a, F32 b) { return (F32)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }

#elif defined(__AVX2__)

inline F32 larger(F32 a, F32 b) { return _mm256_max_ps(a, b); }
inline F32 absolute(F32 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline F32 square_root(F32 x) { return _mm256_sqrt_ps(x); }
inline F32 round_(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline F32 truncated(F32 x) { return _mm256_round_ps(x, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC); }
inline F32 scale_exponent(F32 p, F32 n) { return (F32)((U32)p + ((U32)(n + ROUND) << 23)); }
inline F32 signed_by(F32 y, F32 x) {
  const __m256 nonzero = _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  return _mm256_and_ps(nonzero, _mm256_xor_ps(y, _mm256_and_ps(x, _mm256_set1_ps(-0.0f))));
}
inline float sum_lanes(F32 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline void stream_pack(float* p, F32 x) { _mm256_stream_ps(p, x); }

// Four numbers of each of rows l and l + 4
inline F32 load_fours(const float* const (&row)[8], int l) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[l])), _mm_loadu_ps(row[l + 4]), 1);
}

inline F32 low_pairs(F32 a, F32 b) { return _mm256_unpacklo_ps(a, b); }
inline F32 high_pairs(F32 a, F32 b) { return _mm256_unpackhi_ps(a, b); }
inline F32 low_halves(F32 a, F32 b) { return (F32)_mm256_unpacklo_pd((__m256d)a, (__m256d)b); }
inline F32 high_halves(F32 a, F32 b) { return (F32)_mm256_unpackhi_pd((__m256d)a, (__m256d)b); }

#endif
#if defined(__AVX2__)

inline void load_cubics(const float* table, F32 node, F32& a, F32& b, F32& c, F32& d) {
  typedef int32_t I32 __attribute__((vector_size(PACK_BYTES)));
  constexpr int LANES = Pack<float>::LANES;
  const I32 index = __builtin_convertvector(node, I32) * 4;
  const float* row[LANES];
  for (int l = 0; l < LANES; ++l) row[l] = table + index[l];
  // the numbers are transposed within each quarter of four lanes
  const F32 r0 = load_fours(row, 0), r1 = load_fours(row, 1), r2 = load_fours(row, 2), r3 = load_fours(row, 3);
  const F32 ab01 = low_pairs(r0, r1), ab23 = low_pairs(r2, r3), cd01 = high_pairs(r0, r1), cd23 = high_pairs(r2, r3);
  a = low_halves(ab01, ab23);
  b = high_halves(ab01, ab23);
  c = low_halves(cd01, cd23);
  d = high_halves(cd01, cd23);
}

#endif

}  // namespace moduli::MODULI_NAMESPACE
