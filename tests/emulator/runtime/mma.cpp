// mma.sync and ldmatrix, computed once per warp from the registers of all 32 lanes.
//
// Layouts: PTX ISA 9.0, sections "Matrix Fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8" and
// "Warp-level matrix load instruction: ldmatrix". tests/emulator/fragments.txt holds the same layouts independently.
#include <bit>
#include <cstring>

#include "../include/emulated_wgmma.h"
#include "counters.h"
#include "device.h"
#include "element_formats.h"
#include "execution.h"
#include "mma_sum.h"
#include "trace.h"

namespace segattn::emulator {
namespace {

struct Mma {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Tensor cores ignore the low 13 bits of a tf32 operand.
float from_tf32(uint32_t bits) {
  return std::bit_cast<float>(bits & ~0x1fffu);
}

template <class F>
void for_accumulators(void* const* operands, F&& body) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* d = static_cast<const Mma*>(operands[lane])->d;
    const int group = lane / 4, pair = lane % 4 * 2;
    body(d[0], group, pair);
    body(d[1], group, pair + 1);
    body(d[2], group + 8, pair);
    body(d[3], group + 8, pair + 1);
  }
}

template <int kDepth>
void accumulate(void* const* operands, MmaOperands<kDepth, 8>& factors, int lowest_exponent) {
  float d[16][8];
  for_accumulators(operands, [&](float& element, int row, int column) { d[row][column] = element; });
  if (mma_rounding() == MmaRounding::kTruncate) {
    add_products_truncated(d, factors, lowest_exponent, mma_blocks(kDepth));
  } else {
    add_products_to_nearest(d, factors);
  }
  for_accumulators(operands, [&](float& element, int row, int column) { element = d[row][column]; });
}

template <MmaType kType>
void run_mma_16bit(void* const* operands, unsigned lanes) {
  constexpr auto convert = kType == MmaType::kFloat16 ? from_float16 : from_bfloat16;
  MmaOperands<16, 8> factors;
  auto& [a, b] = factors;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mma = *static_cast<const Mma*>(operands[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + (i & 1) * 8, column = pair + (i >> 1) * 8;
      a[row][column] = convert(uint16_t(mma.a[i]));
      a[row][column + 1] = convert(uint16_t(mma.a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      const int row = pair + i * 8;
      b[row][group] = convert(uint16_t(mma.b[i]));
      b[row + 1][group] = convert(uint16_t(mma.b[i] >> 16));
    }
  }
  accumulate(operands, factors, kType == MmaType::kFloat16 ? kLowestExponentFloat16 : kLowestExponent);
  ++counters.mma_instructions[int(kType)];
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

void run_mma_tf32(void* const* operands, unsigned lanes) {
  MmaOperands<8, 8> factors;
  auto& [a, b] = factors;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& mma = *static_cast<const Mma*>(operands[lane]);
    const int group = lane / 4, in_group = lane % 4;
    for (int i = 0; i < 4; ++i)
      a[group + (i & 1) * 8][in_group + (i >> 1) * 4] = from_tf32(mma.a[i]);
    for (int i = 0; i < 2; ++i)
      b[in_group + i * 4][group] = from_tf32(mma.b[i]);
  }
  accumulate(operands, factors, kLowestExponent);
  ++counters.mma_instructions[int(MmaType::kTf32)];
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

struct MatrixStore {
  const uint32_t* registers;
  uint16_t* row;
};

// Element (row, column) of matrix i goes to the row whose address lane 8 i + row gives.
void run_transposed_store(void* const* operands, unsigned lanes) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const uint32_t pair = static_cast<const MatrixStore*>(operands[lane])->registers[matrix];
      for (int i = 0; i < 2; ++i) {
        const int row = lane % 4 * 2 + i, column = lane / 4;
        static_cast<const MatrixStore*>(operands[8 * matrix + row])->row[column] = uint16_t(pair >> (16 * i));
      }
    }
  }
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

struct MatrixLoad {
  uint32_t* registers;
  const char* row;
};

constexpr int kMatrices = 4;
constexpr int kRowBytes = 16;

// Element (row, column) of matrix i is in the row whose address lane 8 i + row gives.
const uint16_t* element(void* const* operands, int matrix, int row, int column) {
  return reinterpret_cast<const uint16_t*>(static_cast<const MatrixLoad*>(operands[8 * matrix + row])->row) + column;
}

template <bool kTransposed>
void run_load(void* const* operands, unsigned lanes) {
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int outer = lane / 4, pair = lane % 4 * 2;
      const uint16_t low =
          kTransposed ? *element(operands, matrix, pair, outer) : *element(operands, matrix, outer, pair);
      const uint16_t high =
          kTransposed ? *element(operands, matrix, pair + 1, outer) : *element(operands, matrix, outer, pair + 1);
      static_cast<const MatrixLoad*>(operands[lane])->registers[matrix] = uint32_t(low) | uint32_t(high) << 16;
    }
  }
  if constexpr (kTrace)
    trace::warp_converged(self().warp, lanes);
}

}  // namespace

void mma(MmaType type, float* d, const uint32_t* a, const uint32_t* b, Site site) {
  Mma mine{d, a, b};
  switch (type) {
    case MmaType::kFloat16:
      return collective({"mma.m16n8k16.f16", true, true}, kFullMask, site, &mine, run_mma_16bit<MmaType::kFloat16>);
    case MmaType::kBfloat16:
      return collective({"mma.m16n8k16.bf16", true, true}, kFullMask, site, &mine, run_mma_16bit<MmaType::kBfloat16>);
    case MmaType::kTf32:
      return collective({"mma.m16n8k8.tf32", true, true}, kFullMask, site, &mine, run_mma_tf32);
  }
}

void load_matrices(uint32_t* registers, const void* row, bool transposed, Site site) {
  const char* operation = transposed ? "ldmatrix.x4.trans" : "ldmatrix.x4";
  check_shared(operation, row, kRowBytes, site);
  if constexpr (kTrace)
    trace::access(trace::Access::kMatrixRead, row, kRowBytes, location_of(site));
  MatrixLoad mine{registers, static_cast<const char*>(row)};
  collective({operation, true, true}, kFullMask, site, &mine, transposed ? run_load<true> : run_load<false>);
}

void store_matrices_transposed(void* row, const uint32_t* registers, Site site) {
  constexpr const char* kOperation = "stmatrix.x4.trans";
  check_shared(kOperation, row, kRowBytes, site);
  if constexpr (kTrace)
    trace::access(trace::Access::kWrite, row, kRowBytes, location_of(site));
  MatrixStore mine{registers, static_cast<uint16_t*>(row)};
  collective({kOperation, true, true}, kFullMask, site, &mine, run_transposed_store);
}

}  // namespace segattn::emulator
