// The threads of a block as fibers, and the warp operations at which lanes meet. Internal to the runtime.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "../include/launch_emulated.h"
#include "fiber.h"

namespace segattn::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes;
  int source_bytes;
  Site site;
};

// What a suspended thread waits for, for error messages.
struct Wait {
  const char* operation = nullptr;  // null: running or ready
  Site site;
  unsigned mask = 0;  // warp operations
};

struct Thread : ThreadVariables {
  Fiber fiber;
  uint16_t index = 0;  // in the block, x fastest
  uint8_t lane = 0;
  uint8_t warp = 0;
  bool exited = false;
  Wait wait;
  std::vector<AsyncCopy> copies;    // in flight, oldest first
  std::vector<size_t> copy_groups;  // for each committed group, the number of copies up to its end
};

// Computes a warp operation from the operands of all lanes of `lanes`; those of other lanes are null.
using CollectiveFunction = void (*)(void* const* operands, unsigned lanes);

struct CollectiveRules {
  const char* operation;
  bool same_site;   // calls from different source locations are an error
  bool every_lane;  // all 32 lanes must exist and still be in the kernel
};

struct WarpGroup {
  CollectiveRules rules;
  unsigned mask;
  unsigned arrived;
  Site site;
  CollectiveFunction run;
};

struct Warp {
  unsigned alive = 0;
  unsigned ready = 0;
  unsigned at_block_barrier = 0;
  std::vector<WarpGroup> groups;  // operations at which some lanes wait
  void* operands[kWarpSize] = {};
};

inline Thread& self() {
  return *static_cast<Thread*>(current);
}
int thread_count();

// Suspends the running thread until make_ready() names it.
void suspend(const Wait& wait);
void make_ready(int warp, unsigned lanes);

// Joins the lanes of `mask` at one operation. The last one to arrive runs it for all; then all continue.
void collective(const CollectiveRules& rules, unsigned mask, Site site, void* operand, CollectiveFunction run);

// A Site as a pointer, a smaller key.
static_assert(sizeof(Site) == sizeof(const void*), "std::source_location is a pointer in libstdc++");
inline const void* location_of(const Site& site) {
  return std::bit_cast<const void*>(site);
}

// Fails unless the bytes lie in the block's shared memory, aligned to their count.
void check_shared(const char* operation, const void* address, int bytes, const Site& site);
// Whether the bytes may be accessed; known in AddressSanitizer builds only, true in others.
bool addressable(const void* address, size_t bytes);

bool same_location(const Site& a, const Site& b);
std::string describe(const Site& site);

}  // namespace segattn::emulator
