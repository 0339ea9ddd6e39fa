// The loops of the masked RNN, compiled for any processor. cpu/common/dispatch.h picks them at run time.
#include "cpu/rnn/loops.h"
