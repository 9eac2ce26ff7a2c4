#include "async_accesses.h"

#include <algorithm>

#include "execution.h"
#include "source_locations.h"

namespace segattn::emulator {
namespace {

constexpr size_t kChunkBytes = 16;
constexpr size_t kChunkUnits = kChunkBytes / RaceDetector::kUnitBytes;

std::string place(size_t byte) {
  return name_of_shared(byte) + ": ";
}

std::string name(const AsyncAccesses::Instruction& instruction) {
  return std::string(instruction.operation) + " at " + describe_location(instruction.location);
}

}  // namespace

void AsyncAccesses::start_launch(size_t units) {
  writes_.resize(std::max(writes_.size(), units + kChunkUnits));
  chunks_.resize(std::max(chunks_.size(), units / kChunkUnits + 1));
}

void AsyncAccesses::start_block() {
  if (++block_ == 0)
    fail("the check of asynchronous accesses has run out of block numbers");
  for (std::vector<RaceDetector::Time>& times : fences_)
    times.clear();
}

AsyncAccesses::Chunk& AsyncAccesses::chunk(size_t index) {
  Chunk& found = chunks_[index];
  if (found.block != block_)
    found = Chunk{block_};
  return found;
}

std::string AsyncAccesses::started(
    bool write, size_t first, size_t bytes, const Instruction& by, const Ordered& ordered) {
  const char* verb = write ? " writes" : " reads";
  for (size_t byte = first; byte < first + bytes; byte += kChunkBytes) {
    Chunk& at = chunk(byte / kChunkBytes);
    if (at.writers > 0 || (write && at.readers > 0)) {
      const bool written = at.writers > 0;
      return place(byte) + name(by) + verb + " what " + name(written ? at.writer : at.reader) +
          ", which has not finished, " + (written ? "writes" : "reads");
    }
    if (at.generic) {
      const std::string fault = unfenced(byte / RaceDetector::kUnitBytes, ordered);
      if (!fault.empty())
        return place(byte) + name(by) + verb + " what " + fault;
    }
    if (write) {
      ++at.writers;
      at.generic = false;
      at.writer = by;
    } else {
      ++at.readers;
      at.reader = by;
    }
  }
  return "";
}

std::string AsyncAccesses::unfenced(size_t first_unit, const Ordered& ordered) const {
  for (size_t unit = first_unit; unit < first_unit + kChunkUnits; ++unit) {
    const Write& last = writes_[unit];
    if (last.block != block_)
      continue;
    const std::vector<RaceDetector::Time>& fences = fences_[size_t(last.thread)];
    const bool fenced = fences.size() > last.fences;
    if (!fenced || !ordered(last.thread, fences[last.fences])) {
      return name_of(thread_at(last.thread)) + " wrote at " + describe_location(last.location) +
          (fenced ? ", whose fence.proxy.async afterwards no barrier orders before it"
                  : " and executed no fence.proxy.async afterwards");
    }
  }
  return "";
}

void AsyncAccesses::ended(bool write, size_t first, size_t bytes) {
  for (size_t byte = first; byte < first + bytes; byte += kChunkBytes) {
    Chunk& at = chunk(byte / kChunkBytes);
    --(write ? at.writers : at.readers);
  }
}

std::string AsyncAccesses::generic(bool write, size_t first_unit, size_t units, int thread, const void* location) {
  for (size_t index = first_unit / kChunkUnits; index <= (first_unit + units - 1) / kChunkUnits; ++index) {
    Chunk& at = chunk(index);
    if (write && !at.generic) {
      at.generic = true;
      std::fill_n(writes_.begin() + ptrdiff_t(index * kChunkUnits), kChunkUnits, Write{});
    }
    if (at.writers > 0 || (write && at.readers > 0)) {
      const bool written = at.writers > 0;
      return place(index * kChunkBytes) + name_of(thread_at(thread)) + (write ? " writes at " : " reads at ") +
          describe_location(location) + " what " + name(written ? at.writer : at.reader) +
          ", which has not finished, " + (written ? "writes" : "reads");
    }
  }
  if (write) {
    if (fences_.size() <= size_t(thread))
      fences_.resize(size_t(thread) + 1);
    std::fill_n(
        writes_.begin() + ptrdiff_t(first_unit), units,
        Write{block_, uint32_t(fences_[size_t(thread)].size()), thread, location});
  }
  return "";
}

void AsyncAccesses::fenced(int thread, RaceDetector::Time now) {
  if (fences_.size() <= size_t(thread))
    fences_.resize(size_t(thread) + 1);
  fences_[size_t(thread)].push_back(now);
}

}  // namespace segattn::emulator
