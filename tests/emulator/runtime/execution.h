// The threads of a block as fibers, and the warp operations at which lanes meet. Internal to the runtime.
#pragma once

#include <bit>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "../include/launch_emulated.h"
#include "fiber.h"
#include "wgmma.h"

namespace segattn::emulator {

constexpr int kMaxBlocks = 8;  // of a cluster
constexpr int kMaxThreads = kMaxBlocks * 1024;
constexpr int kMaxWarps = kMaxThreads / kWarpSize;

struct AsyncCopy {
  void* shared;
  const void* global;
  int bytes;
  int source_bytes;
  Site site;
};

struct Thread;

// What a suspended thread waits for, for error messages.
struct Wait {
  const char* operation = nullptr;  // null: running or ready
  Site site;
  unsigned mask = 0;  // warp operations
  std::string (*details)(const Thread& thread) = nullptr;
  const void* object = nullptr;  // for details
};

struct Thread : ThreadVariables {
  Fiber fiber;
  uint16_t index = 0;   // in the block, x fastest
  uint16_t number = 0;  // in the cluster: 32 * warp + lane
  uint16_t warp = 0;    // in the cluster: those of a block follow each other
  uint8_t lane = 0;
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

// __syncthreads of a block.
struct BlockBarrier {
  int arrived = 0;
  int count = 0;
  Site site;
  BarrierReduction reduction = BarrierReduction::kNone;
  int result = 0;
};

struct Block : BlockVariables {
  int rank = 0;  // in the cluster
  int first_warp = 0;
  int warp_count = 0;
  int alive = 0;              // threads that have not left the kernel
  bool has_products = false;  // of warpgroups
  BlockBarrier barrier;
};

struct Warp {
  unsigned alive = 0;
  unsigned at_block_barrier = 0;
  std::vector<WarpGroup> groups;  // operations at which some lanes wait
  void* operands[kWarpSize] = {};
  WarpProducts products;
  WarpgroupLog warpgroup_log;  // in the first warp of a warpgroup
};

inline Thread& self() {
  return *static_cast<Thread*>(current);
}
inline Block& block_of(const Thread& thread) {
  return const_cast<Block&>(static_cast<const Block&>(*thread.block));
}
// The running cluster, one block unless the launch asks for more; its warps and threads by number.
int block_count();
Block& block_at(int rank);
int warp_count();
int alive_threads();
Warp& warp_at(int warp);
Thread& thread_at(int number);
// "block (1, 0, 0)", and "thread 3 of block (1, 0, 0)" where the cluster has several.
std::string name_of(const Block& block);
std::string name_of(const Thread& thread);

// Suspends the running thread until make_ready() names it.
void suspend(const Wait& wait);
void make_ready(int warp, unsigned lanes);
// Lets another thread run now and then, where an operation that need not wait would run on.
void yield_sometimes();

// Gives an operation to the asynchronous units of the device. It runs at a random moment from now on, at the latest
// when no thread can run.
void start_async(std::function<void()> operation);

// Joins the lanes of `mask` at one operation. The last one to arrive runs it for all; then all continue.
void collective(const CollectiveRules& rules, unsigned mask, Site site, void* operand, CollectiveFunction run);

// A Site as a pointer, a smaller key.
static_assert(sizeof(Site) == sizeof(const void*), "std::source_location is a pointer in libstdc++");
inline const void* location_of(const Site& site) {
  return std::bit_cast<const void*>(site);
}

// Fails unless the bytes lie in the block's shared memory, aligned to their count.
void check_shared(const char* operation, const void* address, int bytes, const Site& site);
void check_in_shared(const char* operation, const void* address, size_t bytes, const Site& site);
// "shared memory, byte 64"; `byte` counts through the blocks of the cluster (trace::Memory).
std::string name_of_shared(size_t byte);
// Whether the bytes may be accessed; known in AddressSanitizer builds only, true in others.
bool addressable(const void* address, size_t bytes);

bool same_location(const Site& a, const Site& b);
std::string describe(const Site& site);

}  // namespace segattn::emulator
