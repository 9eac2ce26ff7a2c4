#include "group_barriers.h"

#include <algorithm>
#include <string>

#include "../include/emulator_sm90.h"
#include "counters.h"
#include "device.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

constexpr int kNamedBarriers = 16;

struct NamedBarrier {
  int threads = 0;  // to arrive until it completes
  int arrived = 0;
  Site site;                  // of the first arrival
  uint32_t warps = 0;         // of the block, that have arrived
  unsigned waiting[32] = {};  // by warp of the block, the lanes
  int64_t completed = 0;
  int object = -1;  // in traced builds, the synchronization object (trace.h), made at first use
};

struct ClusterBarrier {
  int arrived = 0;  // threads
  unsigned waiting[kMaxWarps] = {};
  int64_t completed = 0;
  int object = -1;
};

NamedBarrier named[kMaxBlocks][kNamedBarriers];
ClusterBarrier cluster;
bool used = false;  // by the running cluster

struct Arrival {
  int id;
  int threads;
  Site site;
  const char* operation;
  int64_t completed;  // generations of the barrier before this one
};

const char* name_of(bool waits) {
  return waits ? "bar.sync" : "bar.arrive";
}

std::string details_of_wait(const Thread& thread) {
  const auto& barrier = *static_cast<const NamedBarrier*>(thread.wait.object);
  const int id = int(&barrier - named[block_of(thread).rank]);
  return " for named barrier " + std::to_string(id) + ", where " + std::to_string(barrier.arrived) + " of " +
      std::to_string(barrier.threads) + " threads have arrived";
}

// Runs once for a warp.
void arrive(void* const* operands, unsigned) {
  const auto& arrival = *static_cast<const Arrival*>(operands[0]);
  const Block& block = block_of(self());
  NamedBarrier& barrier = named[block.rank][arrival.id];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    auto& other = *static_cast<Arrival*>(operands[lane]);
    if (other.id != arrival.id || other.threads != arrival.threads) {
      fail(
          "%s (%s): the lanes of a warp give barriers %d and %d, or %d and %d threads", arrival.operation,
          describe(arrival.site).c_str(), arrival.id, other.id, arrival.threads, other.threads);
    }
    other.completed = barrier.completed;
  }
  const int warp = self().warp - block.first_warp;
  if (barrier.arrived == 0) {
    barrier.threads = arrival.threads;
    barrier.site = arrival.site;
  } else if (barrier.threads != arrival.threads) {
    fail(
        "%s (%s): %d threads at named barrier %d, but %d at %s", arrival.operation, describe(arrival.site).c_str(),
        arrival.threads, arrival.id, barrier.threads, describe(barrier.site).c_str());
  }
  if (barrier.warps >> warp & 1) {
    fail(
        "%s (%s): warp %d arrives twice at named barrier %d, where %d of %d threads have arrived", arrival.operation,
        describe(arrival.site).c_str(), warp, arrival.id, barrier.arrived, barrier.threads);
  }
  if constexpr (kTrace) {
    if (barrier.object < 0)
      barrier.object = trace::add_object();
    for (int lane = 0; lane < kWarpSize; ++lane)
      trace::release(barrier.object, self().warp * kWarpSize + lane);
  }
  barrier.warps |= 1u << warp;
  barrier.arrived += kWarpSize;
  if (barrier.arrived < barrier.threads)
    return;
  barrier.arrived = 0;
  barrier.warps = 0;
  ++barrier.completed;
  if constexpr (kTrace)
    trace::complete(barrier.object);
  for (int w = 0; w < block.warp_count; ++w) {
    make_ready(block.first_warp + w, barrier.waiting[w]);
    barrier.waiting[w] = 0;
  }
}

void complete_cluster_barrier() {
  if constexpr (kTrace)
    trace::complete(cluster.object);
  cluster.arrived = 0;
  ++cluster.completed;
  for (int w = 0; w < warp_count(); ++w) {
    make_ready(w, cluster.waiting[w]);
    cluster.waiting[w] = 0;
  }
}

}  // namespace

void start_group_barriers() {
  if (!used)
    return;
  used = false;
  std::fill(&named[0][0], &named[0][0] + kMaxBlocks * kNamedBarriers, NamedBarrier{});
  cluster = ClusterBarrier{};
}

void named_barrier(int id, int threads, bool waits, Site site) {
  const char* operation = name_of(waits);
  Thread& thread = self();
  const Block& block = block_of(thread);
  if (id < 1 || id >= kNamedBarriers)
    fail("%s (%s): there is no named barrier %d; 1 to 15 are", operation, describe(site).c_str(), id);
  if (threads <= 0 || threads % kWarpSize != 0 || threads > block.warp_count * kWarpSize)
    fail("%s (%s): %d threads in a block of %d warps", operation, describe(site).c_str(), threads, block.warp_count);
  used = true;
  yield_sometimes();
  Arrival arrival{id, threads, site, operation, 0};
  collective({operation, true, true}, kFullMask, site, &arrival, arrive);
  NamedBarrier& barrier = named[block.rank][id];
  if (!waits)
    return;
  if (barrier.completed == arrival.completed) {
    barrier.waiting[thread.warp - block.first_warp] |= 1u << thread.lane;
    suspend(Wait{operation, site, 0, details_of_wait, &barrier});
  }
  if constexpr (kTrace)
    trace::acquire(barrier.object, thread.number);
}

uint32_t cluster_rank() {
  return uint32_t(block_of(self()).rank);
}

void leave_cluster_barrier() {
  if (cluster.arrived > 0 && cluster.arrived == alive_threads())
    complete_cluster_barrier();
}

void cluster_sync(Site site) {
  constexpr const char* kOperation = "barrier.cluster";
  if (device().architecture < 90)
    fail("%s (%s) needs sm_90", kOperation, describe(site).c_str());
  Thread& thread = self();
  used = true;
  // All lanes of a warp execute it together.
  collective({kOperation, true, true}, kFullMask, site, nullptr, nullptr);
  if constexpr (kTrace) {
    if (cluster.object < 0)
      cluster.object = trace::add_object();
    trace::release(cluster.object, thread.number);
  }
  if (++cluster.arrived == alive_threads()) {
    complete_cluster_barrier();
  } else {
    cluster.waiting[thread.warp] |= 1u << thread.lane;
    suspend(Wait{kOperation, site});
  }
  if constexpr (kTrace)
    trace::acquire(cluster.object, thread.number);
}

}  // namespace segattn::emulator
