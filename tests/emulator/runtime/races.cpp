#include "races.h"

#include <algorithm>
#include <bit>

#include "../include/emulator.h"
#include "places.h"

namespace segattn::emulator {
namespace {

constexpr size_t kMaxReports = 8;

}  // namespace

void RaceDetector::start_launch(size_t shared_units) {
  ++launch_;
  launch_first_epoch_ = epoch_ + 1;
  shared_.resize(std::max(shared_.size(), shared_units));
  reports_.clear();
  reported_places_.clear();
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
  beyond_warps_ = false;
  for (std::vector<uint16_t>& known : barriers_)
    known.clear();
}

uint16_t* RaceDetector::row(int thread) {
  uint16_t* clocks = &clocks_[size_t(thread) * kMaxThreads];
  if (row_epoch_[thread] != epoch_) {
    row_epoch_[thread] = epoch_;
    std::fill(clocks, clocks + threads_, uint16_t(0));
  }
  return clocks;
}

void RaceDetector::tick(int thread) {
  if (++clock_[thread] == 0)
    fail("the race detector has run out of clock ticks");
}

void RaceDetector::warp_synchronized(int warp, unsigned lanes) {
  // Within an epoch without named barriers, nobody knows of a thread of another warp.
  const int first = beyond_warps_ ? 0 : warp * kWarpSize;
  const int last = beyond_warps_ ? threads_ : std::min(first + kWarpSize, threads_);
  uint16_t known[kMaxThreads];
  std::fill(known + first, known + last, uint16_t(0));
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int thread = warp * kWarpSize + std::countr_zero(rest);
    uint16_t* clocks = row(thread);
    clocks[thread] = clock_[thread];
    for (int t = first; t < last; ++t)
      known[t] = std::max(known[t], clocks[t]);
  }
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int thread = warp * kWarpSize + std::countr_zero(rest);
    std::copy(known + first, known + last, row(thread) + first);
    tick(thread);
  }
}

void RaceDetector::barrier_arrived(int barrier, int thread) {
  beyond_warps_ = true;
  std::vector<uint16_t>& known = barriers_[barrier];
  known.resize(threads_, 0);
  uint16_t* clocks = row(thread);
  clocks[thread] = clock_[thread];
  for (int t = 0; t < threads_; ++t)
    known[t] = std::max(known[t], clocks[t]);
  tick(thread);
}

void RaceDetector::barrier_released(int barrier, const std::vector<uint16_t>& waiting) {
  const std::vector<uint16_t>& known = barriers_[barrier];
  for (const uint16_t thread : waiting) {
    uint16_t* clocks = row(thread);
    for (int t = 0; t < threads_; ++t)
      clocks[t] = std::max(clocks[t], known[t]);
  }
  barriers_[barrier].clear();
}

bool RaceDetector::knows(int thread, int other, uint16_t clock) const {
  if (thread == other)
    return true;
  return row_epoch_[thread] == epoch_ && clocks_[size_t(thread) * kMaxThreads + other] >= clock;
}

bool RaceDetector::knows_readers(int thread, const Cell& cell, int* unknown) const {
  if (cell.read_vector == 0) {
    *unknown = cell.read_thread;
    return knows(thread, cell.read_thread, cell.read_clock);
  }
  const std::vector<uint16_t>& readers = readers_[cell.read_vector];
  for (int t = 0; t < threads_; ++t) {
    if (readers[t] != 0 && !knows(thread, t, readers[t])) {
      *unknown = t;
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

void RaceDetector::access(Space space, uintptr_t first_unit, size_t units, bool write, int thread, const void* place) {
  for (size_t i = 0; i < units; ++i)
    touch(space, cell(space, first_unit + i), first_unit + i, write, thread, place);
}

void RaceDetector::touch(Space space, Cell& cell, uintptr_t unit, bool write, int thread, const void* place) {
  const auto of_another_block = [&](uint32_t epoch) {
    return space == Space::kGlobal && epoch >= launch_first_epoch_ && epoch < block_first_epoch_;
  };
  const bool written_now = cell.write_epoch == epoch_ && !knows(thread, cell.write_thread, cell.write_clock);
  if (written_now || of_another_block(cell.write_epoch)) {
    report(space, unit, thread, write, place, cell.write_thread, true, cell.write_place, !written_now);
  }
  if (!write)
    return remember_read(space, cell, thread, place);

  int reader = cell.read_thread;
  const bool read_now = cell.read_epoch == epoch_ && !knows_readers(thread, cell, &reader);
  const bool read_elsewhere =
      of_another_block(cell.read_epoch) || (space == Space::kGlobal && cell.foreign_read_launch == launch_);
  if (read_now || read_elsewhere) {
    report(space, unit, thread, write, place, reader, false, cell.read_place, !read_now);
  }
  cell.write_epoch = epoch_;
  cell.write_thread = uint16_t(thread);
  cell.write_clock = clock_[thread];
  cell.write_place = place;
  cell.read_epoch = 0;
}

void RaceDetector::remember_read(Space space, Cell& cell, int thread, const void* place) {
  if (cell.read_epoch == epoch_) {
    if (cell.read_vector != 0) {
      readers_[cell.read_vector][thread] = clock_[thread];
      return;
    }
    if (!knows(thread, cell.read_thread, cell.read_clock)) {
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
  cell.read_place = place;
}

void RaceDetector::report(
    Space space, uintptr_t unit, int thread, bool write, const void* place, int other, bool other_write,
    const void* other_place, bool other_block) {
  // One report a place: the first tells all, and naming places is slow.
  if (reports_.size() >= kMaxReports || reported_places_[place]++ > 0)
    return;
  std::string text =
      space == Space::kShared ? "shared memory, byte " + std::to_string(unit * kUnitBytes) : "global memory";
  text += ": thread " + std::to_string(thread) + (write ? " writes" : " reads") + " at " + describe_place(place);
  text += other_block ? " what thread " + std::to_string(other) + " of another block "
                      : " what thread " + std::to_string(other) + " of the same block, with no barrier between, ";
  text += std::string(other_write ? "wrote" : "read") + " at " + describe_place(other_place);
  reports_.push_back(text);
}

}  // namespace segattn::emulator
