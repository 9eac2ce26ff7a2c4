// What tests ask of host code: which functions of the runtime API it calls, what it says where a launch fails or where the
// library holds no code for the device, and what it launches where nothing needs to run.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace segattn::emulator {

// Calls of the functions of include/runtime_api.h since forget_calls(), by name.
void count_call(const char* function);
std::map<std::string, int64_t> calls();
void forget_calls();

// After `launches` more that succeed one fails, with cudaErrorLaunchOutOfResources; negative: none does.
void set_failing_launch(int64_t launches);
bool launch_fails();

// The number behind current_stream(), never 0: that would be the default stream.
void set_current_stream(int64_t stream);

// Of every launch, only so many first blocks and as many last ones run: with 0, launches are just checked and remembered.
// What the other blocks would have written stays NaN. Negative: all run.
void set_blocks_at_ends(int64_t blocks);
bool block_runs(uint64_t index, uint64_t blocks);

// The architectures the library is taken to be built for, 80 for sm_80; without any, the emulated device's own.
void set_built_architectures(std::vector<int> architectures);
// The built one whose code would run on a device: of the same generation and not newer; 0 where there is none.
int code_architecture(int device_architecture);

}  // namespace segattn::emulator
