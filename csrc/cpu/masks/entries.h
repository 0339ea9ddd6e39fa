// What the ops on masked entries hand to their loops (loops.h), which are compiled once per instruction set.
#pragma once

#include <cstdint>

namespace moduli {

// Each function looks at `count` entries of a weight, taken as unsigned integers of its size, and says whether one that
// is masked (its byte of the mask is 0) differs from 0. +0 and -0 are 0; NaN is not.
template <typename Bits>
struct MaskLoops {
  bool (*any_masked_nonzero)(const Bits* weight, const uint8_t* mask, int64_t count);
  bool (*zero_masked)(Bits* weight, const uint8_t* mask, int64_t count);  // also sets masked entries to 0
};

}  // namespace moduli
