// The emulated device: its limits, the settings of the emulator, and launches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace segattn::emulator {

struct Device {
  int architecture;  // 10 * major + minor
  int multiprocessors;
  size_t shared_per_block_optin;
};

constexpr size_t kSharedWithoutOptin = 48 * 1024;

const Device& device();
// Throws std::invalid_argument for an unknown architecture. multiprocessors = 0: those of a common product.
void set_device(int architecture, int multiprocessors = 0);

uint64_t seed();
void set_seed(uint64_t seed);

// How mma rounds float32 sums: as tensor cores do (runtime/mma_sum.h), or each addition to nearest.
enum class MmaRounding { kTruncate, kNearest };
MmaRounding mma_rounding();
// "truncate" or "nearest"; throws std::invalid_argument for anything else.
void set_mma_rounding(const std::string& name);

// How the device's tensor cores split a contraction: `depth` elements are added at once, aligned to `fraction_bits`
// fraction bits below the largest exponent.
struct MmaBlocks {
  int depth;
  int fraction_bits;
};
// mma_depth: of the instruction, 16 for 16-bit elements, 8 for TF32
MmaBlocks mma_blocks(int mma_depth);

// What cudaGetLastError would return, in words; empty for none. Host code that leaves an error makes the next launch of
// anyone in the process fail.
std::string pending_error();

// Undoes cudaFuncSetAttribute, so that a test starts like a new process.
void reset_function_attributes();

}  // namespace segattn::emulator
