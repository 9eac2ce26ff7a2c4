// The emulated twin of csrc/cuda/common/ptx.cuh: the same functions, with PTX's documented lane layouts
// (runtime/mma.cpp). The default of the last parameter is the source location of the call.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace segattn::cuda::ptx {

using emulator::Site;

// d += a * b, float32 accumulation. T is __half or __nv_bfloat16. a: 16x16 row-major, b: 16x8 column-major.
template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
  constexpr auto type = std::is_same_v<T, __half> ? emulator::MmaType::kFloat16 : emulator::MmaType::kBfloat16;
  emulator::mma(type, d, a, b, site);
}

// d += a * b, a: 16x8, b: 8x8, operands in tf32 (the hardware ignores a float32's low 13 bits).
inline void mma_m16n8k8_tf32(
    float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::current()) {
  emulator::mma(emulator::MmaType::kTf32, d, a, b, site);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row, Site site = Site::current()) {
  emulator::load_matrices(r, shared_row, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Site site = Site::current()) {
  emulator::load_matrices(r, shared_row, true, site);
}

// Copies source_bytes (0 to 16) from global to shared memory and fills the rest with zeros, by the next wait.
inline void cp_async_16(void* shared, const void* global, int source_bytes, Site site = Site::current()) {
  emulator::async_copy(shared, global, 16, source_bytes, site);
}
inline void cp_async_commit() {
  emulator::async_commit();
}
// Returns when at most N of the most recently committed groups are still in flight.
template <int N>
inline void cp_async_wait() {
  emulator::async_wait(N);
}

// ex2.approx.ftz.f32. The hardware's error is 2 ulp; the emulator's is below 1.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;  // preserves NaN
}

// cvt.rna.tf32.f32: to 10 mantissa bits, ties away from zero. Preserves infinities and NaN.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

}  // namespace segattn::cuda::ptx
