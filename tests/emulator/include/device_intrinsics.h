// The device intrinsics that the kernels and the self-tests use. Part of the stand-in <cuda_runtime.h>.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

// ---- barriers -------------------------------------------------------------------------------------------------
#define SEGATTN_EMULATOR_SITE ::segattn::emulator::Site site = ::segattn::emulator::Site::current()

inline void __syncthreads(SEGATTN_EMULATOR_SITE) {
  segattn::emulator::block_barrier(segattn::emulator::BarrierReduction::kNone, 0, site);
}
inline int __syncthreads_or(int predicate, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::block_barrier(segattn::emulator::BarrierReduction::kOr, predicate, site);
}
inline int __syncthreads_and(int predicate, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::block_barrier(segattn::emulator::BarrierReduction::kAnd, predicate, site);
}
inline int __syncthreads_count(int predicate, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::block_barrier(segattn::emulator::BarrierReduction::kCount, predicate, site);
}
inline void __syncwarp(unsigned mask = segattn::emulator::kFullMask, SEGATTN_EMULATOR_SITE) {
  segattn::emulator::warp_barrier(mask, site);
}
// ---- warp collectives -----------------------------------------------------------------------------------------
namespace segattn::emulator {
template <class T>
inline T shuffle_as(ShuffleKind kind, unsigned mask, T value, int operand, int width, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof value);
  raw = shuffle(kind, mask, raw, operand, width, site);
  std::memcpy(&value, &raw, sizeof value);
  return value;
}
}  // namespace segattn::emulator

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::shuffle_as(segattn::emulator::ShuffleKind::kIndex, mask, value, source, width, site);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::shuffle_as(segattn::emulator::ShuffleKind::kUp, mask, value, int(delta), width, site);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::shuffle_as(segattn::emulator::ShuffleKind::kDown, mask, value, int(delta), width, site);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::shuffle_as(segattn::emulator::ShuffleKind::kXor, mask, value, lane_mask, width, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SEGATTN_EMULATOR_SITE) {
  return segattn::emulator::vote(segattn::emulator::VoteKind::kBallot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, SEGATTN_EMULATOR_SITE) {
  return int(segattn::emulator::vote(segattn::emulator::VoteKind::kAny, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, SEGATTN_EMULATOR_SITE) {
  return int(segattn::emulator::vote(segattn::emulator::VoteKind::kAll, mask, predicate != 0, site));
}

// ---- arithmetic -----------------------------------------------------------------------------------------------
using std::max;
using std::min;

inline int __popc(unsigned x) {
  return std::popcount(x);
}

inline float __fmaf_rn(float x, float y, float z) {
  segattn::emulator::count_fma(1);
  return std::fma(x, y, z);
}
inline double __fma_rn(double x, double y, double z) {
  segattn::emulator::count_fma(1);
  return std::fma(x, y, z);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 0xf;
    unsigned byte = unsigned(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8)
      byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}
