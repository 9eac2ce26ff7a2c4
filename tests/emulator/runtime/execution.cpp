// The scheduler: the threads of a block as fibers, block barriers, and warp operations.
#include "execution.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "block.h"
#include "counters.h"
#include "random.h"
#include "trace.h"

namespace segattn::emulator {

ThreadVariables* current = nullptr;
BlockVariables block;

namespace {

// Of 256 suspensions, so many switch to another warp although the current one could continue. Low, since staying in a
// warp keeps its stacks in cache; not zero, since every interleaving must be possible.
constexpr uint32_t kWarpChangesPer256 = 4;

struct State {
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int thread_count = 0;
  int warp_count = 0;
  int alive = 0;
  uint32_t ready_warps = 0;
  int last_warp = 0;
  Thread* upcoming = nullptr;
  Fiber host;
  Random random;
  const LaunchRequest* request = nullptr;
  std::string kernel_name;
  std::string failure;

  // __syncthreads
  int arrived = 0;
  int count = 0;
  Site barrier_site;
  BarrierReduction barrier_reduction = BarrierReduction::kNone;
  int barrier_result = 0;
};
State state;

const char* name_of(BarrierReduction reduction) {
  switch (reduction) {
    case BarrierReduction::kOr:
      return "__syncthreads_or";
    case BarrierReduction::kAnd:
      return "__syncthreads_and";
    case BarrierReduction::kCount:
      return "__syncthreads_count";
    default:
      return "__syncthreads";
  }
}

std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string format(const char* pattern, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  return text;
}

std::string where() {
  const uint3& b = block.block_index;
  return format("kernel %s, block (%u, %u, %u)", state.kernel_name.c_str(), b.x, b.y, b.z);
}

std::string describe(const Thread& thread) {
  if (thread.exited)
    return "left the kernel";
  const Wait& wait = thread.wait;
  if (wait.operation == nullptr)
    return "can run";
  std::string text = format("wait at %s (%s)", wait.operation, emulator::describe(wait.site).c_str());
  if (wait.mask != 0)
    text += format(" for lanes 0x%08x", wait.mask);
  return text;
}

// One line for each range of threads in the same state.
std::string describe_threads() {
  std::string text;
  for (int first = 0; first < state.thread_count;) {
    const std::string situation = describe(state.threads[first]);
    int last = first;
    while (last + 1 < state.thread_count && describe(state.threads[last + 1]) == situation)
      ++last;
    text += first == last ? format("\n  thread %d: %s", first, situation.c_str())
                          : format("\n  threads %d-%d: %s", first, last, situation.c_str());
    first = last + 1;
  }
  return text;
}

// Removes a random thread from those that are ready; null if none is.
Thread* choose() {
  if (state.ready_warps == 0)
    return nullptr;
  int w = state.last_warp;
  if (state.warps[w].ready == 0 || (state.random.next() & 255) < kWarpChangesPer256) {
    w = state.random.bit_of(state.ready_warps);
    state.last_warp = w;
  }
  Warp& warp = state.warps[w];
  const int lane = state.random.bit_of(warp.ready);
  warp.ready &= ~(1u << lane);
  if (warp.ready == 0)
    state.ready_warps &= ~(1u << w);
  return &state.threads[w * kWarpSize + lane];
}

// The next thread to run, or null if none can. The one after it is chosen too, so that the top of its stack can be
// prefetched: cache misses there are most of the cost of a switch.
Thread* pick() {
  Thread* next = state.upcoming != nullptr ? state.upcoming : choose();
  state.upcoming = choose();
  if (state.upcoming != nullptr) {
    const char* top = static_cast<const char*>(state.upcoming->fiber.stack_pointer);
    for (int line = 0; line < 8; ++line)
      __builtin_prefetch(top + 64 * line, 1);
  }
  return next;
}

inline void switch_away(Fiber& from, bool forever) {
  Thread* next = pick();
  current = next;
  switch_fiber(from, next != nullptr ? next->fiber : state.host, forever);
}

void complete_block_barrier() {
  state.arrived = 0;
  state.barrier_result = state.barrier_reduction == BarrierReduction::kAnd ? state.count == state.alive
      : state.barrier_reduction == BarrierReduction::kOr                   ? state.count != 0
                                                                           : state.count;
  for (int w = 0; w < state.warp_count; ++w) {
    make_ready(w, state.warps[w].at_block_barrier);
    state.warps[w].at_block_barrier = 0;
  }
  ++counters.block_barriers;
  if constexpr (kTrace)
    trace::block_synchronized();
}

// Completes the group if all its lanes still in the kernel have arrived. `runner` is the lane that continues without
// suspension, or -1.
bool try_complete(Warp& warp, int warp_index, size_t group_index, int runner);

void thread_exit() {
  Thread& thread = self();
  Warp& warp = state.warps[thread.warp];
  const unsigned bit = 1u << thread.lane;
  warp.alive &= ~bit;
  --state.alive;
  if (state.alive > 0 && state.arrived == state.alive)
    complete_block_barrier();
  for (size_t i = warp.groups.size(); i-- > 0;) {
    const WarpGroup& group = warp.groups[i];
    if ((group.mask & bit) == 0)
      continue;
    if (group.rules.every_lane) {
      fail(
          "lane %d leaves the kernel, but lanes 0x%08x wait at %s (%s), which needs all 32 lanes of the warp",
          int(thread.lane), group.arrived, group.rules.operation, emulator::describe(group.site).c_str());
    }
    try_complete(warp, thread.warp, i, -1);
  }
  thread.exited = true;
  switch_away(thread.fiber, true);
  __builtin_unreachable();
}

void thread_main() {
  fiber_started();
  state.request->run_thread(state.request->kernel, state.request->arguments);
  thread_exit();
}

bool try_complete(Warp& warp, int warp_index, size_t group_index, int runner) {
  WarpGroup& group = warp.groups[group_index];
  const unsigned lanes = group.mask & warp.alive;
  if ((group.arrived & lanes) != lanes)
    return false;
  const unsigned arrived = group.arrived;
  if (group.run != nullptr)
    group.run(warp.operands, arrived);
  warp.groups[group_index] = warp.groups.back();
  warp.groups.pop_back();
  make_ready(warp_index, runner >= 0 ? arrived & ~(1u << runner) : arrived);
  return true;
}

}  // namespace

std::string describe(const Site& site) {
  const char* file = std::strrchr(site.file_name(), '/');
  return format("%s:%u", file != nullptr ? file + 1 : site.file_name(), unsigned(site.line()));
}

bool same_location(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
      (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

int thread_count() {
  return state.thread_count;
}

void make_ready(int warp, unsigned lanes) {
  if (lanes == 0)
    return;
  state.warps[warp].ready |= lanes;
  state.ready_warps |= 1u << warp;
}

void suspend(const Wait& wait) {
  Thread& thread = self();
  thread.wait = wait;
  switch_away(thread.fiber, false);
  thread.wait.operation = nullptr;
}

void fail(const char* pattern, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, pattern);
  vsnprintf(text, sizeof text, pattern, arguments);
  va_end(arguments);
  if (current == nullptr)
    throw std::runtime_error(format("emulator: %s", text));
  const uint3& t = current->thread_index;
  state.failure =
      format("emulator: %s\n  in %s, thread %d (%u, %u, %u)", text, where().c_str(), int(self().index), t.x, t.y, t.z);
  Thread& thread = self();
  current = nullptr;
  switch_fiber(thread.fiber, state.host, true);
  __builtin_unreachable();
}

int block_barrier(BarrierReduction reduction, int predicate, Site site) {
  Thread& thread = self();
  if (state.arrived == 0) {
    state.barrier_site = site;
    state.barrier_reduction = reduction;
    state.count = 0;
  } else if (reduction != state.barrier_reduction || !same_location(site, state.barrier_site)) {
    fail(
        "divergent barrier: this thread is at %s (%s), but %d other threads wait at %s (%s)", name_of(reduction),
        describe(site).c_str(), state.arrived, name_of(state.barrier_reduction), describe(state.barrier_site).c_str());
  }
  state.count += predicate != 0;
  if (++state.arrived == state.alive) {
    complete_block_barrier();
  } else {
    state.warps[thread.warp].at_block_barrier |= 1u << thread.lane;
    suspend(Wait{name_of(reduction), site});
  }
  return state.barrier_result;
}

void collective(const CollectiveRules& rules, unsigned mask, Site site, void* operand, CollectiveFunction run) {
  Thread& thread = self();
  Warp& warp = state.warps[thread.warp];
  const unsigned bit = 1u << thread.lane;
  if ((mask & bit) == 0) {
    fail(
        "%s (%s): lane %d is not in its own mask 0x%08x", rules.operation, describe(site).c_str(), int(thread.lane),
        mask);
  }
  if (rules.every_lane && warp.alive != kFullMask) {
    fail(
        "%s (%s): needs all 32 lanes of the warp, but only lanes 0x%08x are left", rules.operation,
        describe(site).c_str(), warp.alive);
  }
  warp.operands[thread.lane] = operand;
  size_t index = 0;
  while (index < warp.groups.size() && warp.groups[index].mask != mask)
    ++index;
  if (index == warp.groups.size()) {
    warp.groups.push_back(WarpGroup{rules, mask, bit, site, run});
  } else {
    WarpGroup& group = warp.groups[index];
    if (group.rules.operation != rules.operation || (rules.same_site && !same_location(group.site, site))) {
      fail(
          "divergent warp operation: this lane is at %s (%s), but lanes 0x%08x wait at %s (%s)", rules.operation,
          describe(site).c_str(), group.arrived, group.rules.operation, describe(group.site).c_str());
    }
    group.arrived |= bit;
  }
  if (!try_complete(warp, thread.warp, index, thread.lane))
    suspend(Wait{rules.operation, site, mask});
}

void start_execution(const LaunchRequest& request, std::string kernel_name) {
  state.request = &request;
  state.kernel_name = std::move(kernel_name);
}

void run_block(uint64_t seed) {
  const dim3 size = block.block_size;
  state.thread_count = int(size.x * size.y * size.z);
  state.warp_count = (state.thread_count + kWarpSize - 1) / kWarpSize;
  state.alive = state.thread_count;
  state.arrived = 0;
  state.ready_warps = 0;
  state.upcoming = nullptr;
  state.random = Random(seed);
  state.failure.clear();
  for (int w = 0; w < state.warp_count; ++w) {
    const int lanes = std::min(kWarpSize, state.thread_count - w * kWarpSize);
    Warp& warp = state.warps[w];
    warp.alive = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
    warp.ready = 0;
    warp.at_block_barrier = 0;
    warp.groups.clear();
    make_ready(w, warp.alive);
  }
  for (int i = 0; i < state.thread_count; ++i) {
    Thread& thread = state.threads[i];
    thread.thread_index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.index = uint16_t(i);
    thread.lane = uint8_t(i % kWarpSize);
    thread.warp = uint8_t(i / kWarpSize);
    thread.exited = false;
    thread.wait = Wait{};
    thread.copies.clear();
    thread.copy_groups.clear();
    prepare_fiber(thread.fiber, i, thread_main);
  }
  state.last_warp = state.random.bit_of(state.ready_warps);
  switch_away(state.host, false);
  current = nullptr;
  if (!state.failure.empty())
    throw std::runtime_error(state.failure);
  if (state.alive > 0) {
    throw std::runtime_error(
        format("emulator: deadlock in %s: %d threads wait and none can run", where().c_str(), state.alive) +
        describe_threads());
  }
}

}  // namespace segattn::emulator
