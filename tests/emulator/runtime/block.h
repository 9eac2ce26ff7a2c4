// Runs the clusters of a launch one after the other; a cluster is one block unless the launch asks for more. Internal
// to the runtime.
#pragma once

#include <cstdint>
#include <string>

#include "../include/launch_emulated.h"

namespace segattn::emulator {

void start_execution(const LaunchRequest& request, std::string kernel_name);

// Runs the `count` blocks of a cluster together. Throws std::runtime_error on a deadlock or a fault reported by fail().
void run_cluster(const BlockVariables* blocks, int count, uint64_t seed);

}  // namespace segattn::emulator
