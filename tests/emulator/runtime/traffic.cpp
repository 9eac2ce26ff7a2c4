#include "traffic.h"

#include <algorithm>
#include <bit>

#include "execution.h"

namespace segattn::emulator {
namespace {

constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;

bool is_global(Traffic kind) {
  return kind <= Traffic::kGlobalAsyncRead;
}

// Passes over the banks for these lanes' accesses: the most distinct words in one bank.
template <class Instruction>
int wavefronts(const Instruction& instruction, int first_lane, int lanes) {
  uintptr_t words[kBanks][kWarpSize];
  int count[kBanks] = {};
  int most = 0;
  for (int lane = first_lane; lane < first_lane + lanes; ++lane) {
    if ((instruction.lanes >> lane & 1) == 0)
      continue;
    const uintptr_t first = instruction.address[lane] / kBankBytes;
    const uintptr_t last = (instruction.address[lane] + instruction.bytes[lane] - 1) / kBankBytes;
    for (uintptr_t word = first; word <= last; ++word) {
      const int bank = int(word % kBanks);
      uintptr_t* end = words[bank] + count[bank];
      if (std::find(words[bank], end, word) != end)
        continue;  // one pass delivers a word to any number of lanes
      *end = word;
      most = std::max(most, ++count[bank]);
    }
  }
  return most;
}

template <class Instruction>
int sectors(const Instruction& instruction) {
  uintptr_t touched[2 * kWarpSize];
  int count = 0;
  bool ascending = true;
  for (unsigned lanes = instruction.lanes; lanes != 0; lanes &= lanes - 1) {
    const int lane = std::countr_zero(lanes);
    const uintptr_t first = instruction.address[lane] / kSectorBytes;
    const uintptr_t last = (instruction.address[lane] + instruction.bytes[lane] - 1) / kSectorBytes;
    for (uintptr_t sector = first; sector <= last; ++sector) {
      if (count > 0 && touched[count - 1] == sector)
        continue;
      ascending &= count == 0 || touched[count - 1] < sector;
      touched[count++] = sector;
    }
  }
  if (ascending)
    return count;
  std::sort(touched, touched + count);
  return int(std::unique(touched, touched + count) - touched);
}

}  // namespace

const char* name_of(Traffic kind) {
  constexpr const char* kNames[kTrafficKinds] = {"global_read",       "global_write", "global_async_read",
                                                 "shared_read",       "shared_write", "shared_async_write",
                                                 "shared_matrix_read"};
  return kNames[int(kind)];
}

void TrafficCounter::start_launch() {
  warps_.clear();
  warps_.resize(kMaxWarps);
}

TrafficCounter::LocationTraffic& TrafficCounter::find(Warp& warp, Traffic kind, const void* location) {
  const Key key{location, kind};
  const size_t slot = (KeyHash()(key) >> 20) % std::size(warp.recent);
  if (warp.recent_key[slot] == key && !warp.locations.empty())
    return warp.locations[warp.recent[slot]];
  const auto [found, is_new] = warp.index.try_emplace(key, uint32_t(warp.locations.size()));
  if (is_new)
    warp.locations.push_back(LocationTraffic{location, kind, {}, {}, {}});
  warp.recent_key[slot] = key;
  warp.recent[slot] = found->second;
  return warp.locations[found->second];
}

void TrafficCounter::access(
    Traffic kind, uintptr_t address, size_t bytes, int warp_index, int lane, const void* location) {
  Warp& warp = warps_[warp_index];
  LocationTraffic& at = find(warp, kind, location);
  const uint32_t occurrence = at.occurrences[lane]++;
  if (occurrence >= at.pending.size()) {
    if (at.pending.empty())
      warp.active.push_back(uint32_t(&at - warp.locations.data()));
    at.pending.emplace_back();
  }
  Instruction& instruction = at.pending[occurrence];
  instruction.lanes |= 1u << lane;
  instruction.address[lane] = address;
  instruction.bytes[lane] = uint8_t(bytes);
}

void TrafficCounter::flush(int warp_index) {
  Warp& warp = warps_[warp_index];
  for (const uint32_t index : warp.active) {
    LocationTraffic& traffic = warp.locations[index];
    for (const Instruction& instruction : traffic.pending)
      count(traffic.kind, instruction, traffic.total);
    traffic.pending.clear();
    std::fill(std::begin(traffic.occurrences), std::end(traffic.occurrences), 0u);
  }
  warp.active.clear();
}

void TrafficCounter::count(Traffic kind, const Instruction& instruction, InstructionCounters& total) {
  int widest = 0;
  ++total.instructions;
  for (unsigned lanes = instruction.lanes; lanes != 0; lanes &= lanes - 1) {
    const int bytes = instruction.bytes[std::countr_zero(lanes)];
    total.bytes += bytes;
    widest = std::max(widest, bytes);
  }
  if (is_global(kind)) {
    total.sectors += sectors(instruction);
    return;
  }
  // The hardware serves 128 bytes at a time: 32 lanes of up to 4 bytes, 16 of 8, 8 of 16.
  const int lanes_at_once = widest <= 4 ? kWarpSize : widest <= 8 ? kWarpSize / 2 : kWarpSize / 4;
  for (int lane = 0; lane < kWarpSize; lane += lanes_at_once) {
    const int needed = wavefronts(instruction, lane, lanes_at_once);
    total.wavefronts += needed;
    total.ideal_wavefronts += needed > 0;
  }
}

void TrafficCounter::add_to(LaunchCounters& counters) const {
  for (const Warp& warp : warps_) {
    for (const LocationTraffic& traffic : warp.locations) {
      counters.memory[name_of(traffic.kind)].add(traffic.total);
      counters.locations[{name_of(traffic.kind), traffic.location}].add(traffic.total);
    }
  }
}

}  // namespace segattn::emulator
