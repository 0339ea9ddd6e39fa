// The loops of the penalty, compiled for any processor; penalty.cpp picks at run time.
#define MODULI_NAMESPACE portable
#include "penalty_loops.h"
