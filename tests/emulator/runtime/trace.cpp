#include "trace.h"

#if defined(SEGATTN_EMULATOR_TRACE)

#include <stdexcept>
#include <utility>

#include "async_accesses.h"
#include "counters.h"
#include "execution.h"
#include "races.h"
#include "register_accesses.h"
#include "shared_contents.h"
#include "source_locations.h"
#include "traffic.h"

namespace segattn::emulator::trace {
namespace {

RaceDetector races;
SharedContents contents;
AsyncAccesses async_accesses;
RegisterAccesses registers;
TrafficCounter traffic;
Memory memory;
size_t dynamic_bytes = 0;  // of all blocks of the cluster
Image kernel_image;
Image runtime_image;

bool inside(const void* address, const void* begin, size_t bytes) {
  return uintptr_t(address) - uintptr_t(begin) < bytes;
}

// In the race detector's shared address space static arrays follow the dynamic memory, 128-byte aligned.
size_t static_offset() {
  return (dynamic_bytes + 127) / 128 * 128;
}

// The offset in shared memory, or -1.
ptrdiff_t shared_offset(const void* address) {
  if (inside(address, memory.dynamic_shared, dynamic_bytes)) {
    return static_cast<const char*>(address) - memory.dynamic_shared;
  }
  if (inside(address, memory.static_shared, memory.static_bytes)) {
    if (memory.blocks > 1)
      fail("static shared memory in a cluster, whose blocks would share it in the emulator");
    return ptrdiff_t(static_offset()) + (static_cast<const char*>(address) - memory.static_shared);
  }
  return -1;
}

// Kernel parameters, constants, and the emulator's own variables.
bool is_private(const void* address) {
  return inside(address, memory.arguments, memory.argument_bytes) || kernel_image.contains(address) ||
      runtime_image.contains(address);
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
      offset >= 0 ? RaceDetector::Space::kShared : RaceDetector::Space::kGlobal, first, units, write, self().number,
      location);
}

void check_contents(Access kind, ptrdiff_t offset, size_t bytes, const void* location) {
  const auto [first, units] = units_of(uintptr_t(offset), bytes);
  if (kind == Access::kAsyncWrite) {
    contents.copy_started(first, units);
  } else if (kind == Access::kWrite) {
    contents.written(first, units);
  } else {
    contents.read(first, units, self(), location);
  }
}

void fail_if(const std::string& fault) {
  if (!fault.empty())
    fail("%s", fault.c_str());
}

void start_async_access(bool write, const void* shared, size_t bytes, const AsyncAccesses::Instruction& instruction) {
  const auto ordered = [](int other, RaceDetector::Time time) {
    return races.happened_before(self().number, other, time);
  };
  fail_if(async_accesses.started(write, size_t(shared_offset(shared)), bytes, instruction, ordered));
}

}  // namespace

void launch_started(const Memory& of_launch) {
  memory = of_launch;
  dynamic_bytes =
      memory.dynamic_bytes > 0 ? size_t(memory.blocks - 1) * memory.dynamic_stride + memory.dynamic_bytes : 0;
  kernel_image = image_of(memory.kernel);
  runtime_image = image_of(&memory);
  const size_t shared_units = (static_offset() + memory.static_bytes) / RaceDetector::kUnitBytes + 1;
  races.start_launch(shared_units);
  contents.start_launch(shared_units);
  async_accesses.start_launch(shared_units);
  registers.start_launch();
  traffic.start_launch();
}

void block_started(int threads) {
  races.start_block(threads, memory.blocks);
  contents.start_block();
  async_accesses.start_block();
  registers.start_block(threads);
}

void block_finished() {
  for (int warp = 0; warp < warp_count(); ++warp)
    traffic.flush(warp);
}

std::string reports() {
  std::string text;
  for (const auto* found : {&races.reports(), &contents.reports()}) {
    for (const std::string& report : *found)
      text += "\n  " + report;
  }
  return text;
}

void launch_finished(LaunchCounters& counters) {
  traffic.add_to(counters);
  if (const std::string found = reports(); !found.empty())
    throw std::runtime_error("emulator: unordered or empty memory in kernel " + counters.kernel + found);
}

void access(Access kind, const void* address, size_t bytes, const void* location) {
  const Thread& thread = self();
  if (on_fiber_stack(address))
    return fail_if(registers.access(is_write(kind), address, bytes, thread.number, location));
  if (is_private(address))
    return;
  const ptrdiff_t offset = shared_offset(address);
  check_races(address, offset, bytes, is_write(kind), location);
  if (offset >= 0) {
    check_contents(kind, offset, bytes, location);
    const auto [first, units] = units_of(uintptr_t(offset), bytes);
    fail_if(async_accesses.generic(is_write(kind), first, units, thread.number, location));
  }
  traffic.access(
      offset >= 0 ? shared_traffic(kind) : global_traffic(kind), offset >= 0 ? uintptr_t(offset) : uintptr_t(address),
      bytes, thread.warp, thread.lane, location);
}

void landed(const void* address, size_t bytes, const void* location) {
  const ptrdiff_t offset = shared_offset(address);
  check_races(address, offset, bytes, true, location);
  check_contents(Access::kWrite, offset, bytes, location);
}

int add_object(const char* unit) {
  return races.add_object(unit);
}
void made(int object, const void* location) {
  races.made(object, self().number, location);
}
void used(int object, const void* location) {
  races.used(object, self().number, location);
}
void release(int object, int thread) {
  races.release(object, thread);
}
void complete(int object) {
  races.complete(object);
}
void acquire(int object, int thread) {
  races.acquire(object, thread);
}

void bulk_issued(const void* shared, size_t bytes, int object, const void* location) {
  const auto [first, units] = units_of(uintptr_t(shared_offset(shared)), bytes);
  contents.copy_started(first, units);
  races.async_access(RaceDetector::Space::kShared, first, units, true, object, self().number, location);
  start_async_access(true, shared, bytes, {"cp.async.bulk.tensor", location});
}

void bulk_landed(const void* shared, size_t bytes) {
  const auto [first, units] = units_of(uintptr_t(shared_offset(shared)), bytes);
  contents.written(first, units);
  async_accesses.ended(true, size_t(shared_offset(shared)), bytes);
}

void bulk_read(const void* global, size_t bytes, int object, const void* location) {
  const auto [first, units] = units_of(uintptr_t(global), bytes);
  races.async_access(RaceDetector::Space::kGlobal, first, units, false, object, self().number, location);
}

void product_started(const void* shared, size_t bytes, int object, const void* location) {
  const auto [first, units] = units_of(uintptr_t(shared_offset(shared)), bytes);
  contents.read(first, units, self(), location);
  races.async_access(RaceDetector::Space::kShared, first, units, false, object, self().number, location);
  start_async_access(false, shared, bytes, {"wgmma.mma_async", location});
}

void product_finished(const void* shared, size_t bytes) {
  async_accesses.ended(false, size_t(shared_offset(shared)), bytes);
}

uint16_t group_ended(int object) {
  return races.group_ended(object);
}
void group_waited(int object, int thread, uint16_t group) {
  races.group_waited(object, thread, group);
}

void fenced_proxy() {
  async_accesses.fenced(self().number, races.now(self().number));
}

void registers_started(bool written, const void* address, size_t bytes, int thread, const void* location, bool again) {
  fail_if(registers.started(written, address, bytes, thread, location, again));
}

void registers_finished(const void* address, size_t bytes) {
  registers.finished(address, bytes);
}

void registers_fenced(int thread) {
  registers.fenced(thread);
}

void block_synchronized(const Block& block) {
  races.block_synchronized(block.first_warp * kWarpSize, block.warp_count * kWarpSize);
  for (int warp = block.first_warp; warp < block.first_warp + block.warp_count; ++warp)
    traffic.flush(warp);
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
