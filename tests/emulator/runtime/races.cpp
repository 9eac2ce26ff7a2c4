#include "races.h"

#include <algorithm>
#include <bit>

#include "execution.h"
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

void RaceDetector::start_block(int threads, int together) {
  threads_ = threads;
  if (size_t(threads) > row_epoch_.size()) {
    clock_.resize(size_t(threads) + kMaxObjects);
    row_epoch_.resize(size_t(threads));
    clocks_.resize(size_t(threads) * kWarpSize);
  }
  block_first_epoch_ = epoch_ + 1;
  readers_used_ = 1;  // 0 means none
  if (readers_.empty())
    readers_.emplace_back();
  knows_all_ = false;
  objects_.clear();
  block_synchronized(0, threads);
  if (together > 1)
    use_clocks_of_all();
}

void RaceDetector::block_synchronized(int first, int threads) {
  if (!knows_all_) {
    if (++epoch_ == 0)
      fail("the race detector has run out of epochs");
    std::fill_n(clock_.begin(), threads, uint16_t(1));
    return;
  }
  std::vector<uint16_t> latest(stride_);
  for (int t = first; t < first + threads; ++t) {
    join(latest.data(), clocks_of_all(t));
    latest[size_t(t)] = clock_[size_t(t)];
  }
  for (int t = first; t < first + threads; ++t) {
    std::copy(latest.begin(), latest.end(), clocks_of_all(t));
    tick(t);
  }
}

void RaceDetector::use_clocks_of_all() {
  knows_all_ = true;
  stride_ = size_t(threads_) + kMaxObjects;
  all_clocks_.assign(size_t(threads_) * stride_, 0);
  for (int t = 0; t < threads_; ++t)
    std::copy_n(row(t), kWarpSize, clocks_of_all(t) + t / kWarpSize * kWarpSize);
  std::fill(clock_.begin() + threads_, clock_.end(), uint16_t(1));
  free_reader_lists_.clear();
  reader_lists_.assign(readers_used_, {});  // 0 means none
  for (size_t i = 1; i < readers_used_; ++i) {
    for (int t = 0; t < threads_; ++t) {
      if (readers_[i][size_t(t)] != 0)
        reader_lists_[i].push_back(Reader{uint16_t(t), readers_[i][size_t(t)]});
    }
  }
}

void RaceDetector::join(uint16_t* clocks, const uint16_t* others) const {
  const size_t used = size_t(threads_) + objects_.size();
  for (size_t i = 0; i < used; ++i)
    clocks[i] = std::max(clocks[i], others[i]);
}

int RaceDetector::add_object(const char* unit) {
  if (!knows_all_)
    use_clocks_of_all();
  if (objects_.size() == kMaxObjects)
    fail("the race detector knows at most %zu barriers of a cluster", kMaxObjects);
  objects_.push_back(Object{std::vector<uint16_t>(stride_), std::vector<uint16_t>(stride_), unit, -1, 0, nullptr});
  return int(objects_.size()) - 1;
}

void RaceDetector::made(int object, int thread, const void* location) {
  Object& o = objects_[size_t(object)];
  o.maker = thread;
  o.maker_clock = clock_[size_t(thread)];
  o.location = location;
}

void RaceDetector::release(int object, int thread) {
  Object& o = objects_[size_t(object)];
  join(o.gathered.data(), clocks_of_all(thread));
  o.gathered[size_t(thread)] = clock_[size_t(thread)];
  tick(thread);
}

void RaceDetector::complete(int object) {
  Object& o = objects_[size_t(object)];
  const int unit = threads_ + object;
  o.gathered[size_t(unit)] = clock_[size_t(unit)];
  tick(unit);
  o.completed = o.gathered;
}

void RaceDetector::acquire(int object, int thread) {
  join(clocks_of_all(thread), objects_[size_t(object)].completed.data());
}

uint16_t RaceDetector::group_ended(int object) {
  const int unit = threads_ + object;
  const uint16_t group = clock_[size_t(unit)];
  tick(unit);
  return group;
}

void RaceDetector::group_waited(int object, int thread, uint16_t group) {
  uint16_t& known = clocks_of_all(thread)[threads_ + object];
  known = std::max(known, group);
}

void RaceDetector::used(int object, int thread, const void* location) {
  const Object& o = objects_[size_t(object)];
  if (ordered(thread, o.maker, o.maker_clock) || reports_.size() >= kMaxReports || reported_locations_[location]++ > 0)
    return;
  reports_.push_back(
      name_of(thread) + " uses at " + describe_location(location) + " the barrier that " + name_of(o.maker) +
      " initialised at " + describe_location(o.location) + ", with no barrier between");
}

uint16_t* RaceDetector::row(int thread) {
  uint16_t* clocks = &clocks_[size_t(thread) * kWarpSize];
  if (row_epoch_[size_t(thread)] != epoch_) {
    row_epoch_[size_t(thread)] = epoch_;
    std::fill(clocks, clocks + kWarpSize, uint16_t(0));
  }
  return clocks;
}

void RaceDetector::tick(int thread) {
  if (++clock_[size_t(thread)] == 0)
    fail("the race detector has run out of clock ticks");
}

void RaceDetector::warp_synchronized(int warp, unsigned lanes) {
  if (knows_all_) {
    std::vector<uint16_t> latest(stride_);
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      const int thread = warp * kWarpSize + std::countr_zero(rest);
      join(latest.data(), clocks_of_all(thread));
      latest[size_t(thread)] = clock_[size_t(thread)];
    }
    for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
      const int thread = warp * kWarpSize + std::countr_zero(rest);
      std::copy(latest.begin(), latest.end(), clocks_of_all(thread));
      tick(thread);
    }
    return;
  }
  uint16_t latest[kWarpSize] = {};
  for (unsigned rest = lanes; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest), thread = warp * kWarpSize + lane;
    uint16_t* clocks = row(thread);
    clocks[lane] = clock_[size_t(thread)];
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
  if (knows_all_)
    return all_clocks_[size_t(thread) * stride_ + size_t(other)] >= clock;
  if (thread / kWarpSize != other / kWarpSize || row_epoch_[size_t(thread)] != epoch_)
    return false;
  return clocks_[size_t(thread) * kWarpSize + size_t(other % kWarpSize)] >= clock;
}

bool RaceDetector::readers_ordered(int thread, const Cell& cell, int* unordered) const {
  if (cell.read_vector == 0) {
    *unordered = cell.read_thread;
    return ordered(thread, cell.read_thread, cell.read_clock);
  }
  if (knows_all_) {
    for (const Reader& reader : reader_lists_[cell.read_vector]) {
      if (!ordered(thread, reader.thread, reader.clock)) {
        *unordered = reader.thread;
        return false;
      }
    }
    return true;
  }
  const std::vector<uint16_t>& readers = readers_[cell.read_vector];
  for (int t = 0; t < threads_; ++t) {
    if (readers[size_t(t)] != 0 && !ordered(thread, t, readers[size_t(t)])) {
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
  const Accessor accessor{thread, thread, location};
  for (size_t i = 0; i < units; ++i)
    touch(space, cell(space, first_unit + i), first_unit + i, write, accessor);
}

void RaceDetector::async_access(
    Space space, uintptr_t first_unit, size_t units, bool write, int object, int thread, const void* location) {
  const Accessor accessor{thread, threads_ + object, location};
  for (size_t i = 0; i < units; ++i)
    touch(space, cell(space, first_unit + i), first_unit + i, write, accessor);
}

void RaceDetector::touch(Space space, Cell& cell, uintptr_t unit, bool write, const Accessor& accessor) {
  const auto of_another_block = [&](uint32_t epoch) {
    return space == Space::kGlobal && epoch >= launch_first_epoch_ && epoch < block_first_epoch_;
  };
  const bool written_now = cell.write_epoch == epoch_ && !ordered(accessor.thread, cell.write_thread, cell.write_clock);
  if (written_now || of_another_block(cell.write_epoch)) {
    report(space, unit, accessor, write, cell.write_thread, true, cell.write_location, !written_now);
  }
  if (!write)
    return remember_read(space, cell, accessor);

  int reader = cell.read_thread;
  const bool read_now = cell.read_epoch == epoch_ && !readers_ordered(accessor.thread, cell, &reader);
  const bool read_elsewhere =
      of_another_block(cell.read_epoch) || (space == Space::kGlobal && cell.foreign_read_launch == launch_);
  if (read_now || read_elsewhere) {
    report(space, unit, accessor, write, reader, false, cell.read_location, !read_now);
  }
  if (knows_all_ && cell.read_epoch == epoch_ && cell.read_vector != 0)
    free_reader_lists_.push_back(cell.read_vector);
  cell.write_epoch = epoch_;
  cell.write_thread = uint16_t(accessor.as);
  cell.write_clock = clock_[size_t(accessor.as)];
  cell.write_location = accessor.location;
  cell.read_epoch = 0;
}

void RaceDetector::remember_read(Space space, Cell& cell, const Accessor& accessor) {
  if (cell.read_epoch == epoch_) {
    if (cell.read_vector != 0 || !ordered(accessor.thread, cell.read_thread, cell.read_clock))
      return remember_reader(cell, accessor);
  } else {
    const bool by_another_block = cell.read_epoch >= launch_first_epoch_ && cell.read_epoch < block_first_epoch_;
    if (space == Space::kGlobal && by_another_block)
      cell.foreign_read_launch = launch_;
    cell.read_epoch = epoch_;
  }
  cell.read_vector = 0;
  cell.read_thread = uint16_t(accessor.as);
  cell.read_clock = clock_[size_t(accessor.as)];
  cell.read_location = accessor.location;
}

// Adds a reader to a unit with others that are not ordered before it.
void RaceDetector::remember_reader(Cell& cell, const Accessor& accessor) {
  const uint16_t as = uint16_t(accessor.as), clock = clock_[as];
  if (!knows_all_) {
    if (cell.read_vector == 0) {
      if (readers_used_ == readers_.size())
        readers_.emplace_back();
      readers_[readers_used_].assign(size_t(threads_), 0);
      readers_[readers_used_][cell.read_thread] = cell.read_clock;
      cell.read_vector = uint32_t(readers_used_++);
    }
    readers_[cell.read_vector][as] = clock;
    return;
  }
  if (cell.read_vector == 0) {
    if (free_reader_lists_.empty()) {
      free_reader_lists_.push_back(uint32_t(reader_lists_.size()));
      reader_lists_.emplace_back();
    }
    const uint32_t list = free_reader_lists_.back();
    free_reader_lists_.pop_back();
    reader_lists_[list].assign(1, Reader{cell.read_thread, cell.read_clock});
    cell.read_vector = list;
  }
  std::vector<Reader>& readers = reader_lists_[cell.read_vector];
  for (Reader& reader : readers) {
    if (reader.thread == as) {
      reader.clock = clock;
      return;
    }
  }
  // A later access that is ordered after this one is ordered after those that precede it.
  std::erase_if(readers, [&](const Reader& reader) {
    return accessor.as == accessor.thread && ordered(as, reader.thread, reader.clock);
  });
  readers.push_back(Reader{as, clock});
}

std::string RaceDetector::name_of(int thread) const {
  return thread < threads_ ? emulator::name_of(thread_at(thread)) : objects_[size_t(thread - threads_)].unit;
}

void RaceDetector::report(
    Space space, uintptr_t unit, const Accessor& accessor, bool write, int other, bool other_write,
    const void* other_location, bool other_block) {
  // One report per location: more would repeat it, and addr2line is slow.
  if (reports_.size() >= kMaxReports || reported_locations_[accessor.location]++ > 0)
    return;
  std::string text = space == Space::kShared ? name_of_shared(unit * kUnitBytes) : "global memory";
  text += ": " + name_of(accessor.as) + (write ? " writes" : " reads") + " at " + describe_location(accessor.location);
  if (other_block) {
    text += " what thread " + std::to_string(other) + " of another block ";
  } else {
    const bool same_block = block_count() == 1 && other < threads_;
    text += " what " + name_of(other) + (same_block ? " of the same block" : "") + ", with no barrier between, ";
  }
  text += std::string(other_write ? "wrote" : "read") + " at " + describe_location(other_location);
  reports_.push_back(text);
}

}  // namespace segattn::emulator
