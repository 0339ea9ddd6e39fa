// The instruction sets that loops are compiled for, and the one that this processor uses.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

namespace moduli {

enum class Isa { PORTABLE, AVX2, AVX512 };

// The function picks the newest set that the processor has. MODULI_KERNELS_ISA (portable, avx2 or avx512) asks for an
// older one, so that every path can be tested on one machine.
inline Isa pick_isa() {
  const char* asked = std::getenv("MODULI_KERNELS_ISA");
  const std::string most = asked && *asked ? asked : "avx512";
  STD_TORCH_CHECK(most == "portable" || most == "avx2" || most == "avx512",
                  "MODULI_KERNELS_ISA must be portable, avx2 or avx512, got ", most, "; unset it to let the package pick.");
#if MODULI_KERNELS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (most == "avx512" && has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Isa::AVX512;
  if (most != "portable" && has_avx2) return Isa::AVX2;
#endif
  return Isa::PORTABLE;
}

}  // namespace moduli
