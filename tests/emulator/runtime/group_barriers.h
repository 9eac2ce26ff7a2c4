// Barriers of some warps of a block (bar.sync, bar.arrive), and of all threads of a cluster. Internal to the runtime.
#pragma once

#include "execution.h"

namespace segattn::emulator {

void start_group_barriers();
// A thread, which counts no longer as alive, leaves the kernel.
void leave_cluster_barrier();

}  // namespace segattn::emulator
