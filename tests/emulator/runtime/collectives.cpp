// __syncwarp, shuffles and votes: the last lane to arrive computes every lane's result.
#include <bit>

#include "counters.h"
#include "execution.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

template <class F>
void for_each_lane(unsigned lanes, F&& body) {
  for (; lanes != 0; lanes &= lanes - 1)
    body(std::countr_zero(lanes));
}

struct Shuffle {
  ShuffleKind kind;
  uint64_t value;
  int operand;
  int width;
  uint64_t result;
};

// PTX shfl: a source lane outside the segment of `width` lanes leaves the lane its own value.
int source_lane(const Shuffle& shuffle, int lane) {
  const int segment = lane & ~(shuffle.width - 1);
  const int last = segment + shuffle.width - 1;
  switch (shuffle.kind) {
    case ShuffleKind::kIndex:
      return segment + (shuffle.operand & (shuffle.width - 1));
    case ShuffleKind::kUp:
      return lane - shuffle.operand >= segment ? lane - shuffle.operand : lane;
    case ShuffleKind::kDown:
      return lane + shuffle.operand <= last ? lane + shuffle.operand : lane;
    case ShuffleKind::kXor:
      return (lane ^ shuffle.operand) <= last ? lane ^ shuffle.operand : lane;
  }
  return lane;
}

void run_shuffle(void* const* operands, unsigned lanes) {
  ++counters.shuffles;
  for_each_lane(lanes, [&](int lane) {
    auto& shuffle = *static_cast<Shuffle*>(operands[lane]);
    const int source = source_lane(shuffle, lane) & 31;
    // The value of a lane outside the mask is undefined: NaN, so that its use is visible.
    shuffle.result = lanes >> source & 1 ? static_cast<const Shuffle*>(operands[source])->value : ~uint64_t(0);
  });
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

struct Vote {
  VoteKind kind;
  bool predicate;
  unsigned result;
};

void run_vote(void* const* operands, unsigned lanes) {
  unsigned ballot = 0;
  for_each_lane(lanes, [&](int lane) { ballot |= unsigned(static_cast<Vote*>(operands[lane])->predicate) << lane; });
  for_each_lane(lanes, [&](int lane) {
    auto& vote = *static_cast<Vote*>(operands[lane]);
    vote.result = vote.kind == VoteKind::kBallot ? ballot : vote.kind == VoteKind::kAny ? ballot != 0 : ballot == lanes;
  });
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

void run_warp_barrier(void* const*, unsigned lanes) {
  ++counters.warp_barriers;
  if constexpr (kTrace)
    trace::warp_synchronized(self().warp, lanes);
}

const char* name_of(ShuffleKind kind) {
  constexpr const char* kNames[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  return kNames[int(kind)];
}
const char* name_of(VoteKind kind) {
  constexpr const char* kNames[] = {"__ballot_sync", "__any_sync", "__all_sync"};
  return kNames[int(kind)];
}

}  // namespace

void warp_barrier(unsigned mask, Site site) {
  // Since Volta, lanes may reach __syncwarp at different source locations.
  collective({"__syncwarp", false, false}, mask, site, nullptr, run_warp_barrier);
}

uint64_t shuffle(ShuffleKind kind, unsigned mask, uint64_t value, int operand, int width, Site site) {
  if (width < 1 || width > kWarpSize || !std::has_single_bit(unsigned(width))) {
    fail("%s (%s): width %d is no power of two up to 32", name_of(kind), describe(site).c_str(), width);
  }
  Shuffle mine{kind, value, operand, width, 0};
  collective({name_of(kind), true, false}, mask, site, &mine, run_shuffle);
  return mine.result;
}

unsigned vote(VoteKind kind, unsigned mask, bool predicate, Site site) {
  Vote mine{kind, predicate, 0};
  collective({name_of(kind), true, false}, mask, site, &mine, run_vote);
  return mine.result;
}

}  // namespace segattn::emulator
