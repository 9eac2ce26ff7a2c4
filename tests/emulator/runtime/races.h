// Finds data races in any schedule of a launch: two accesses to the same bytes, one of them a write, by threads that no
// barrier orders. Vector clocks as in FastTrack (Flanagan and Freund, 2009), with one shortcut: a block barrier orders
// all threads, so it only starts a new epoch. Within an epoch, only lanes of one warp synchronize.
//
// The unit is two bytes, the smallest element of the kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "../include/emulator.h"

namespace segattn::emulator {

class RaceDetector {
 public:
  enum class Space { kShared, kGlobal };

  void start_launch(size_t shared_units);
  void start_block(int threads);
  void block_synchronized();
  // Orders everything the lanes did before with everything they do afterwards.
  void warp_synchronized(int warp, unsigned lanes);

  // `first_unit`: the offset in shared memory or the address in global memory, in units.
  void access(Space space, uintptr_t first_unit, size_t units, bool write, int thread, const void* location);

  const std::vector<std::string>& reports() const { return reports_; }

  static constexpr int kUnitBytes = 2;

 private:
  // The latest write and the reads since. Epochs are never reused, so stale cells need no clearing.
  struct Cell {
    uint32_t write_epoch = 0;
    uint32_t read_epoch = 0;
    uint16_t write_thread = 0, write_clock = 0;
    uint16_t read_thread = 0, read_clock = 0;
    uint32_t read_vector = 0;          // not 0: several unordered readers, in readers_[read_vector]
    uint32_t foreign_read_launch = 0;  // the launch in which a block other than the last reader's read the unit
    const void* write_location = nullptr;
    const void* read_location = nullptr;
  };

  Cell& cell(Space space, uintptr_t unit);
  // Whether what `other` did at `clock` is ordered before what `thread` does now.
  bool ordered(int thread, int other, uint16_t clock) const;
  bool readers_ordered(int thread, const Cell& cell, int* unordered) const;
  uint16_t* row(int thread);
  void tick(int thread);
  void touch(Space space, Cell& cell, uintptr_t unit, bool write, int thread, const void* location);
  void remember_read(Space space, Cell& cell, int thread, const void* location);
  void report(
      Space space, uintptr_t unit, int thread, bool write, const void* location, int other, bool other_write,
      const void* other_location, bool other_block);

  static constexpr int kMaxThreads = 1024;
  static constexpr size_t kPageUnits = 2048;

  int threads_ = 0;
  uint32_t launch_ = 0;
  uint32_t epoch_ = 0;
  uint32_t block_first_epoch_ = 0;
  uint32_t launch_first_epoch_ = 0;
  uint16_t clock_[kMaxThreads] = {};
  uint32_t row_epoch_[kMaxThreads] = {};  // the epoch in which a row of clocks_ is valid; in others it is zero
  // For each thread, the clocks of the lanes of its warp that it has synchronized with.
  std::vector<uint16_t> clocks_ = std::vector<uint16_t>(size_t(kMaxThreads) * kWarpSize);
  std::vector<std::vector<uint16_t>> readers_;
  size_t readers_used_ = 0;
  std::vector<Cell> shared_;
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> global_;
  uintptr_t recent_page_ = 0;
  Cell* recent_cells_ = nullptr;
  std::vector<std::string> reports_;
  std::unordered_map<const void*, int> reported_locations_;
};

}  // namespace segattn::emulator
