#include "races.h"

#include <algorithm>
#include <bit>

#include "../include/emulator.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

constexpr size_t kMaxReports = 8;

}  // namespace

void RaceDetector::start_launch(size_t shared_units) {
  ++launch_;
  launch_first_epoch_ = epoch_ + 1;
  shared_.resize(std::max(shared_.size(), shared_units));
  reports_.clear();
  reported_locations_.clear();
}

void RaceDetector::start_block(int threads) {
  threads_ = threads;
  block_first_epoch_ = epoch_ + 1;
  readers_used_ = 1;  // 0 means none
  if (readers_.empty())
    readers_.emplace_back();
  block_synchronized();
}

void RaceDetector::block_synchronized() {
  if (++epoch_ == 0)
    fail("the race detector has run out of epochs");
  std::fill(clock_, clock_ + threads_, uint16_t(1));
}

uint16_t* RaceDetector::row(int thread) {
  uint16_t* clocks = &clocks_[size_t(thread) * kWarpSize];
  if (row_epoch_[thread] != epoch_) {
    row_epoch_[thread] = epoch_;
    std::fill(clocks, clocks + kWarpSize, uint16_t(0));
  }
  return clocks;
}

void RaceDetector::tick(int thread) {
  if (++clock_[thread] == 0)
    fail("the race detector has run out of clock ticks");
}

void RaceDetector::warp_synchronized(int warp, unsigned lanes) {
  uint16_t latest[kWarpSize] = {};
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest), thread = warp * kWarpSize + lane;
    uint16_t* clocks = row(thread);
    clocks[lane] = clock_[thread];
    for (int l = 0; l < kWarpSize; ++l)
      latest[l] = std::max(latest[l], clocks[l]);
  }
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int thread = warp * kWarpSize + std::countr_zero(rest);
    std::copy(latest, latest + kWarpSize, row(thread));
    tick(thread);
  }
}

bool RaceDetector::ordered(int thread, int other, uint16_t clock) const {
  if (thread == other)
    return true;
  if (thread / kWarpSize != other / kWarpSize || row_epoch_[thread] != epoch_)
    return false;
  return clocks_[size_t(thread) * kWarpSize + other % kWarpSize] >= clock;
}

bool RaceDetector::readers_ordered(int thread, const Cell& cell, int* unordered) const {
  if (cell.read_vector == 0) {
    *unordered = cell.read_thread;
    return ordered(thread, cell.read_thread, cell.read_clock);
  }
  const std::vector<uint16_t>& readers = readers_[cell.read_vector];
  for (int t = 0; t < threads_; ++t) {
    if (readers[t] != 0 && !ordered(thread, t, readers[t])) {
      *unordered = t;
      return false;
    }
  }
  return true;
}

RaceDetector::Cell& RaceDetector::cell(Space space, uintptr_t unit) {
  if (space == Space::kShared)
    return shared_[unit];
  const uintptr_t page = unit / kPageUnits;
  if (page != recent_page_ || recent_cells_ == nullptr) {
    std::unique_ptr<Cell[]>& cells = global_[page];
    if (cells == nullptr)
      cells = std::make_unique<Cell[]>(kPageUnits);
    recent_page_ = page;
    recent_cells_ = cells.get();
  }
  return recent_cells_[unit % kPageUnits];
}

void RaceDetector::access(
    Space space, uintptr_t first_unit, size_t units, bool write, int thread, const void* location) {
  for (size_t i = 0; i < units; ++i)
    touch(space, cell(space, first_unit + i), first_unit + i, write, thread, location);
}

void RaceDetector::touch(Space space, Cell& cell, uintptr_t unit, bool write, int thread, const void* location) {
  const auto of_another_block = [&](uint32_t epoch) {
    return space == Space::kGlobal && epoch >= launch_first_epoch_ && epoch < block_first_epoch_;
  };
  const bool written_now = cell.write_epoch == epoch_ && !ordered(thread, cell.write_thread, cell.write_clock);
  if (written_now || of_another_block(cell.write_epoch)) {
    report(space, unit, thread, write, location, cell.write_thread, true, cell.write_location, !written_now);
  }
  if (!write)
    return remember_read(space, cell, thread, location);

  int reader = cell.read_thread;
  const bool read_now = cell.read_epoch == epoch_ && !readers_ordered(thread, cell, &reader);
  const bool read_elsewhere =
      of_another_block(cell.read_epoch) || (space == Space::kGlobal && cell.foreign_read_launch == launch_);
  if (read_now || read_elsewhere) {
    report(space, unit, thread, write, location, reader, false, cell.read_location, !read_now);
  }
  cell.write_epoch = epoch_;
  cell.write_thread = uint16_t(thread);
  cell.write_clock = clock_[thread];
  cell.write_location = location;
  cell.read_epoch = 0;
}

void RaceDetector::remember_read(Space space, Cell& cell, int thread, const void* location) {
  if (cell.read_epoch == epoch_) {
    if (cell.read_vector != 0) {
      readers_[cell.read_vector][thread] = clock_[thread];
      return;
    }
    if (!ordered(thread, cell.read_thread, cell.read_clock)) {
      if (readers_used_ == readers_.size())
        readers_.emplace_back();
      std::vector<uint16_t>& readers = readers_[readers_used_];
      readers.assign(threads_, 0);
      readers[cell.read_thread] = cell.read_clock;
      readers[thread] = clock_[thread];
      cell.read_vector = uint32_t(readers_used_++);
      return;
    }
  } else {
    const bool by_another_block = cell.read_epoch >= launch_first_epoch_ && cell.read_epoch < block_first_epoch_;
    if (space == Space::kGlobal && by_another_block)
      cell.foreign_read_launch = launch_;
    cell.read_epoch = epoch_;
  }
  cell.read_vector = 0;
  cell.read_thread = uint16_t(thread);
  cell.read_clock = clock_[thread];
  cell.read_location = location;
}

void RaceDetector::report(
    Space space, uintptr_t unit, int thread, bool write, const void* location, int other, bool other_write,
    const void* other_location, bool other_block) {
  // One report per location: more would repeat it, and addr2line is slow.
  if (reports_.size() >= kMaxReports || reported_locations_[location]++ > 0)
    return;
  std::string text =
      space == Space::kShared ? "shared memory, byte " + std::to_string(unit * kUnitBytes) : "global memory";
  text += ": thread " + std::to_string(thread) + (write ? " writes" : " reads") + " at " + describe_location(location);
  text += other_block ? " what thread " + std::to_string(other) + " of another block "
                      : " what thread " + std::to_string(other) + " of the same block, with no barrier between, ";
  text += std::string(other_write ? "wrote" : "read") + " at " + describe_location(other_location);
  reports_.push_back(text);
}

}  // namespace segattn::emulator
