// Finds data races in any schedule of a launch: two accesses to the same bytes, one of them a write, by threads that no
// barrier orders. Vector clocks as in FastTrack (Flanagan and Freund, 2009).
//
// With one shortcut: a block barrier orders all threads, so it only starts a new epoch. Within an epoch, only lanes of
// one warp synchronize. It ends when the first synchronization object of the block is made (a memory barrier, a named
// barrier), and clusters of several blocks do without: from there on the epoch stays, and every thread has a clock for
// every other.
//
// An asynchronous unit is a thread of its own, which a synchronization object orders with those that wait there.
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
  // `threads`: their numbers are below. `together`: blocks of a cluster.
  void start_block(int threads, int together);
  // All threads of a block, whose numbers start at `first`.
  void block_synchronized(int first, int threads);
  // Orders everything the lanes did before with everything they do afterwards.
  void warp_synchronized(int warp, unsigned lanes);

  // Synchronization objects: what threads did before they released one is ordered before what a thread does after it
  // has acquired it, if the object completed in between. They live as long as the block.
  // `unit` names its asynchronous unit in reports, "a bulk copy".
  int add_object(const char* unit);
  void release(int object, int thread);
  void complete(int object);
  void acquire(int object, int thread);
  // A thread uses an object only after a barrier that follows its making.
  void made(int object, int thread, const void* location);
  void used(int object, int thread, const void* location);
  // An access of the object's asynchronous unit, which `thread` starts: ordered after what the thread did before, and
  // before what threads do that acquire the object.
  void async_access(
      Space space, uintptr_t first_unit, size_t units, bool write, int object, int thread, const void* location);

  // The asynchronous unit of an object that no thread releases works in groups. group_ended returns the number of the
  // one that ends; a thread that waited for it is ordered after its accesses and those of earlier groups.
  uint16_t group_ended(int object);
  void group_waited(int object, int thread, uint16_t group);

  // `first_unit`: the offset in shared memory or the address in global memory, in units.
  void access(Space space, uintptr_t first_unit, size_t units, bool write, int thread, const void* location);

  // When a thread did something, for happened_before.
  struct Time {
    uint32_t epoch;
    uint16_t clock;
  };
  Time now(int thread) const { return {epoch_, clock_[size_t(thread)]}; }
  // Whether what `other` did at `time` is ordered before what `thread` does now.
  bool happened_before(int thread, int other, Time time) const {
    return time.epoch != epoch_ || ordered(thread, other, time.clock);
  }

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

  struct Object {
    std::vector<uint16_t> gathered, completed;
    const char* unit = nullptr;
    int maker = -1;
    uint16_t maker_clock = 0;
    const void* location = nullptr;
  };
  struct Reader {
    uint16_t thread, clock;
  };
  // Who accesses memory: what `thread` knows is checked, and the access is remembered as `as`.
  struct Accessor {
    int thread;
    int as;
    const void* location;
  };

  Cell& cell(Space space, uintptr_t unit);
  void use_clocks_of_all();
  uint16_t* clocks_of_all(int thread) { return &all_clocks_[size_t(thread) * stride_]; }
  void join(uint16_t* clocks, const uint16_t* others) const;
  // Whether what `other` did at `clock` is ordered before what `thread` does now.
  bool ordered(int thread, int other, uint16_t clock) const;
  bool readers_ordered(int thread, const Cell& cell, int* unordered) const;
  uint16_t* row(int thread);
  void tick(int thread);
  void touch(Space space, Cell& cell, uintptr_t unit, bool write, const Accessor& accessor);
  void remember_read(Space space, Cell& cell, const Accessor& accessor);
  void remember_reader(Cell& cell, const Accessor& accessor);
  std::string name_of(int thread) const;
  void report(
      Space space, uintptr_t unit, const Accessor& accessor, bool write, int other, bool other_write,
      const void* other_location, bool other_block);

  static constexpr size_t kPageUnits = 2048;
  static constexpr size_t kMaxObjects = 512;  // of a cluster

  int threads_ = 0;
  uint32_t launch_ = 0;
  uint32_t epoch_ = 0;
  uint32_t block_first_epoch_ = 0;
  uint32_t launch_first_epoch_ = 0;
  std::vector<uint16_t> clock_;      // of threads, then of the objects' asynchronous units
  std::vector<uint32_t> row_epoch_;  // the epoch in which a row of clocks_ is valid; in others it is zero
  // For each thread, the clocks of the lanes of its warp that it has synchronized with.
  std::vector<uint16_t> clocks_;
  bool knows_all_ = false;  // the clocks are in all_clocks_
  size_t stride_ = 0;
  std::vector<uint16_t> all_clocks_;  // for each thread, those of all threads and asynchronous units
  std::vector<Object> objects_;
  std::vector<std::vector<Reader>> reader_lists_;  // those of read_vector while knows_all_
  std::vector<uint32_t> free_reader_lists_;
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
