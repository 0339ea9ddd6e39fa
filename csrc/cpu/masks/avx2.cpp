// The loops over masked entries, compiled for AVX2. cpu/common/dispatch.h picks them at run time.
#define MODULI_NAMESPACE avx2
#include "cpu/masks/loops.h"
