// Bulk tensor copies (cp.async.bulk.tensor). The destination is filled with NaN when a copy is issued; the data are
// read and written, and their bytes counted at the barrier, at a random moment after that.
#include <algorithm>
#include <bit>
#include <cstring>
#include <string>

#include "../include/emulator_sm90.h"
#include "counters.h"
#include "device.h"
#include "execution.h"
#include "mbarrier.h"
#include "tensor_map.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

constexpr size_t kChunkBytes = 16;
constexpr size_t kMaxRowBytes = 256 * 8;

struct Copy {
  TensorMap map;
  int start[3];
  const char* operation;
  Site site;
  std::string thread;  // that issued it
};

struct Landing {
  Block* block;
  char* shared;
  MemoryBarrier* barrier;
  int64_t phase;
};

int64_t bytes_of_row(const TensorMap& map) {
  return int64_t(map.box[0]) * map.element_bytes;
}
int64_t bytes_of_box(const TensorMap& map) {
  return bytes_of_row(map) * map.box[1] * map.box[2];
}

const TensorMap& checked_map(const CUtensorMap* map, const char* operation, const Site& site) {
  if (uintptr_t(map) % alignof(CUtensorMap) != 0)
    fail("%s (%s): the tensor map %p is not aligned to 64 bytes", operation, describe(site).c_str(), (const void*)map);
  const auto& encoded = *reinterpret_cast<const TensorMap*>(map);
  if (encoded.mark != TensorMap::kMark)
    fail("%s (%s): %p is no tensor map", operation, describe(site).c_str(), (const void*)map);
  return encoded;
}

// The PTX ISA's swizzle: the number of a 16-byte chunk in its row of swizzle_bytes is combined with the number of the
// 128 bytes it lies in, modulo the chunks of a row.
size_t swizzled(size_t offset, int swizzle_bytes) {
  const size_t chunks = size_t(swizzle_bytes) / kChunkBytes;
  return chunks == 0 ? offset : offset ^ ((offset / 128 % chunks) * kChunkBytes);
}

// Calls visit(offset of the row in the box, the part of it inside the tensor: offset in the row, source, bytes).
template <class Visit>
void for_each_row(const Copy& copy, const Visit& visit) {
  const TensorMap& map = copy.map;
  const int64_t begin = std::max<int64_t>(copy.start[0], 0);
  const int64_t end = std::min<int64_t>(int64_t(copy.start[0]) + map.box[0], int64_t(map.last[0]) + 1);
  size_t row_offset = 0;
  for (int64_t plane = copy.start[2]; plane < int64_t(copy.start[2]) + map.box[2]; ++plane) {
    for (int64_t row = copy.start[1]; row < int64_t(copy.start[1]) + map.box[1]; ++row) {
      const bool inside = begin < end && row >= 0 && row <= map.last[1] && plane >= 0 && plane <= map.last[2];
      const char* source = !inside
          ? nullptr
          : map.address + plane * int64_t(map.strides[1]) + row * int64_t(map.strides[0]) + begin * map.element_bytes;
      visit(
          row_offset, size_t(inside ? (begin - copy.start[0]) * map.element_bytes : 0), source,
          size_t(inside ? (end - begin) * map.element_bytes : 0));
      row_offset += size_t(bytes_of_row(map));
    }
  }
}

void land(const Copy& copy, const Landing& landing) {
  if (landing.block->alive == 0) {
    fail(
        "%s (%s) by %s: its data come after %s has left the kernel", copy.operation, describe(copy.site).c_str(),
        copy.thread.c_str(), name_of(*landing.block).c_str());
  }
  const size_t row_bytes = size_t(bytes_of_row(copy.map));
  for_each_row(copy, [&](size_t row, size_t offset, const char* source, size_t bytes) {
    char values[kMaxRowBytes] = {};
    if (bytes > 0)
      std::memcpy(values + offset, source, bytes);
    for (size_t i = 0; i < row_bytes; i += kChunkBytes)
      std::memcpy(landing.shared + swizzled(row + i, copy.map.swizzle_bytes), values + i, kChunkBytes);
  });
  const int64_t bytes = bytes_of_box(copy.map);
  if constexpr (kTrace)
    trace::bulk_landed(landing.shared, size_t(bytes));
  counters.bulk_delivered_bytes += bytes;
  complete_bytes(*landing.barrier, landing.phase, bytes, copy.site);
}

}  // namespace

void prefetch_tensor_map(const CUtensorMap* map, Site site) {
  checked_map(map, "prefetch.tensormap", site);
}

void copy_box(
    void* shared, const CUtensorMap* map, int x, int y, int z, void* barrier, unsigned blocks, const char* operation,
    Site site) {
  yield_sometimes();
  if (device().architecture < 90)
    fail("%s (%s) needs sm_90", operation, describe(site).c_str());
  const Copy copy{checked_map(map, operation, site), {x, y, z}, operation, site, name_of(self())};
  if (copy.map.rank != 3)
    fail("%s (%s): the tensor map has %d dimensions, not 3", operation, describe(site).c_str(), int(copy.map.rank));
  if (std::any_of(copy.map.element_strides, copy.map.element_strides + 3, [](int stride) { return stride != 1; }))
    fail("%s (%s): the emulator knows no element strides but 1", operation, describe(site).c_str());
  const size_t alignment = copy.map.swizzle_bytes > 0 ? size_t(8) * copy.map.swizzle_bytes : 128;
  const Block& own = block_of(self());
  const ptrdiff_t place = static_cast<char*>(shared) - static_cast<char*>(own.dynamic_shared);
  if (place % ptrdiff_t(alignment) != 0) {
    fail(
        "%s (%s): the destination, byte %td of shared memory, is not aligned to %zu bytes", operation,
        describe(site).c_str(), place, alignment);
  }
  const int64_t bytes = bytes_of_box(copy.map);
  check_in_shared(operation, shared, size_t(bytes), site);
  check_in_shared(operation, barrier, 8, site);
  if (blocks >> block_count() != 0) {
    fail("%s (%s): blocks 0x%x of a cluster of %d", operation, describe(site).c_str(), blocks, block_count());
  }
  const int reader_rank = blocks == 0 ? own.rank : std::countr_zero(blocks);
  const Block& reader = block_at(reader_rank);
  const MemoryBarrier& reads_for = memory_barrier(reader, in_block(barrier, own, reader), operation, site);
  for_each_row(copy, [&](size_t, size_t, const char* source, size_t source_bytes) {
    if (source_bytes == 0)
      return;
    if (!addressable(source, source_bytes)) {
      fail(
          "%s (%s): the %zu bytes at %p are outside the tensor", operation, describe(site).c_str(), source_bytes,
          (const void*)source);
    }
    counters.bulk_copy_bytes += int64_t(source_bytes);
    if constexpr (kTrace)
      trace::bulk_read(source, source_bytes, reads_for.object, location_of(site));
  });
  for (int rank = 0; rank < block_count(); ++rank) {
    if (blocks == 0 ? rank != own.rank : (blocks >> rank & 1) == 0)
      continue;
    Block& other = block_at(rank);
    if (other.alive == 0)
      fail("%s (%s): %s has left the kernel", operation, describe(site).c_str(), name_of(other).c_str());
    MemoryBarrier& at = memory_barrier(other, in_block(barrier, own, other), operation, site);
    if (!at.fenced) {
      fail(
          "%s (%s): no fence_barrier_init has followed the initialisation of %s", operation, describe(site).c_str(),
          describe(at).c_str());
    }
    const Landing landing{&other, static_cast<char*>(in_block(shared, own, other)), &at, at.phase};
    at.latest_copied = at.phase;
    poison(landing.shared, size_t(bytes));
    if constexpr (kTrace)
      trace::bulk_issued(landing.shared, size_t(bytes), at.object, location_of(site));
    start_async([copy, landing] { land(copy, landing); });
  }
}

}  // namespace segattn::emulator
