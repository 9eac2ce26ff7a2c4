// Where wgmma's operands lie. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions", sections
// "Register Fragments" and "Shared Memory Matrix Layout". tests/emulator/wgmma_layouts.txt holds the same
// independently.
#pragma once

#include <cstdint>
#include <cstring>

#include "../include/emulator.h"
#include "element_formats.h"
#include "wgmma.h"

namespace segattn::emulator {

constexpr int kDepth = 16;
constexpr int kAtomBytes = 1024;  // 8 rows of 128 bytes, the unit of the 128-byte swizzle
constexpr int kElementBytes = 2;
constexpr int kChunkElements = 64;  // of a swizzled row

// An operand in shared memory: offsets in bytes.
struct Layout {
  uint32_t start, leading, stride;
  bool mn_major;

  Layout(uint64_t descriptor, bool mn_major)
      : start(uint32_t(descriptor & 0x3fff) << 4),
        leading(uint32_t(descriptor >> 16 & 0x3fff) << 4),
        stride(uint32_t(descriptor >> 32 & 0x3fff) << 4),
        mn_major(mn_major) {}

  // The byte of element k of row `outer` of a or column `outer` of b.
  uint32_t offset(int outer, int k) const {
    const uint32_t linear = mn_major ? start + outer / kChunkElements * leading + k / 8 * stride + k % 8 * 128 +
            outer % kChunkElements * kElementBytes
                                     : start + outer / 8 * stride + outer % 8 * 128 + k * kElementBytes;
    return linear ^ (linear >> 7 & 7) << 4;
  }
};

// The elements of rows `first` to first + kCount - 1 of a, or columns of b: element(outer, k) = value.
template <int kCount, class F>
void read_operand(MmaType type, const char* shared, const Layout& layout, int first, F&& element) {
  constexpr int kRun = 8;  // elements that the swizzle keeps together
  const auto convert = [type](uint16_t bits) {
    return type == MmaType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
  };
  uint16_t run[kRun];
  if (layout.mn_major) {
    for (int k = 0; k < kDepth; ++k) {
      for (int outer = 0; outer < kCount; outer += kRun) {
        std::memcpy(run, shared + layout.offset(first + outer, k), sizeof run);
        for (int i = 0; i < kRun; ++i)
          element(outer + i, k) = convert(run[i]);
      }
    }
  } else {
    for (int outer = 0; outer < kCount; ++outer) {
      for (int k = 0; k < kDepth; k += kRun) {
        std::memcpy(run, shared + layout.offset(first + outer, k), sizeof run);
        for (int i = 0; i < kRun; ++i)
          element(outer, k + i) = convert(run[i]);
      }
    }
  }
}

// a's rows of a warp, from the registers of its lanes.
inline void read_registers(MmaType type, const uint32_t* const (&registers)[kWarpSize], float (&a)[kWarpRows][kDepth]) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 8; ++i) {
      const uint16_t bits = uint16_t(registers[lane][i / 2] >> (i % 2 * 16));
      a[row + i / 2 % 2 * 8][pair + i / 4 * 8 + i % 2] =
          type == MmaType::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
    }
  }
}

// The bytes of shared memory that hold `count` rows of a or columns of b: body(offset, bytes), at most a row of an atom
// at once.
template <class F>
void for_operand_bytes(const Layout& layout, int first, int count, F&& body) {
  constexpr int kRun = 8, kRunBytes = kRun * kElementBytes;
  if (layout.mn_major && count % kChunkElements == 0) {
    for (int k = 0; k < kDepth; ++k) {
      for (int chunk = first; chunk < first + count; chunk += kChunkElements)
        body(layout.offset(chunk, k) & ~127u, kChunkElements * kElementBytes);
    }
    return;
  }
  // Two runs that follow each other are neighbours, in either order.
  for (int outer = first; outer < first + count; outer += layout.mn_major ? 2 * kRun : 1) {
    for (int k = 0; k < kDepth; k += layout.mn_major ? 1 : 2 * kRun)
      body(layout.offset(outer, k) & ~31u, 2 * kRunBytes);
  }
}

}  // namespace segattn::emulator
