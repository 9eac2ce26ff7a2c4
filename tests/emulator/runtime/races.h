// Finds data races from one run, whatever its schedule: two accesses to the same bytes, one of them a write, by threads
// that no barrier orders. Vector clocks, in the manner of FastTrack (Flanagan and Freund, 2009), with one shortcut: a
// block barrier orders everything, so it only opens a new epoch.
//
// Memory is watched in units of two bytes, the smallest element the kernels have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

namespace segattn::emulator {

class RaceDetector {
 public:
  enum class Space { kShared, kGlobal };

  void start_launch(size_t shared_units);
  void start_block(int threads);
  void block_synchronized();
  // The lanes know from now on all that each of them knew and did.
  void warp_synchronized(int warp, unsigned lanes);
  // Named barriers: what a thread knew and did before it arrived, those released know from now on.
  void barrier_arrived(int barrier, int thread);
  void barrier_released(int barrier, const std::vector<uint16_t>& waiting);

  // `unit`: for shared memory the offset, for global memory the address, in units.
  void access(Space space, uintptr_t first_unit, size_t units, bool write, int thread, const void* place);

  const std::vector<std::string>& reports() const { return reports_; }

  static constexpr int kUnitBytes = 2;

 private:
  // Of the most recent write and of the reads since. An epoch is never used twice, so stale cells need no clearing.
  struct Cell {
    uint32_t write_epoch = 0;
    uint32_t read_epoch = 0;
    uint16_t write_thread = 0, write_clock = 0;
    uint16_t read_thread = 0, read_clock = 0;
    uint32_t read_vector = 0;          // not 0: several unordered readers, readers_[read_vector]
    uint32_t foreign_read_launch = 0;  // launch in which another block than the last reader's read, too
    const void* write_place = nullptr;
    const void* read_place = nullptr;
  };

  Cell& cell(Space space, uintptr_t unit);
  bool knows(int thread, int other, uint16_t clock) const;
  bool knows_readers(int thread, const Cell& cell, int* unknown) const;
  uint16_t* row(int thread);
  void tick(int thread);
  void touch(Space space, Cell& cell, uintptr_t unit, bool write, int thread, const void* place);
  void remember_read(Space space, Cell& cell, int thread, const void* place);
  void report(
      Space space, uintptr_t unit, int thread, bool write, const void* place, int other, bool other_write,
      const void* other_place, bool other_block);

  static constexpr int kMaxThreads = 1024;
  static constexpr size_t kPageUnits = 2048;

  int threads_ = 0;
  uint32_t launch_ = 0;
  uint32_t epoch_ = 0;
  uint32_t block_first_epoch_ = 0;
  uint32_t launch_first_epoch_ = 0;
  uint16_t clock_[kMaxThreads] = {};
  uint32_t row_epoch_[kMaxThreads] = {};  // a row of clocks_ is valid in this epoch only, otherwise all zero
  bool beyond_warps_ = false;             // this epoch, a named barrier may have told threads of other warps
  std::vector<uint16_t> barriers_[16];    // what threads that arrived knew; empty: none has
  std::vector<uint16_t> clocks_ = std::vector<uint16_t>(size_t(kMaxThreads) * kMaxThreads);
  std::vector<std::vector<uint16_t>> readers_;
  size_t readers_used_ = 0;
  std::vector<Cell> shared_;
  std::unordered_map<uintptr_t, std::unique_ptr<Cell[]>> global_;
  uintptr_t recent_page_ = 0;
  Cell* recent_cells_ = nullptr;
  std::vector<std::string> reports_;
  std::unordered_map<const void*, int> reported_places_;
};

}  // namespace segattn::emulator
