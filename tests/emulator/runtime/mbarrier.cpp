#include "mbarrier.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "../include/emulator_sm90.h"
#include "counters.h"
#include "device.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

// PTX ISA, "mbarrier": the ranges of the pending count and of tx-count.
constexpr uint32_t kMaxCount = (1u << 20) - 1;
constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr int64_t kNeverWaited = -2;  // a producer's first wait is for phase -1

std::unordered_map<const void*, MemoryBarrier> barriers;

// What the 8 bytes of a barrier hold, so that other writes to them show.
uint64_t mark_of(const MemoryBarrier& barrier) {
  return 0x6d62617272696572u ^ uint64_t(uintptr_t(barrier.address)) * 0x9e3779b97f4a7c15u;
}

bool overwritten(const MemoryBarrier& barrier) {
  uint64_t held;
  std::memcpy(&held, barrier.address, sizeof held);
  return held != mark_of(barrier);
}

void need_sm90(const char* operation, const Site& site) {
  if (device().architecture < 90)
    fail("%s (%s) needs sm_90", operation, describe(site).c_str());
}

std::string progress(const MemoryBarrier& barrier) {
  return "phase " + std::to_string(barrier.phase) + ": " + std::to_string(barrier.pending) + " of " +
      std::to_string(barrier.count) + " arrivals and " + std::to_string(barrier.bytes) + " bytes are missing";
}

std::string details_of_wait(const Thread& thread) {
  const auto& barrier = *static_cast<const MemoryBarrier*>(thread.wait.object);
  return " for " + describe(barrier) + ", " + progress(barrier);
}

void complete_if_all_came(MemoryBarrier& barrier, const char* operation, const Site& site) {
  if (barrier.pending > 0)
    return;
  if (barrier.bytes < 0) {
    fail(
        "%s (%s): %lld bytes more than announced have come in phase %lld of %s", operation, describe(site).c_str(),
        (long long)-barrier.bytes, (long long)barrier.phase, describe(barrier).c_str());
  }
  if (barrier.bytes > 0)
    return;
  if constexpr (kTrace)
    trace::complete(barrier.object);
  ++barrier.phase;
  barrier.pending = barrier.count;
  for (const uint16_t number : barrier.waiting) {
    const Thread& thread = thread_at(number);
    make_ready(thread.warp, 1u << thread.lane);
  }
  barrier.waiting.clear();
}

void arrive(MemoryBarrier& barrier, uint32_t expected_bytes, const char* operation, const Site& site) {
  if (barrier.pending == 0) {
    fail(
        "%s (%s): more than %u arrivals in phase %lld of %s", operation, describe(site).c_str(), barrier.count,
        (long long)barrier.phase, describe(barrier).c_str());
  }
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBytes) {
    fail(
        "%s (%s): %lld bytes announced in phase %lld of %s, at most %lld can be", operation, describe(site).c_str(),
        (long long)barrier.bytes, (long long)barrier.phase, describe(barrier).c_str(), (long long)kMaxBytes);
  }
  if constexpr (kTrace)
    trace::release(barrier.object, self().number);
  --barrier.pending;
  complete_if_all_came(barrier, operation, site);
}

// The running thread sees that the phase has completed.
void observe(MemoryBarrier& barrier, int64_t phase) {
  barrier.observed[self().number] = phase;
  barrier.latest_observed = std::max(barrier.latest_observed, phase);
  if constexpr (kTrace)
    trace::acquire(barrier.object, self().number);
}

}  // namespace

void start_memory_barriers() {
  barriers.clear();
}

void check_memory_barriers(const Block& block) {
  for (const auto& [address, barrier] : barriers) {
    if (barrier.block == &block && barrier.latest_copied > barrier.latest_observed) {
      fail(
          "the last thread of the block leaves the kernel, but none has waited for the bulk copies in phase %lld of %s",
          (long long)barrier.latest_copied, describe(barrier).c_str());
    }
    if (barrier.block == &block && barrier.bytes != 0) {
      fail(
          "the last thread of the block leaves the kernel, but %s, %s", describe(barrier).c_str(),
          progress(barrier).c_str());
    }
  }
}

std::string describe(const MemoryBarrier& barrier) {
  const ptrdiff_t offset =
      static_cast<const char*>(barrier.address) - static_cast<const char*>(barrier.block->dynamic_shared);
  std::string text = "the barrier at byte " + std::to_string(offset);
  if (block_count() > 1)
    text += " of " + name_of(*barrier.block);
  return text + " (initialised at " + describe(barrier.site) + ")";
}

void* in_block(const void* shared, const Block& own, const Block& other) {
  return static_cast<char*>(other.dynamic_shared) +
      (static_cast<const char*>(shared) - static_cast<const char*>(own.dynamic_shared));
}

MemoryBarrier& memory_barrier(const Block& block, const void* address, const char* operation, const Site& site) {
  const auto found = barriers.find(address);
  if (found == barriers.end()) {
    fail(
        "%s (%s): byte %td of the shared memory of %s is no initialised barrier", operation, describe(site).c_str(),
        static_cast<const char*>(address) - static_cast<const char*>(block.dynamic_shared), name_of(block).c_str());
  }
  if (overwritten(found->second)) {
    fail("%s (%s): %s has been overwritten", operation, describe(site).c_str(), describe(found->second).c_str());
  }
  if constexpr (kTrace)
    trace::used(found->second.object, location_of(site));
  return found->second;
}

void complete_bytes(MemoryBarrier& barrier, int64_t phase, int64_t bytes, const Site& site) {
  constexpr const char* kOperation = "bulk copy";
  if (barrier.phase != phase) {
    fail(
        "%s (%s): its %lld bytes come after phase %lld of %s has completed without them", kOperation,
        describe(site).c_str(), (long long)bytes, (long long)phase, describe(barrier).c_str());
  }
  barrier.bytes -= bytes;
  if (barrier.bytes < -kMaxBytes) {
    fail(
        "%s (%s): more than %lld bytes have come before their announcement in phase %lld of %s", kOperation,
        describe(site).c_str(), (long long)kMaxBytes, (long long)phase, describe(barrier).c_str());
  }
  complete_if_all_came(barrier, kOperation, site);
}

void mbarrier_init(void* address, uint32_t count, Site site) {
  constexpr const char* kOperation = "mbarrier.init";
  need_sm90(kOperation, site);
  check_shared(kOperation, address, 8, site);
  if (count == 0 || count > kMaxCount)
    fail("%s (%s): a count of %u", kOperation, describe(site).c_str(), count);
  if (const auto used = barriers.find(address); used != barriers.end() && !overwritten(used->second))
    fail("%s (%s): %s is in use", kOperation, describe(site).c_str(), describe(used->second).c_str());
  const Thread& thread = self();
  MemoryBarrier barrier{address, &block_of(thread), count, count, 0, 0, false, thread.number, 0, site, {}, {}, -1, -1};
  if constexpr (kTrace) {
    barrier.object = trace::add_object("a bulk copy");
    trace::made(barrier.object, location_of(site));
  }
  const uint64_t mark = mark_of(barrier);
  std::memcpy(address, &mark, sizeof mark);
  barriers.insert_or_assign(address, std::move(barrier));
}

void fence_barrier_init() {
  for (auto& [address, barrier] : barriers) {
    if (barrier.initialiser == self().number)
      barrier.fenced = true;
  }
}

void mbarrier_arrive(void* address, uint32_t expected_bytes, const char* operation, Site site) {
  yield_sometimes();
  arrive(memory_barrier(block_of(self()), address, operation, site), expected_bytes, operation, site);
}

void mbarrier_arrive_at(void* address, uint32_t rank, Site site) {
  constexpr const char* kOperation = "mbarrier.arrive of another block";
  yield_sometimes();
  if (int(rank) >= block_count())
    fail("%s (%s): block %u of a cluster of %d", kOperation, describe(site).c_str(), rank, block_count());
  const Block &own = block_of(self()), &other = block_at(int(rank));
  check_in_shared(kOperation, address, 8, site);
  if (other.alive == 0)
    fail("%s (%s): %s has left the kernel", kOperation, describe(site).c_str(), name_of(other).c_str());
  MemoryBarrier& barrier = memory_barrier(other, in_block(address, own, other), kOperation, site);
  if (&own != &other && !barrier.fenced) {
    fail(
        "%s (%s): no fence_barrier_init has followed the initialisation of %s", kOperation, describe(site).c_str(),
        describe(barrier).c_str());
  }
  arrive(barrier, 0, kOperation, site);
}

void mbarrier_wait(void* address, uint32_t parity, Site site) {
  constexpr const char* kOperation = "mbarrier.try_wait";
  yield_sometimes();
  Thread& thread = self();
  MemoryBarrier& barrier = memory_barrier(block_of(thread), address, kOperation, site);
  if (parity > 1)
    fail("%s (%s): the parity %u is not 0 or 1", kOperation, describe(site).c_str(), parity);
  ++counters.mbarrier_waits;
  if (barrier.observed.size() <= thread.number)
    barrier.observed.resize(size_t(warp_count()) * kWarpSize, kNeverWaited);
  const int64_t last = barrier.observed[thread.number];
  // A thread that missed phases takes one for another of the same parity.
  if (last != kNeverWaited && int64_t((last + 1) & 1) == int64_t(parity) && barrier.phase >= last + 3) {
    fail(
        "%s (%s): after phase %lld this thread waits for phase %lld, but phase %lld of %s is under way: the parity is "
        "ambiguous",
        kOperation, describe(site).c_str(), (long long)last, (long long)(last + 1), (long long)barrier.phase,
        describe(barrier).c_str());
  }
  if (int64_t(barrier.phase & 1) != int64_t(parity))
    return observe(barrier, barrier.phase - 1);
  const int64_t phase = barrier.phase;
  barrier.waiting.push_back(thread.number);
  suspend(Wait{kOperation, site, 0, details_of_wait, &barrier});
  if (barrier.phase > phase + 1) {
    fail(
        "%s (%s): phase %lld of %s has completed too before this thread saw that phase %lld had: the parity is "
        "ambiguous",
        kOperation, describe(site).c_str(), (long long)(barrier.phase - 1), describe(barrier).c_str(),
        (long long)phase);
  }
  observe(barrier, phase);
}

}  // namespace segattn::emulator
