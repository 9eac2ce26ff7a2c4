#include "trace.h"

#if defined(SEGATTN_EMULATOR_TRACE)

#include <stdexcept>

#include "counters.h"
#include "execution.h"
#include "races.h"
#include "source_locations.h"
#include "traffic.h"

namespace segattn::emulator::trace {
namespace {

RaceDetector races;
TrafficCounter traffic;
Memory memory;
Image kernel_image;
Image runtime_image;

bool inside(const void* address, const void* begin, size_t bytes) {
  return uintptr_t(address) - uintptr_t(begin) < bytes;
}

// In the race detector's shared address space static arrays follow the dynamic memory, 128-byte aligned.
size_t static_offset() {
  return (memory.dynamic_bytes + 127) / 128 * 128;
}

// The offset in shared memory, or -1.
ptrdiff_t shared_offset(const void* address) {
  if (inside(address, memory.dynamic_shared, memory.dynamic_bytes)) {
    return static_cast<const char*>(address) - memory.dynamic_shared;
  }
  if (inside(address, memory.static_shared, memory.static_bytes)) {
    return ptrdiff_t(static_offset()) + (static_cast<const char*>(address) - memory.static_shared);
  }
  return -1;
}

// Thread-private memory on the stack, kernel parameters, constants, and the emulator's own variables.
bool is_private(const void* address) {
  return on_fiber_stack(address) || inside(address, memory.arguments, memory.argument_bytes) ||
      kernel_image.contains(address) || runtime_image.contains(address);
}

bool is_write(Access kind) {
  return kind == Access::kWrite || kind == Access::kAsyncWrite;
}

Traffic shared_traffic(Access kind) {
  switch (kind) {
    case Access::kMatrixRead:
      return Traffic::kSharedMatrixRead;
    case Access::kAsyncWrite:
      return Traffic::kSharedAsyncWrite;
    default:
      return is_write(kind) ? Traffic::kSharedWrite : Traffic::kSharedRead;
  }
}

Traffic global_traffic(Access kind) {
  return kind == Access::kAsyncRead ? Traffic::kGlobalAsyncRead
      : is_write(kind)              ? Traffic::kGlobalWrite
                                    : Traffic::kGlobalRead;
}

void check_races(const void* address, ptrdiff_t offset, size_t bytes, bool write, const void* location) {
  constexpr uintptr_t kUnit = RaceDetector::kUnitBytes;
  const uintptr_t position = offset >= 0 ? uintptr_t(offset) : uintptr_t(address);
  const uintptr_t first = position / kUnit, last = (position + bytes - 1) / kUnit;
  races.access(
      offset >= 0 ? RaceDetector::Space::kShared : RaceDetector::Space::kGlobal, first, last - first + 1, write,
      self().index, location);
}

}  // namespace

void launch_started(const Memory& of_launch) {
  memory = of_launch;
  kernel_image = image_of(memory.kernel);
  runtime_image = image_of(&memory);
  races.start_launch((static_offset() + memory.static_bytes) / RaceDetector::kUnitBytes + 1);
  traffic.start_launch();
}

void block_started(int threads) {
  races.start_block(threads);
}

void block_finished() {
  for (int warp = 0; warp * kWarpSize < thread_count(); ++warp)
    traffic.flush(warp);
}

void launch_finished(LaunchCounters& counters) {
  traffic.add_to(counters);
  if (races.reports().empty())
    return;
  std::string text = "emulator: data races in kernel " + counters.kernel;
  for (const std::string& race : races.reports())
    text += "\n  " + race;
  throw std::runtime_error(text);
}

void access(Access kind, const void* address, size_t bytes, const void* location) {
  if (is_private(address))
    return;
  const Thread& thread = self();
  const ptrdiff_t offset = shared_offset(address);
  check_races(address, offset, bytes, is_write(kind), location);
  traffic.access(
      offset >= 0 ? shared_traffic(kind) : global_traffic(kind), offset >= 0 ? uintptr_t(offset) : uintptr_t(address),
      bytes, thread.warp, thread.lane, location);
}

void landed(const void* address, size_t bytes, const void* location) {
  check_races(address, shared_offset(address), bytes, true, location);
}

void block_synchronized() {
  races.block_synchronized();
  block_finished();
}

void warp_synchronized(int warp, unsigned lanes) {
  races.warp_synchronized(warp, lanes);
  warp_converged(warp, lanes);
}

void warp_converged(int warp, unsigned lanes) {
  if (lanes == kFullMask)
    traffic.flush(warp);
}

}  // namespace segattn::emulator::trace

#endif  // SEGATTN_EMULATOR_TRACE
