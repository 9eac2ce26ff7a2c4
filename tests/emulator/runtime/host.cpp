#include "host.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>

#include "../include/emulator.h"
#include "../include/runtime_api.h"
#include "device.h"

namespace segattn::emulator {
namespace {

std::mutex mutex;  // autograd calls from its own threads
std::map<std::string, int64_t> counted_calls;
int64_t launches_before_failure = -1;
int64_t calls_before_failure = -1;
int64_t blocks_at_ends = -1;
std::atomic<int64_t> stream_number = 1;
std::vector<int> built;
std::atomic<bool> has_sm90a{true};

}  // namespace

void count_call(const char* function) {
  const std::lock_guard lock(mutex);
  ++counted_calls[function];
}
std::map<std::string, int64_t> calls() {
  const std::lock_guard lock(mutex);
  return counted_calls;
}
void forget_calls() {
  const std::lock_guard lock(mutex);
  counted_calls.clear();
}

void set_failing_call(int64_t calls) {
  const std::lock_guard lock(mutex);
  calls_before_failure = calls;
}
bool call_fails(const char* function) {
  const std::lock_guard lock(mutex);
  ++counted_calls[function];
  return calls_before_failure >= 0 && calls_before_failure-- == 0;
}

void set_failing_launch(int64_t launches) {
  launches_before_failure = launches;
}
bool launch_fails() {
  return launches_before_failure >= 0 && launches_before_failure-- == 0;
}

void set_current_stream(int64_t stream) {
  stream_number = stream;
}
cudaStream_t current_stream() {
  return reinterpret_cast<cudaStream_t>(intptr_t(stream_number.load()));
}

void set_blocks_at_ends(int64_t blocks) {
  blocks_at_ends = blocks;
}
bool block_runs(uint64_t index, uint64_t blocks) {
  if (blocks_at_ends < 0)
    return true;
  return index < uint64_t(blocks_at_ends) || blocks - index <= uint64_t(blocks_at_ends);
}

void set_built_architectures(std::vector<int> architectures) {
  built = std::move(architectures);
}

std::vector<int> built_architectures() {
  return built.empty() ? std::vector<int>{device().architecture} : built;
}

void set_built_for_sm90a(bool built) {
  has_sm90a = built;
}

bool built_for_sm90a() {
  const std::vector<int> architectures = built_architectures();
  return has_sm90a && std::find(architectures.begin(), architectures.end(), 90) != architectures.end();
}

int code_architecture(int device_architecture) {
  int best = 0;
  for (const int architecture : built_architectures()) {
    if (architecture / 10 == device_architecture / 10 && architecture <= device_architecture) {
      best = std::max(best, architecture);
    }
  }
  return best;
}

}  // namespace segattn::emulator
