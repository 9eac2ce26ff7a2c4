// Finds reads of shared memory that holds nothing yet: no thread of the block has written it, or a cp.async into it has
// not been waited for. Values do not matter: a read is a fault even where its value reaches no result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

namespace segattn::emulator {

struct Thread;

class SharedContents {
 public:
  void start_launch(size_t units);
  void start_block();

  // Offsets and sizes are in units of RaceDetector::kUnitBytes.
  void written(size_t first_unit, size_t units);
  void copy_started(size_t first_unit, size_t units);
  void read(size_t first_unit, size_t units, const Thread& thread, const void* location);

  const std::vector<std::string>& reports() const { return reports_; }

 private:
  // Blocks are numbered from 1 and never reused, so a stale unit needs no clearing.
  struct Unit {
    uint32_t block = 0;  // the last block that wrote the unit or started a copy into it
    bool in_flight = false;
  };

  uint32_t block_ = 0;
  std::vector<Unit> units_;
  std::vector<std::string> reports_;
  std::unordered_set<const void*> reported_locations_;
};

}  // namespace segattn::emulator
