#include "trace.h"

#if defined(SEGATTN_EMULATOR_TRACE)

#include <stdexcept>
#include <utility>

#include "counters.h"
#include "execution.h"
#include "races.h"
#include "shared_contents.h"
#include "source_locations.h"
#include "traffic.h"

namespace segattn::emulator::trace {
namespace {

RaceDetector races;
SharedContents contents;
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

// The first unit of an access and their number. `position` is an offset in shared memory or an address.
std::pair<uintptr_t, size_t> units_of(uintptr_t position, size_t bytes) {
  constexpr uintptr_t kUnit = RaceDetector::kUnitBytes;
  const uintptr_t first = position / kUnit, last = (position + bytes - 1) / kUnit;
  return {first, last - first + 1};
}

void check_races(const void* address, ptrdiff_t offset, size_t bytes, bool write, const void* location) {
  const auto [first, units] = units_of(offset >= 0 ? uintptr_t(offset) : uintptr_t(address), bytes);
  races.access(
      offset >= 0 ? RaceDetector::Space::kShared : RaceDetector::Space::kGlobal, first, units, write, self().index,
      location);
}

void check_contents(Access kind, ptrdiff_t offset, size_t bytes, const void* location) {
  const auto [first, units] = units_of(uintptr_t(offset), bytes);
  if (kind == Access::kAsyncWrite) {
    contents.copy_started(first, units);
  } else if (kind == Access::kWrite) {
    contents.written(first, units);
  } else {
    contents.read(first, units, self().index, location);
  }
}

}  // namespace

void launch_started(const Memory& of_launch) {
  memory = of_launch;
  kernel_image = image_of(memory.kernel);
  runtime_image = image_of(&memory);
  const size_t shared_units = (static_offset() + memory.static_bytes) / RaceDetector::kUnitBytes + 1;
  races.start_launch(shared_units);
  contents.start_launch(shared_units);
  traffic.start_launch();
}

void block_started(int threads) {
  races.start_block(threads);
  contents.start_block();
}

void block_finished() {
  for (int warp = 0; warp * kWarpSize < thread_count(); ++warp)
    traffic.flush(warp);
}

void launch_finished(LaunchCounters& counters) {
  traffic.add_to(counters);
  if (races.reports().empty() && contents.reports().empty())
    return;
  std::string text = "emulator: unordered or empty memory in kernel " + counters.kernel;
  for (const auto* reports : {&races.reports(), &contents.reports()}) {
    for (const std::string& report : *reports)
      text += "\n  " + report;
  }
  throw std::runtime_error(text);
}

void access(Access kind, const void* address, size_t bytes, const void* location) {
  if (is_private(address))
    return;
  const Thread& thread = self();
  const ptrdiff_t offset = shared_offset(address);
  check_races(address, offset, bytes, is_write(kind), location);
  if (offset >= 0)
    check_contents(kind, offset, bytes, location);
  traffic.access(
      offset >= 0 ? shared_traffic(kind) : global_traffic(kind), offset >= 0 ? uintptr_t(offset) : uintptr_t(address),
      bytes, thread.warp, thread.lane, location);
}

void landed(const void* address, size_t bytes, const void* location) {
  const ptrdiff_t offset = shared_offset(address);
  check_races(address, offset, bytes, true, location);
  check_contents(Access::kWrite, offset, bytes, location);
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
