// The emulated device: its limits, the settings of the emulator, and launches.
#pragma once

#include <cstddef>
#include <cstdint>

namespace segattn::emulator {

struct Device {
  int architecture;  // 10 * major + minor
  int multiprocessors;
  size_t shared_per_block_optin;
  size_t shared_per_multiprocessor;
  int threads_per_multiprocessor;
  int blocks_per_multiprocessor;
};

constexpr size_t kSharedWithoutOptin = 48 * 1024;
constexpr size_t kReservedSharedPerBlock = 1024;

const Device& device();
// Throws std::invalid_argument for an architecture it does not know. multiprocessors = 0: that of a common product.
void set_device(int architecture, int multiprocessors = 0);

uint64_t seed();
void set_seed(uint64_t seed);

// Forgets what cudaFuncSetAttribute was asked for, so that a test starts as a fresh process does.
void reset_function_attributes();

}  // namespace segattn::emulator
