// The loops over masked entries, compiled for any processor. cpu/common/dispatch.h picks them at run time.
#include "cpu/masks/loops.h"
