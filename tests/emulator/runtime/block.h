// Runs the blocks of a launch one after the other. Internal to the runtime.
#pragma once

#include <cstdint>
#include <string>

#include "../include/launch_emulated.h"

namespace segattn::emulator {

void start_execution(const LaunchRequest& request, std::string kernel_name);

// Runs the block that `block` describes. Throws std::runtime_error on a deadlock or a fault reported by fail().
void run_block(uint64_t seed);

}  // namespace segattn::emulator
