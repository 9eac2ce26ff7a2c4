// The emulated twin of csrc/cuda/common/ptx.cuh: the same functions, by PTX's documented lane layouts (runtime/mma.cpp).
// The trailing Site parameter is filled in by the compiler with the call's place in the kernel.
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
  emulator::load_matrices(r, shared_row, 4, false, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row, Site site = Site::current()) {
  emulator::load_matrices(r, shared_row, 4, true, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row, Site site = Site::current()) {
  emulator::load_matrices(r, shared_row, 2, false, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row, Site site = Site::current()) {
  emulator::load_matrices(r, shared_row, 2, true, site);
}
inline void stmatrix_x4(void* shared_row, const uint32_t (&r)[4], Site site = Site::current()) {
  emulator::store_matrices(r, shared_row, 4, false, site);
}
inline void stmatrix_x4_trans(void* shared_row, const uint32_t (&r)[4], Site site = Site::current()) {
  emulator::store_matrices(r, shared_row, 4, true, site);
}

// Copies source_bytes (0 .. size) from global to shared memory and fills the rest with zero, by the next wait.
inline void cp_async_16(void* shared, const void* global, int source_bytes = 16, Site site = Site::current()) {
  emulator::async_copy(shared, global, 16, source_bytes, site);
}
inline void cp_async_8(void* shared, const void* global, int source_bytes = 8, Site site = Site::current()) {
  emulator::async_copy(shared, global, 8, source_bytes, site);
}
inline void cp_async_4(void* shared, const void* global, int source_bytes = 4, Site site = Site::current()) {
  emulator::async_copy(shared, global, 4, source_bytes, site);
}
inline void cp_async_commit() {
  emulator::async_commit();
}
// Returns when at most N of the most recently committed groups are still in flight.
template <int N>
inline void cp_async_wait() {
  emulator::async_wait(N);
}

// bar.sync id, threads and bar.arrive id, threads.
inline void barrier_sync(int id, int threads, Site site = Site::current()) {
  emulator::named_barrier(id, threads, true, site);
}
inline void barrier_arrive(int id, int threads, Site site = Site::current()) {
  emulator::named_barrier(id, threads, false, site);
}

// ex2.approx.ftz.f32. The hardware's error is 2 ulp; the emulator's is below 1.
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;  // a NaN stays
}
inline float rcp_approx(float x) {
  return 1.0f / x;
}

// cvt.rna.tf32.f32: to 10 mantissa bits, ties away from zero. Infinities and NaN stay what they are.
inline uint32_t to_tf32(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : bits;
}

// a * b + c, rounded once, and counted (see docs/emulator.md): SIMT kernels use it for their arithmetic.
inline float fma(float a, float b, float c) {
  emulator::count_fma(1);
  return std::fma(a, b, c);
}
inline double fma(double a, double b, double c) {
  emulator::count_fma(1);
  return std::fma(a, b, c);
}

}  // namespace segattn::cuda::ptx
