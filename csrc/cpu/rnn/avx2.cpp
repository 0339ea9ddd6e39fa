// The loops of the masked RNN, compiled for avx2; rnn.cpp picks at run time.
#define MODULI_NAMESPACE avx2
#include "rnn_loops.h"
