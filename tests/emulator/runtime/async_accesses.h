// Asynchronous accesses of shared memory, those of wgmma and bulk copies, in the race build. Two faults are found in
// any schedule in which they can happen:
//   - a generic access between the start of an asynchronous one and its end (a write during a read; any during a
//   write);
//   - a generic write that an asynchronous access follows, without a fence.proxy.async by the writing thread between
//     them that the start of the asynchronous access is ordered after.
// Data races between threads are RaceDetector's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "races.h"

namespace segattn::emulator {

class AsyncAccesses {
 public:
  // What an error says of the asynchronous access.
  struct Instruction {
    const char* operation;  // "wgmma.mma_async"
    const void* location;
  };
  // Whether what `other` did at `time` (RaceDetector::now) is ordered before the start of the access.
  using Ordered = std::function<bool(int other, RaceDetector::Time time)>;

  void start_launch(size_t units);
  void start_block();

  // Offsets and sizes of asynchronous accesses in bytes, multiples of 16. Empty: no fault, otherwise its description.
  std::string started(bool write, size_t first, size_t bytes, const Instruction& by, const Ordered& ordered);
  void ended(bool write, size_t first, size_t bytes);

  // Of generic accesses in units of RaceDetector::kUnitBytes.
  std::string generic(bool write, size_t first_unit, size_t units, int thread, const void* location);
  // The thread executes fence.proxy.async.
  void fenced(int thread, RaceDetector::Time now);

 private:
  // Blocks are numbered from 1 and never reused, so stale entries need no clearing.
  struct Chunk {  // 16 bytes
    uint32_t block = 0;
    uint16_t readers = 0, writers = 0;
    bool generic = false;  // some of its units hold a generic write
    Instruction reader = {}, writer = {};
  };
  struct Write {  // the last generic write of a unit, in a chunk that has some
    uint32_t block = 0;
    uint32_t fences = 0;  // how many the thread had executed
    int thread = 0;
    const void* location = nullptr;
  };

  Chunk& chunk(size_t index);
  // The generic write among these units of a chunk that needs a fence, for an error; empty without one.
  std::string unfenced(size_t first_unit, const Ordered& ordered) const;

  uint32_t block_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<Write> writes_;
  std::vector<std::vector<RaceDetector::Time>> fences_;  // of each thread, in order
};

}  // namespace segattn::emulator
