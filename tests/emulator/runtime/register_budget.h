// The registers of each warp, which setmaxnreg changes. Internal to the runtime.
#pragma once

#include "execution.h"

namespace segattn::emulator {

void start_register_budgets();
// Called when the last thread of a block leaves the kernel: fails if the warps of a warpgroup did not execute the same
// setmaxnreg.
void check_register_budgets(const Block& block);

}  // namespace segattn::emulator
