// The loops of the penalty, compiled for avx512; penalty.cpp picks at run time.
#define MODULI_NAMESPACE avx512
#include "penalty_loops.h"
