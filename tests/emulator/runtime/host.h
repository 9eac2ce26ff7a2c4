// Hooks for tests of host code: calls of the runtime API, failing launches, a library without code for the device, and
// launches of which only some blocks run.
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

// After `calls` more calls of these functions one fails with cudaErrorInvalidValue; negative: none does. Launches and
// cudaGetLastError do not count.
void set_failing_call(int64_t calls);
// Counts the call as well.
bool call_fails(const char* function);

// After `launches` successful launches one fails with cudaErrorLaunchOutOfResources; negative: none does.
void set_failing_launch(int64_t launches);
bool launch_fails();

// The number of the stream that current_stream() returns; not 0, which is the default stream.
void set_current_stream(int64_t stream);

// Runs only so many first and last blocks of every launch; with 0, launches are only checked and counted. Results of
// the other blocks stay NaN. Negative: all run.
void set_blocks_at_ends(int64_t blocks);
bool block_runs(uint64_t index, uint64_t blocks);

// The architectures the library counts as built for, 80 for sm_80; empty: that of the emulated device.
void set_built_architectures(std::vector<int> architectures);
// Whether a library that is built for sm_90 counts as having code for sm_90a too; at first it does.
void set_built_for_sm90a(bool built);
// The built architecture whose code would run on a device: the newest of the same generation that is not newer than the
// device; 0 if there is none.
int code_architecture(int device_architecture);

}  // namespace segattn::emulator
