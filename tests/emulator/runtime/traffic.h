// Counts memory traffic as the hardware sees it: by warp instructions. Accesses of a warp's lanes belong to one
// instruction when they come from the same place and are, since the lanes last met, the same lane-wise occurrence of it.
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
  kSharedMatrixWrite,
};
constexpr int kTrafficKinds = 8;
const char* name_of(Traffic kind);

class TrafficCounter {
 public:
  void start_launch();
  // `address`: for shared memory the offset from a multiple of 128 bytes.
  void access(Traffic kind, uintptr_t address, size_t bytes, int warp, int lane, const void* place);
  // The lanes of the warp have met: what comes next belongs to other instructions.
  void flush(int warp);
  void add_to(LaunchCounters& counters) const;

 private:
  struct Instruction {
    unsigned lanes = 0;
    uintptr_t address[kWarpSize];
    uint8_t bytes[kWarpSize];
  };
  struct Place {
    const void* place;
    Traffic kind;
    uint32_t occurrences[kWarpSize] = {};
    std::vector<Instruction> pending;
    InstructionCounters total;
  };
  struct Key {
    const void* place;
    Traffic kind;
    bool operator==(const Key&) const = default;
  };
  struct KeyHash {
    size_t operator()(const Key& key) const { return size_t(key.place) * 0x9e3779b97f4a7c15u + size_t(key.kind); }
  };
  struct Warp {
    std::unordered_map<Key, uint32_t, KeyHash> index;
    std::vector<Place> places;
    std::vector<uint32_t> active;  // places with pending instructions
    Key recent_key[64] = {};       // a small cache over `index`
    uint32_t recent[64] = {};
  };

  Place& find(Warp& warp, Traffic kind, const void* place);
  static void count(Traffic kind, const Instruction& instruction, InstructionCounters& total);

  std::vector<Warp> warps_;
};

}  // namespace segattn::emulator
