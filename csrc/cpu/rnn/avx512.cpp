// The loops of the masked RNN, compiled for avx512; rnn.cpp picks at run time.
#define MODULI_NAMESPACE avx512
#include "rnn_loops.h"
