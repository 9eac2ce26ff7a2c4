// The scheduler: the threads of a block as fibers, block barriers, and warp operations.
#include "execution.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <utility>

#include "block.h"
#include "counters.h"
#include "group_barriers.h"
#include "mbarrier.h"
#include "random.h"
#include "register_budget.h"
#include "trace.h"

namespace segattn::emulator {

ThreadVariables* current = nullptr;

namespace {

// Of 256 suspensions, so many switch to another warp although the current one could continue. Low, since staying in a
// warp keeps its stacks in cache; not zero, since every interleaving must be possible.
constexpr uint32_t kWarpChangesPer256 = 4;

// Of 256 switches, so many run an asynchronous operation if one is under way: a cluster has one of these rates. With 0,
// operations run when no thread can.
constexpr uint32_t kAsyncPer256[] = {0, 4, 24, 256};

// Of 256 operations that may let another thread run, so many do.
constexpr uint32_t kYieldsPer256 = 32;

constexpr int kWordBits = 32;

struct State {
  Block blocks[kMaxBlocks];
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int block_count = 0;
  int warp_count = 0;
  int alive = 0;
  uint32_t ready_lanes[kMaxWarps] = {};  // of each warp
  uint32_t ready_warps[kMaxWarps / kWordBits] = {};
  uint32_t ready_words = 0;  // those of ready_warps that are not 0
  int last_warp = 0;
  Thread* upcoming = nullptr;
  Fiber host;
  Random random;
  const LaunchRequest* request = nullptr;
  std::string kernel_name;
  std::string failure;
  std::vector<std::function<void()>> async_operations;
  uint32_t async_per_256 = 0;
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

std::string where(const Block& block) {
  return "kernel " + state.kernel_name + ", " + name_of(block);
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
  if (wait.details != nullptr)
    text += wait.details(thread);
  return text;
}

// One line for each range of threads in the same state.
std::string describe_threads(const Block& block) {
  const Thread* threads = &state.threads[block.first_warp * kWarpSize];
  const int count = int(block.block_size.x * block.block_size.y * block.block_size.z);
  const std::string of_block = state.block_count > 1 ? " of " + name_of(block) : "";
  std::string text;
  for (int first = 0; first < count;) {
    const std::string situation = describe(threads[first]);
    int last = first;
    while (last + 1 < count && describe(threads[last + 1]) == situation)
      ++last;
    text += first == last ? format("\n  thread %d", first) : format("\n  threads %d-%d", first, last);
    text += of_block + ": " + situation;
    first = last + 1;
  }
  return text;
}

// Removes a random thread from those that are ready; null if none is.
Thread* choose() {
  if (state.ready_words == 0)
    return nullptr;
  int w = state.last_warp;
  if (state.ready_lanes[w] == 0 || (state.random.next() & 255) < kWarpChangesPer256) {
    const int word = state.ready_words == 1 ? 0 : state.random.bit_of(state.ready_words);
    w = word * kWordBits + state.random.bit_of(state.ready_warps[word]);
    state.last_warp = w;
  }
  uint32_t& ready = state.ready_lanes[w];
  const int lane = state.random.bit_of(ready);
  ready &= ~(1u << lane);
  if (ready == 0) {
    uint32_t& word = state.ready_warps[w / kWordBits];
    word &= ~(1u << w % kWordBits);
    if (word == 0)
      state.ready_words &= ~(1u << w / kWordBits);
  }
  return &state.threads[w * kWarpSize + lane];
}

void run_async_operation() {
  const size_t chosen = size_t(uint64_t(state.random.next()) * state.async_operations.size() >> 32);
  std::function<void()> operation = std::move(state.async_operations[chosen]);
  state.async_operations.erase(state.async_operations.begin() + ptrdiff_t(chosen));
  operation();
}

// The next thread to run, or null if none can. The one after it is chosen too, so that the top of its stack can be
// prefetched: cache misses there are most of the cost of a switch.
Thread* pick() {
  if (!state.async_operations.empty() && (state.random.next() & 255) < state.async_per_256)
    run_async_operation();
  Thread* next = state.upcoming != nullptr ? state.upcoming : choose();
  while (next == nullptr && !state.async_operations.empty()) {
    run_async_operation();
    next = choose();
  }
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
  if (next != nullptr && &next->fiber == &from)  // it is ready again: a bulk copy has landed, or it only yielded
    return;
  switch_fiber(from, next != nullptr ? next->fiber : state.host, forever);
}

void complete_block_barrier(Block& block) {
  BlockBarrier& barrier = block.barrier;
  barrier.arrived = 0;
  barrier.result = barrier.reduction == BarrierReduction::kAnd ? barrier.count == block.alive
      : barrier.reduction == BarrierReduction::kOr             ? barrier.count != 0
                                                               : barrier.count;
  for (int w = block.first_warp; w < block.first_warp + block.warp_count; ++w) {
    make_ready(w, state.warps[w].at_block_barrier);
    state.warps[w].at_block_barrier = 0;
  }
  ++counters.block_barriers;
  if constexpr (kTrace)
    trace::block_synchronized(block);
}

// Completes the group if all its lanes still in the kernel have arrived. `runner` is the lane that continues without
// suspension, or -1.
bool try_complete(Warp& warp, int warp_index, size_t group_index, int runner);

void thread_exit() {
  Thread& thread = self();
  Warp& warp = state.warps[thread.warp];
  const unsigned bit = 1u << thread.lane;
  Block& block = block_of(thread);
  if (block.has_products)
    check_products_finished();
  warp.alive &= ~bit;
  --state.alive;
  if (--block.alive > 0 && block.barrier.arrived == block.alive)
    complete_block_barrier(block);
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
  leave_cluster_barrier();
  if (block.alive == 0) {
    check_register_budgets(block);
    check_memory_barriers(block);
  }
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

int block_count() {
  return state.block_count;
}
Block& block_at(int rank) {
  return state.blocks[rank];
}
int warp_count() {
  return state.warp_count;
}
int alive_threads() {
  return state.alive;
}
Thread& thread_at(int number) {
  return state.threads[number];
}

std::string name_of(const Block& block) {
  const uint3& b = block.block_index;
  return format("block (%u, %u, %u)", b.x, b.y, b.z);
}
std::string name_of(const Thread& thread) {
  const std::string name = format("thread %d", int(thread.index));
  return state.block_count > 1 ? name + " of " + name_of(block_of(thread)) : name;
}

Warp& warp_at(int warp) {
  return state.warps[warp];
}

void make_ready(int warp, unsigned lanes) {
  if (lanes == 0)
    return;
  state.ready_lanes[warp] |= lanes;
  state.ready_warps[warp / kWordBits] |= 1u << warp % kWordBits;
  state.ready_words |= 1u << warp / kWordBits;
}

void start_async(std::function<void()> operation) {
  state.async_operations.push_back(std::move(operation));
}

void suspend(const Wait& wait) {
  Thread& thread = self();
  thread.wait = wait;
  switch_away(thread.fiber, false);
  thread.wait.operation = nullptr;
}

void yield_sometimes() {
  if ((state.random.next() & 255) >= kYieldsPer256)
    return;
  Thread& thread = self();
  make_ready(thread.warp, 1u << thread.lane);
  switch_away(thread.fiber, false);
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
  Thread& thread = self();
  state.failure = format(
      "emulator: %s\n  in %s, thread %d (%u, %u, %u)", text, where(block_of(thread)).c_str(), int(thread.index), t.x,
      t.y, t.z);
  current = nullptr;
  switch_fiber(thread.fiber, state.host, true);
  __builtin_unreachable();
}

int block_barrier(BarrierReduction reduction, int predicate, Site site) {
  Thread& thread = self();
  Block& block = block_of(thread);
  BlockBarrier& barrier = block.barrier;
  if (barrier.arrived == 0) {
    barrier.site = site;
    barrier.reduction = reduction;
    barrier.count = 0;
  } else if (reduction != barrier.reduction || !same_location(site, barrier.site)) {
    fail(
        "divergent barrier: this thread is at %s (%s), but %d other threads wait at %s (%s)", name_of(reduction),
        describe(site).c_str(), barrier.arrived, name_of(barrier.reduction), describe(barrier.site).c_str());
  }
  barrier.count += predicate != 0;
  if (++barrier.arrived == block.alive) {
    complete_block_barrier(block);
  } else {
    state.warps[thread.warp].at_block_barrier |= 1u << thread.lane;
    suspend(Wait{name_of(reduction), site});
  }
  return barrier.result;
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

namespace {

void prepare_block(Block& block, int rank, int first_warp) {
  const dim3 size = block.block_size;
  const int threads = int(size.x * size.y * size.z);
  block.rank = rank;
  block.first_warp = first_warp;
  block.warp_count = (threads + kWarpSize - 1) / kWarpSize;
  block.alive = threads;
  block.has_products = false;
  block.barrier = BlockBarrier{};
  for (int w = 0; w < block.warp_count; ++w) {
    const int lanes = std::min(kWarpSize, threads - w * kWarpSize);
    Warp& warp = state.warps[first_warp + w];
    warp.alive = lanes == kWarpSize ? kFullMask : (1u << lanes) - 1;
    state.ready_lanes[first_warp + w] = 0;
    warp.at_block_barrier = 0;
    warp.groups.clear();
    // Most kernels use neither, and deques allocate when they are made.
    if (warp.products.fenced)
      warp.products = {};
    if (warp.warpgroup_log.first > 0 || !warp.warpgroup_log.entries.empty())
      warp.warpgroup_log = {};
    make_ready(first_warp + w, warp.alive);
  }
  for (int i = 0; i < threads; ++i) {
    Thread& thread = state.threads[first_warp * kWarpSize + i];
    thread.thread_index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.block = &block;
    thread.index = uint16_t(i);
    thread.number = uint16_t(first_warp * kWarpSize + i);
    thread.lane = uint8_t(i % kWarpSize);
    thread.warp = uint16_t(first_warp + i / kWarpSize);
    thread.exited = false;
    thread.wait = Wait{};
    thread.copies.clear();
    thread.copy_groups.clear();
    prepare_fiber(thread.fiber, rank * threads + i, thread_main);
  }
}

// A fault may have its cause in one that is only reported at the end of a launch.
std::string earlier_reports() {
  if constexpr (kTrace) {
    if (const std::string found = trace::reports(); !found.empty())
      return "\n  before it, unordered or empty memory:" + found;
  }
  return "";
}

}  // namespace

void run_cluster(const BlockVariables* blocks, int count, uint64_t seed) {
  state.block_count = count;
  state.warp_count = 0;
  state.alive = 0;
  std::fill(std::begin(state.ready_warps), std::end(state.ready_warps), 0u);
  state.ready_words = 0;
  state.upcoming = nullptr;
  state.async_operations.clear();
  // Not from the schedule's generator, so that kernels without such operations keep their schedules.
  state.async_per_256 = kAsyncPer256[Random(~seed).next() % std::size(kAsyncPer256)];
  state.random = Random(seed);
  state.failure.clear();
  for (int rank = 0; rank < count; ++rank) {
    Block& block = state.blocks[rank];
    static_cast<BlockVariables&>(block) = blocks[rank];
    // Warpgroups start at multiples of 4.
    for (; state.warp_count % 4 != 0; ++state.warp_count)
      state.warps[state.warp_count].alive = 0;
    prepare_block(block, rank, state.warp_count);
    state.warp_count += block.warp_count;
    state.alive += block.alive;
  }
  start_memory_barriers();
  start_group_barriers();
  start_register_budgets();
  if constexpr (kTrace)
    trace::block_started(state.warp_count * kWarpSize);
  state.last_warp = state.random.bit_of(state.ready_warps[0]);
  switch_away(state.host, false);
  current = nullptr;
  if (!state.failure.empty())
    throw std::runtime_error(state.failure + earlier_reports());
  if (state.alive > 0) {
    std::string text =
        "emulator: deadlock in " + where(state.blocks[0]) + format(": %d threads wait and none can run", state.alive);
    for (int rank = 0; rank < count; ++rank)
      text += describe_threads(state.blocks[rank]);
    throw std::runtime_error(text + earlier_reports());
  }
}

}  // namespace segattn::emulator
