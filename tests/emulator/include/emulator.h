// The interface between emulated device code and the runtime. Kernels do not include it directly, but through the
// stand-ins <cuda_runtime.h> and "emulated_ptx.h". The runtime (tests/emulator/runtime) is not instrumented.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <vector>

#include "vector_types.h"

namespace segattn::emulator {

// The source location of a synchronizing call. A return address is not enough: the compiler may duplicate a call.
using Site = std::source_location;

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// The running thread's built-in variables. `current` is null while host code runs.
struct BlockVariables {
  uint3 block_index;
  dim3 block_size;
  dim3 grid_size;
  void* dynamic_shared;
};
struct ThreadVariables {
  uint3 thread_index;
  const BlockVariables* block;
};
extern ThreadVariables* current;

// Ends the launch with a RuntimeError that names kernel, block and thread; from host code it throws at once.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- barriers -------------------------------------------------------------------------------------------------
enum class BarrierReduction { kNone, kOr, kAnd, kCount };
int block_barrier(BarrierReduction reduction, int predicate, Site site);

// ---- warp collectives -----------------------------------------------------------------------------------------
void warp_barrier(unsigned mask, Site site);

enum class ShuffleKind { kIndex, kUp, kDown, kXor };
uint64_t shuffle(ShuffleKind kind, unsigned mask, uint64_t value, int operand, int width, Site site);

enum class VoteKind { kBallot, kAny, kAll };
unsigned vote(VoteKind kind, unsigned mask, bool predicate, Site site);

enum class MmaType { kFloat16, kBfloat16, kTf32 };
// d (4 floats per lane) += a (4 registers) * b (2 registers); m16n8k16, or m16n8k8 for tf32.
void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Site site);

// Four 8x8 matrices of 16-bit elements; `row` is the shared-memory row whose address this lane gives.
void load_matrices(uint32_t* registers, const void* row, bool transposed, Site site);

// ---- asynchronous copies --------------------------------------------------------------------------------------
void async_copy(void* shared, const void* global, int bytes, int source_bytes, Site site);
void async_commit();
void async_wait(int groups_left);

// ---- counters -------------------------------------------------------------------------------------------------
void count_fma(int operations);

// ---- the library ----------------------------------------------------------------------------------------------
// The architectures the library counts as built for (nvcc's __CUDA_ARCH_LIST__, but 80 for sm_80).
std::vector<int> built_architectures();
bool built_for_sm90a();

// ---- memory ---------------------------------------------------------------------------------------------------
// Fills memory with 0xff: NaN in float16, bfloat16, float32 and float64, -1 in integers.
void poison(void* memory, size_t bytes);

}  // namespace segattn::emulator
