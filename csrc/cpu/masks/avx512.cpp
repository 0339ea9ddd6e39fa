// The loops over masked entries, compiled for AVX-512. cpu/common/dispatch.h picks them at run time.
#define MODULI_NAMESPACE avx512
#include "cpu/masks/loops.h"
