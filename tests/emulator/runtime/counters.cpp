#include "counters.h"

#include "../include/emulator.h"

namespace segattn::emulator {

LaunchCounters counters;

namespace {
std::mutex mutex;
std::vector<LaunchCounters> launches;
// Bounds the memory of a long test session that never calls reset().
constexpr size_t kMaxRemembered = 4096;
}  // namespace

void count_fma(int operations) {
  counters.fma_operations += operations;
}

void remember(LaunchCounters finished) {
  const std::lock_guard lock(mutex);
  if (launches.size() >= kMaxRemembered)
    launches.erase(launches.begin(), launches.begin() + kMaxRemembered / 2);
  launches.push_back(std::move(finished));
}

std::vector<LaunchCounters> finished_launches() {
  const std::lock_guard lock(mutex);
  return launches;
}

void forget_launches() {
  const std::lock_guard lock(mutex);
  launches.clear();
}

}  // namespace segattn::emulator
