// CUDA's device intrinsics in C++. Part of the stand-in <cuda_runtime.h>.
#pragma once

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
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
// Fences order memory but are no barrier: the emulator runs one thread at a time, so there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}

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
inline unsigned __activemask() {
  return segattn::emulator::active_mask();
}

#define SEGATTN_EMULATOR_REDUCE(name, type, kind)                                                        \
  inline type name(unsigned mask, type value, SEGATTN_EMULATOR_SITE) {                                   \
    return type(segattn::emulator::warp_reduce(segattn::emulator::ReduceKind::kind, mask, value, site)); \
  }
SEGATTN_EMULATOR_REDUCE(__reduce_add_sync, unsigned, kAdd)
SEGATTN_EMULATOR_REDUCE(__reduce_add_sync, int, kAdd)
SEGATTN_EMULATOR_REDUCE(__reduce_min_sync, unsigned, kMinUnsigned)
SEGATTN_EMULATOR_REDUCE(__reduce_min_sync, int, kMinSigned)
SEGATTN_EMULATOR_REDUCE(__reduce_max_sync, unsigned, kMaxUnsigned)
SEGATTN_EMULATOR_REDUCE(__reduce_max_sync, int, kMaxSigned)
SEGATTN_EMULATOR_REDUCE(__reduce_and_sync, unsigned, kAnd)
SEGATTN_EMULATOR_REDUCE(__reduce_or_sync, unsigned, kOr)
SEGATTN_EMULATOR_REDUCE(__reduce_xor_sync, unsigned, kXor)
#undef SEGATTN_EMULATOR_REDUCE

// ---- memory ---------------------------------------------------------------------------------------------------
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcg(const T* pointer) {
  return *pointer;
}
template <class T>
inline T __ldcs(const T* pointer) {
  return *pointer;
}
template <class T>
inline void __stcg(T* pointer, T value) {
  *pointer = value;
}
template <class T>
inline void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return reinterpret_cast<size_t>(pointer);
}

// Only one thread runs at a time, so a plain update is atomic; uninstrumented, so that it is no race either.
#define SEGATTN_EMULATOR_ATOMIC(name, expression)                                                      \
  template <class T>                                                                                   \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* address, std::type_identity_t<T> value) { \
    const T old = *address;                                                                            \
    *address = expression;                                                                             \
    return old;                                                                                        \
  }
SEGATTN_EMULATOR_ATOMIC(atomicAdd, old + value)
SEGATTN_EMULATOR_ATOMIC(atomicSub, old - value)
SEGATTN_EMULATOR_ATOMIC(atomicExch, value)
SEGATTN_EMULATOR_ATOMIC(atomicMin, (old < value ? old : value))
SEGATTN_EMULATOR_ATOMIC(atomicMax, (old > value ? old : value))
SEGATTN_EMULATOR_ATOMIC(atomicAnd, old& value)
SEGATTN_EMULATOR_ATOMIC(atomicOr, old | value)
SEGATTN_EMULATOR_ATOMIC(atomicXor, old ^ value)
#undef SEGATTN_EMULATOR_ATOMIC
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T
atomicCAS(T* address, std::type_identity_t<T> compare, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == compare)
    *address = value;
  return old;
}

// ---- arithmetic -----------------------------------------------------------------------------------------------
using std::max;
using std::min;

inline float __expf(float x) {
  return std::exp(x);
}
inline float __exp2f(float x) {
  return std::exp2(x);
}
inline float __logf(float x) {
  return std::log(x);
}
inline float __log2f(float x) {
  return std::log2(x);
}
inline float __fdividef(float x, float y) {
  return x / y;
}
inline float __frcp_rn(float x) {
  return 1.0f / x;
}
inline float __fsqrt_rn(float x) {
  return std::sqrt(x);
}
inline float __fadd_rn(float x, float y) {
  return x + y;
}
inline float __fsub_rn(float x, float y) {
  return x - y;
}
inline float __fmul_rn(float x, float y) {
  return x * y;
}
inline float __fmaf_rn(float x, float y, float z) {
  segattn::emulator::count_fma(1);
  return std::fma(x, y, z);
}
inline double __fma_rn(double x, double y, double z) {
  segattn::emulator::count_fma(1);
  return std::fma(x, y, z);
}
inline float rsqrtf(float x) {
  return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
  return 1.0 / std::sqrt(x);
}
inline float __saturatef(float x) {
  return x >= 0 ? (x > 1 ? 1.0f : x) : 0.0f;
}

inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __float_as_int(float x) {
  return std::bit_cast<int>(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline float __int_as_float(int x) {
  return std::bit_cast<float>(x);
}
inline long long __double_as_longlong(double x) {
  return std::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) {
  return std::bit_cast<double>(x);
}

inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __popcll(unsigned long long x) {
  return std::popcount(x);
}
inline int __clz(int x) {
  return std::countl_zero(unsigned(x));
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit)
    reversed |= ((x >> bit) & 1u) << (31 - bit);
  return reversed;
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
inline unsigned __umulhi(unsigned x, unsigned y) {
  return unsigned(uint64_t(x) * y >> 32);
}
inline int __mulhi(int x, int y) {
  return int(int64_t(x) * y >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return unsigned((uint64_t(high) << 32 | low) << (shift & 31) >> 32);
}

inline void __trap() {
  segattn::emulator::fail("__trap()");
}
inline void __nanosleep(unsigned) {}
