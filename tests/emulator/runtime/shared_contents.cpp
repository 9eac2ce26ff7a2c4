#include "shared_contents.h"

#include <algorithm>

#include "execution.h"
#include "races.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

constexpr size_t kMaxReports = 8;

}  // namespace

void SharedContents::start_launch(size_t units) {
  units_.resize(std::max(units_.size(), units));
  reports_.clear();
  reported_locations_.clear();
}

void SharedContents::start_block() {
  if (++block_ == 0)
    fail("the check of shared memory's contents has run out of block numbers");
}

void SharedContents::written(size_t first_unit, size_t units) {
  std::fill_n(units_.begin() + ptrdiff_t(first_unit), units, Unit{block_, false});
}

void SharedContents::copy_started(size_t first_unit, size_t units) {
  std::fill_n(units_.begin() + ptrdiff_t(first_unit), units, Unit{block_, true});
}

void SharedContents::read(size_t first_unit, size_t units, const Thread& thread, const void* location) {
  const auto begin = units_.begin() + ptrdiff_t(first_unit), end = begin + ptrdiff_t(units);
  const auto empty =
      std::find_if(begin, end, [this](const Unit& unit) { return unit.block != block_ || unit.in_flight; });
  // One report per location, as for races.
  if (empty == end || reports_.size() >= kMaxReports || !reported_locations_.insert(location).second)
    return;
  const size_t byte = size_t(empty - units_.begin()) * RaceDetector::kUnitBytes;
  reports_.push_back(
      name_of_shared(byte) + ": thread " + std::to_string(thread.index) + " of " + name_of(block_of(thread)) +
      " reads at " + describe_location(location) +
      (empty->block == block_ ? " what an asynchronous copy that was not waited for delivers"
                              : " what no thread of the block has written"));
}

}  // namespace segattn::emulator
