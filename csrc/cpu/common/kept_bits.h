// The bits of a mask, read 64 entries at a time.
#pragma once

#include <cstdint>

#include "math/simd.h"

namespace moduli {

// The number of entries of a mask that are read together.
constexpr int64_t MASK_STEP = 64;

}  // namespace moduli

namespace moduli::MODULI_NAMESPACE {

inline uint64_t kept_bits_one_by_one(const uint8_t* mask, int64_t count) {
  uint64_t bits = 0;
  for (int64_t l = 0; l < count; ++l) bits |= static_cast<uint64_t>(mask[l] != 0) << l;
  return bits;
}

// Bit l of the result is 1 if entry l of MASK_STEP entries is kept.
inline uint64_t kept_bits(const uint8_t* mask) {
#if defined(__AVX512BW__)
  const __m512i bytes = _mm512_loadu_si512(mask);
  return _mm512_test_epi8_mask(bytes, bytes);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask));
  const auto high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + 32));
  const auto cut_low = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, zero)));
  const auto cut_high = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, zero)));
  return ~(cut_low | static_cast<uint64_t>(cut_high) << 32);
#else
  return kept_bits_one_by_one(mask, MASK_STEP);
#endif
}

// The same for `count` entries, of which at most MASK_STEP are read.
inline uint64_t kept_bits(const uint8_t* mask, int64_t count) {
  return count >= MASK_STEP ? kept_bits(mask) : kept_bits_one_by_one(mask, count);
}

}  // namespace moduli::MODULI_NAMESPACE
