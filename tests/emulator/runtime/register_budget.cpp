// setmaxnreg. A thread starts with the most registers that its block's size allows, as with __launch_bounds__: 65,536
// divided by the threads, rounded down to a multiple of 8.
#include "register_budget.h"

#include <algorithm>
#include <vector>

#include "../include/emulator_sm90.h"
#include "device.h"

namespace segattn::emulator {
namespace {

constexpr int kRegisterFile = 65536;
constexpr int kMaxRegisters = 255;
constexpr int kWarpsPerGroup = 4;

struct Change {
  int registers;
  bool increases;
  Site site;
};

struct Budget {
  int free = 0;
  std::vector<int> of_warp;               // registers a thread
  std::vector<std::vector<Change>> done;  // by warp
  std::vector<unsigned> waiting;          // by warp, the lanes that wait for registers
};

Budget budgets[kMaxBlocks];

const char* name_of(bool increases) {
  return increases ? "setmaxnreg.inc" : "setmaxnreg.dec";
}

std::string details_of_wait(const Thread& thread) {
  const Block& block = block_of(thread);
  const Budget& budget = budgets[block.rank];
  const int warp = thread.warp - block.first_warp;
  const int wanted = static_cast<const Change*>(thread.wait.object)->registers;
  return " for " + std::to_string(wanted) +
      " registers a thread: " + std::to_string(kWarpSize * (wanted - budget.of_warp[warp])) +
      " more for the warp, of " + std::to_string(budget.free) + " free";
}

void compare(const Change& a, const Change& b, int warpgroup) {
  if (a.registers == b.registers && a.increases == b.increases && same_location(a.site, b.site))
    return;
  fail(
      "the warps of warpgroup %d execute different setmaxnreg: %s to %d (%s) and %s to %d (%s)", warpgroup,
      name_of(a.increases), a.registers, describe(a.site).c_str(), name_of(b.increases), b.registers,
      describe(b.site).c_str());
}

void record(Budget& budget, int warp, const Change& change) {
  std::vector<Change>& mine = budget.done[warp];
  const size_t position = mine.size();
  mine.push_back(change);
  const int first = warp / kWarpsPerGroup * kWarpsPerGroup;
  for (int w = first; w < first + kWarpsPerGroup; ++w) {
    if (budget.done[w].size() > position)
      compare(budget.done[w][position], change, warp / kWarpsPerGroup);
  }
}

// The budget of a block, which starts at its first setmaxnreg.
Budget& budget_of(const Block& block) {
  Budget& budget = budgets[block.rank];
  if (!budget.of_warp.empty())
    return budget;
  const int threads = block.warp_count * kWarpSize;
  const int registers = std::min(kRegisterFile / threads / 8 * 8, kMaxRegisters);
  budget.free = kRegisterFile - threads * registers;
  budget.of_warp.assign(size_t(block.warp_count), registers);
  budget.done.assign(size_t(block.warp_count), {});
  budget.waiting.assign(size_t(block.warp_count), 0);
  return budget;
}

// Runs once for a warp.
void begin(void* const* operands, unsigned) {
  const auto& change = *static_cast<const Change*>(operands[0]);
  const Block& block = block_of(self());
  Budget& budget = budget_of(block);
  const int warp = self().warp - block.first_warp;
  const int now = budget.of_warp[warp];
  if (change.increases ? change.registers < now : change.registers > now) {
    fail(
        "%s (%s): to %d registers, but the warp has %d", name_of(change.increases), describe(change.site).c_str(),
        change.registers, now);
  }
  record(budget, warp, change);
  if (change.increases)
    return;
  budget.of_warp[warp] = change.registers;
  budget.free += kWarpSize * (now - change.registers);
  for (int w = 0; w < block.warp_count; ++w) {
    make_ready(block.first_warp + w, budget.waiting[w]);
    budget.waiting[w] = 0;
  }
}

}  // namespace

void start_register_budgets() {
  for (int rank = 0; rank < block_count(); ++rank)
    budgets[rank].of_warp.clear();
}

void check_register_budgets(const Block& block) {
  const Budget& budget = budgets[block.rank];
  if (budget.of_warp.empty())
    return;
  for (int w = 0; w + kWarpsPerGroup <= block.warp_count; w += kWarpsPerGroup) {
    for (int other = w + 1; other < w + kWarpsPerGroup; ++other) {
      if (budget.done[w].size() != budget.done[other].size()) {
        const auto& longer = budget.done[w].size() > budget.done[other].size() ? budget.done[w] : budget.done[other];
        fail(
            "setmaxnreg (%s) is not executed by all four warps of warpgroup %d", describe(longer.back().site).c_str(),
            w / kWarpsPerGroup);
      }
    }
  }
}

void change_registers(int registers, bool increases, Site site) {
  const char* operation = name_of(increases);
  if (device().architecture < 90)
    fail("%s (%s) needs sm_90", operation, describe(site).c_str());
  Thread& thread = self();
  const Block& block = block_of(thread);
  const int warp = thread.warp - block.first_warp;
  if (warp / kWarpsPerGroup * kWarpsPerGroup + kWarpsPerGroup > block.warp_count)
    fail("%s (%s): the block ends within the warpgroup", operation, describe(site).c_str());
  Change change{registers, increases, site};
  collective({operation, true, true}, kFullMask, site, &change, begin);
  if (!increases)
    return;
  Budget& budget = budget_of(block);
  for (;;) {
    const int needed = kWarpSize * (registers - budget.of_warp[warp]);
    if (needed <= budget.free) {  // 0 for all lanes but the first that runs
      budget.free -= needed;
      budget.of_warp[warp] = registers;
      return;
    }
    budget.waiting[warp] |= 1u << thread.lane;
    suspend(Wait{operation, site, 0, details_of_wait, &change});
  }
}

}  // namespace segattn::emulator
