// The loops over masked entries. At the end of the file stands their table; avx512.cpp, avx2.cpp and portable.cpp each
// include this file for their instruction set. Contracts stand in entries.h.
#pragma once

#include <algorithm>

#include "cpu/masks/entries.h"
#include "math/simd.h"

namespace moduli::MODULI_NAMESPACE {
namespace {

constexpr int64_t STRETCH = 4096;  // entries between two looks at what was found

// All bits are 1 where the entry is masked.
template <typename Bits>
inline Bits masked_bits(uint8_t kept) {
  return kept ? Bits{0} : static_cast<Bits>(~Bits{0});
}

template <typename Bits>
bool nonzero_in_stretch(const Bits* weight, const uint8_t* mask, int64_t count) {
  Bits found = 0;
  for (int64_t i = 0; i < count; ++i) found |= static_cast<Bits>(weight[i] << 1) & masked_bits<Bits>(mask[i]);
  return found != 0;
}

template <typename Bits>
bool any_masked_nonzero(const Bits* weight, const uint8_t* mask, int64_t count) {
  for (int64_t i = 0; i < count; i += STRETCH)
    if (nonzero_in_stretch(weight + i, mask + i, std::min(STRETCH, count - i))) return true;
  return false;
}

// A stretch in which nothing must change is not written, so that its lines of the cache stay clean.
template <typename Bits>
bool zero_masked(Bits* weight, const uint8_t* mask, int64_t count) {
  bool any = false;
  for (int64_t i = 0; i < count; i += STRETCH) {
    const int64_t end = std::min(i + STRETCH, count);
    if (!nonzero_in_stretch(weight + i, mask + i, end - i)) continue;
    any = true;
    for (int64_t k = i; k < end; ++k) weight[k] &= static_cast<Bits>(~masked_bits<Bits>(mask[k]));
  }
  return any;
}

template <typename Bits>
constexpr MaskLoops<Bits> MASK_LOOPS = {
    .any_masked_nonzero = any_masked_nonzero<Bits>,
    .zero_masked = zero_masked<Bits>,
};

}  // namespace

template <typename Bits>
const MaskLoops<Bits>& mask_loops() {
  return MASK_LOOPS<Bits>;
}
template const MaskLoops<uint16_t>& mask_loops<uint16_t>();
template const MaskLoops<uint32_t>& mask_loops<uint32_t>();
template const MaskLoops<uint64_t>& mask_loops<uint64_t>();

}  // namespace moduli::MODULI_NAMESPACE
