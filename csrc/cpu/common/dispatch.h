// The table of all loops that are compiled once per instruction set, and the choice among them at run time.
#pragma once

#include "cpu/common/isa.h"
#include "cpu/masks/entries.h"
#include "cpu/penalty/problem.h"
#include "cpu/rnn/steps.h"

namespace moduli {

// Each of these functions is defined in the files avx512.cpp, avx2.cpp and portable.cpp of masks/, penalty/ and
// rnn/.
#define MODULI_DECLARE_LOOPS(isa)         \
  namespace isa {                         \
  template <typename Bits>                \
  const MaskLoops<Bits>& mask_loops();    \
  template <typename T>                   \
  const PenaltyLoops<T>& penalty_loops(); \
  template <typename T>                   \
  const RnnLoops<T>& rnn_loops();         \
  }
MODULI_DECLARE_LOOPS(portable)
#if MODULI_KERNELS_X86
MODULI_DECLARE_LOOPS(avx2)
MODULI_DECLARE_LOOPS(avx512)
#endif

template <typename T>
struct Loops {
  const PenaltyLoops<T>& penalty;
  const RnnLoops<T>& rnn;
};

// The loops for this processor, in compute type T (float or double).
template <typename T>
const Loops<T>& loops() {
  static const Loops<T> picked = [] {
    switch (pick_isa()) {
#if MODULI_KERNELS_X86
      case Isa::AVX512: return Loops<T>{avx512::penalty_loops<T>(), avx512::rnn_loops<T>()};
      case Isa::AVX2: return Loops<T>{avx2::penalty_loops<T>(), avx2::rnn_loops<T>()};
#endif
      default: return Loops<T>{portable::penalty_loops<T>(), portable::rnn_loops<T>()};
    }
  }();
  return picked;
}

// The loops over masked entries for this processor, for weights of the size of Bits (uint16_t, uint32_t or uint64_t).
template <typename Bits>
const MaskLoops<Bits>& mask_loops() {
  static const MaskLoops<Bits>& picked = [&]() -> const MaskLoops<Bits>& {
    switch (pick_isa()) {
#if MODULI_KERNELS_X86
      case Isa::AVX512: return avx512::mask_loops<Bits>();
      case Isa::AVX2: return avx2::mask_loops<Bits>();
#endif
      default: return portable::mask_loops<Bits>();
    }
  }();
  return picked;
}

}  // namespace moduli
