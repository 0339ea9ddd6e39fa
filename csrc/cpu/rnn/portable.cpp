// The loops of the masked RNN, compiled for any processor; rnn.cpp picks at run time.
#define MODULI_NAMESPACE portable
#include "rnn_loops.h"
