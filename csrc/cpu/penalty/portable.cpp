// The loops of the penalty, compiled for any processor. cpu/common/dispatch.h picks them at run time.
#include "cpu/penalty/loops.h"
