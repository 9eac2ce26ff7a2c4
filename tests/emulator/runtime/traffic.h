// Counts memory traffic by warp instructions, as the hardware executes it. Accesses of a warp's lanes belong to one
// instruction if they come from the same source location and are each lane's n-th access there since the lanes last
// met.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "../include/emulator.h"
#include "counters.h"

namespace segattn::emulator {

enum class Traffic : uint8_t {
  kGlobalRead,
  kGlobalWrite,
  kGlobalAsyncRead,
  kSharedRead,
  kSharedWrite,
  kSharedAsyncWrite,
  kSharedMatrixRead,
};
constexpr int kTrafficKinds = 7;
const char* name_of(Traffic kind);

class TrafficCounter {
 public:
  void start_launch();
  // `address`: in shared memory the offset from a multiple of 128 bytes.
  void access(Traffic kind, uintptr_t address, size_t bytes, int warp, int lane, const void* location);
  // Called when the lanes of the warp meet: later accesses belong to other instructions.
  void flush(int warp);
  void add_to(LaunchCounters& counters) const;

 private:
  struct Instruction {
    unsigned lanes = 0;
    uintptr_t address[kWarpSize];
    uint8_t bytes[kWarpSize];
  };
  // The accesses of one kind at one source location.
  struct LocationTraffic {
    const void* location;
    Traffic kind;
    uint32_t occurrences[kWarpSize] = {};
    std::vector<Instruction> pending;
    InstructionCounters total;
  };
  struct Key {
    const void* location;
    Traffic kind;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const { return size_t(key.location) * 0x9e3779b97f4a7c15u + size_t(key.kind); }
  };
  struct Warp {
    std::unordered_map<Key, uint32_t, KeyHash> index;
    std::vector<LocationTraffic> locations;
    std::vector<uint32_t> active;  // locations with pending instructions
    Key recent_key[64] = {};       // a direct-mapped cache of `index`
    uint32_t recent[64] = {};
  };

  LocationTraffic& find(Warp& warp, Traffic kind, const void* location);
  static void count(Traffic kind, const Instruction& instruction, InstructionCounters& total);

  std::vector<Warp> warps_;
};

}  // namespace segattn::emulator
