// The loops of the penalty, compiled for avx2; penalty.cpp picks at run time.
#define MODULI_NAMESPACE avx2
#include "penalty_loops.h"
